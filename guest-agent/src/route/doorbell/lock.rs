//! One fork at a time in a guest, whatever process or thread asks.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// Where the lock file may be, best first: /run can be missing in an early or small system.
const PATHS: [&str; 2] = ["/run/vmfork.lock", "/tmp/vmfork.lock"];

/// How often a caller looks again that does not wait for ever: flock(2) knows no deadline.
const PAUSE: Duration = Duration::from_millis(2);

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
    /// Waits until no other caller in this guest holds the lock, or until the deadline: then there is `None`.
    ///
    /// # Errors
    ///
    /// [`LockError`] where neither /run nor /tmp can hold the lock file, or it can't be locked.
    pub(crate) fn acquire(deadline: Option<Instant>) -> Result<Option<Self>, LockError> {
        let [first, second] = PATHS.map(Path::new);
        Self::acquire_at(first, deadline).or_else(|error| match error {
            LockError::Open { .. } => Self::acquire_at(second, deadline),
            LockError::Acquire { .. } => Err(error),
        })
    }

    /// Each call opens the file anew, so that flock(2) also keeps two threads of one process apart.
    fn acquire_at(path: &Path, deadline: Option<Instant>) -> Result<Option<Self>, LockError> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
            .map_err(|source| LockError::Open { path: path.to_owned(), source })?;
        let how = if deadline.is_some() { FlockArg::LockExclusiveNonblock } else { FlockArg::LockExclusive };
        loop {
            file = match Flock::lock(file, how) {
                Ok(locked) => return Ok(Some(Self { _locked: locked })),
                Err((file, Errno::EINTR)) => file,
                Err((_, Errno::EWOULDBLOCK)) if super::passed(deadline) => return Ok(None),
                Err((file, Errno::EWOULDBLOCK)) => {
                    thread::sleep(PAUSE);
                    file
                }
                Err((_, errno)) => return Err(LockError::Acquire { source: errno.into() }),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn lock_file(of: &str) -> PathBuf {
        std::env::temp_dir().join(format!("vmfork-lock-test-{of}-{}", std::process::id()))
    }

    #[test]
    fn who_does_not_wait_for_ever_waits_until_the_deadline() {
        let path = lock_file("deadline");
        let within = |timeout| ForkLock::acquire_at(&path, Some(Instant::now() + timeout)).unwrap();
        let held = within(Duration::ZERO).expect("nobody holds it");
        let start = Instant::now();
        assert!(within(Duration::from_millis(20)).is_none());
        assert!(start.elapsed() >= Duration::from_millis(20));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| within(Duration::from_secs(60)).is_some());
            std::thread::sleep(Duration::from_millis(20));
            drop(held);
            assert!(waiter.join().unwrap());
        });
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn threads_hold_the_lock_one_after_another() {
        let path = lock_file("turns");
        let held = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let _lock = ForkLock::acquire_at(&path, None).unwrap().unwrap();
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
        let error = ForkLock::acquire_at(Path::new("/nonexistent/vmfork.lock"), None).unwrap_err();
        assert_eq!(error.to_string(), "/nonexistent/vmfork.lock can't be opened");
    }
}
