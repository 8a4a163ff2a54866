//! One fork at a time in a guest, whatever process or thread asks, in whatever namespaces.
//!
//! All callers share one control page, so the lock has to be one too, also for containers. It is flock(2) of
//! the memory device's node in the kernel's devtmpfs:
//!
//! - A kernel has one devtmpfs. [`Devtmpfs`] mounts it without a place among the files, so that it does not
//!   matter what the caller's `/dev` is.
//! - To open the node takes CAP_SYS_RAWIO outside of all user namespaces, which whoever rings has anyway:
//!   nobody else can hold the lock.
//! - The kernel unlocks it when its holder ends.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Name of the memory device's node in devtmpfs.
const NODE: &str = "mem";

/// How often a caller looks again that does not wait for ever: flock(2) knows no deadline.
const PAUSE: Duration = Duration::from_millis(2);

/// Why the lock can't be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LockError {
    /// The kernel's devtmpfs is out of reach.
    #[error("devtmpfs, which has the lock, can't be mounted")]
    Mount {
        /// What fsopen(2), fsconfig(2), fsmount(2) or openat(2) answered.
        source: io::Error,
    },
    /// The node is missing, or not for this caller.
    #[error("the node {NODE} of devtmpfs, which is the lock, can't be opened")]
    Open {
        /// What openat(2) answered.
        source: io::Error,
    },
    /// The kernel does not lock.
    #[error("the fork lock can't be locked")]
    Acquire {
        /// What flock(2) answered.
        source: io::Error,
    },
}

/// The root directory of the kernel's devtmpfs.
#[derive(Debug)]
pub(crate) struct Devtmpfs {
    root: OwnedFd,
}

impl Devtmpfs {
    /// Mounts it where no path leads: CAP_SYS_ADMIN, and Linux 5.2. The mount is undone at once, while there
    /// is only one VM to wait for that (100 us were measured); the directory can be used all the same.
    ///
    /// # Errors
    ///
    /// [`LockError::Mount`].
    pub(crate) fn mount() -> Result<Self, LockError> {
        let mount = || {
            let context = fsopen("devtmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            fsconfig_create(&context)?;
            let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
            openat(&mount, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        };
        let root = mount().map_err(|errno| LockError::Mount { source: errno.into() })?;
        Ok(Self { root })
    }

    /// Opens the node. Each call does so anew, so that flock(2) also keeps two threads of one process apart.
    fn open_node(&self) -> Result<File, LockError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = openat(&self.root, NODE, flags, Mode::empty());
        node.map(File::from).map_err(|errno| LockError::Open { source: errno.into() })
    }
}

/// The right to fork this VM, given up on drop. A copy of the VM holds it in its own kernel, and gives it up
/// there.
#[derive(Debug)]
pub(crate) struct ForkLock {
    _locked: Flock<File>,
}

impl ForkLock {
    /// Waits until no other caller in this guest holds the lock, or until the deadline: then there is `None`.
    ///
    /// # Errors
    ///
    /// [`LockError::Open`] or [`LockError::Acquire`].
    pub(crate) fn acquire(devtmpfs: &Devtmpfs, deadline: Option<Instant>) -> Result<Option<Self>, LockError> {
        Self::of(devtmpfs.open_node()?, deadline)
    }

    fn of(mut file: File, deadline: Option<Instant>) -> Result<Option<Self>, LockError> {
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
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Opens a file that stands for the node: `shared` once more, as another caller does.
    fn open(shared: &File) -> File {
        File::open(format!("/proc/self/fd/{}", shared.as_raw_fd())).unwrap()
    }

    #[test]
    fn who_does_not_wait_for_ever_waits_until_the_deadline() {
        let node = crate::raw::tests::file(0);
        let within = |timeout| ForkLock::of(open(&node), Some(Instant::now() + timeout)).unwrap();
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
    }

    #[test]
    fn threads_hold_the_lock_one_after_another() {
        let node = crate::raw::tests::file(0);
        let held = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let _lock = ForkLock::of(open(&node), None).unwrap().unwrap();
                        assert!(!held.swap(true, Ordering::SeqCst), "two holders");
                        std::thread::yield_now();
                        held.store(false, Ordering::SeqCst);
                    }
                });
            }
        });
    }

    #[test]
    fn a_node_that_is_not_there_is_an_error() {
        let none = Devtmpfs { root: File::open("/proc").unwrap().into() };
        let error = ForkLock::acquire(&none, None).unwrap_err();
        assert_eq!(error.to_string(), "the node mem of devtmpfs, which is the lock, can't be opened");
    }
}
