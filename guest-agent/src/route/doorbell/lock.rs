//! One fork at a time in a guest, whatever process or thread asks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Where the lock file may be, best first: /run can be missing in an early or small system.
const PATHS: [&str; 2] = ["/run/vmfork.lock", "/tmp/vmfork.lock"];

/// Why the lock can't be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// No lock file can be opened or made.
    #[error("{} can't be opened", path.display())]
    Open {
        /// The last file that was tried.
        path: PathBuf,
        /// What open(2) answered.
        source: io::Error,
    },
    /// The kernel does not lock.
    #[error("the lock file can't be locked")]
    Acquire {
        /// What flock(2) answered.
        source: io::Error,
    },
}

/// The right to fork this VM, given up on drop. A copy of the VM holds it in its own kernel, and gives it up there.
#[derive(Debug)]
pub(crate) struct ForkLock {
    _locked: Flock<File>,
}

impl ForkLock {
    /// Waits until no other caller in this guest holds the lock.
    ///
    /// # Errors
    ///
    /// [`LockError`] where neither /run nor /tmp can hold the lock file, or it can't be locked.
    pub(crate) fn acquire() -> Result<Self, LockError> {
        let [first, second] = PATHS.map(Path::new);
        Self::acquire_at(first).or_else(|error| match error {
            LockError::Open { .. } => Self::acquire_at(second),
            LockError::Acquire { .. } => Err(error),
        })
    }

    /// Each call opens the file anew, so that flock(2) also keeps two threads of one process apart.
    fn acquire_at(path: &Path) -> Result<Self, LockError> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(|source| LockError::Open { path: path.to_owned(), source })?;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusive) {
                Ok(locked) => return Ok(Self { _locked: locked }),
                Err((file, Errno::EINTR)) => file,
                Err((_, errno)) => return Err(LockError::Acquire { source: errno.into() }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn threads_hold_the_lock_one_after_another() {
        let path = std::env::temp_dir().join(format!("vmfork-lock-test-{}", std::process::id()));
        let held = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let _lock = ForkLock::acquire_at(&path).unwrap();
                        assert!(!held.swap(true, Ordering::SeqCst), "two holders");
                        std::thread::yield_now();
                        held.store(false, Ordering::SeqCst);
                    }
                });
            }
        });
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_file_that_cannot_be_made_is_an_error() {
        let error = ForkLock::acquire_at(Path::new("/nonexistent/vmfork.lock")).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent/vmfork.lock can't be opened");
    }
}
