//! A warm VM that stands by for the next fork of one parent.
//!
//! An order that goes through the platform wakes up two sleepers, one after the other: it takes longer than
//! all that the parent does meanwhile (measured: 230 us of 520 us). So where there is time, a parent
//! announces what its next fork will come with, and the platform passes that on to a warm VM. When it forks,
//! the parent wakes that warm VM up itself, by a wake event that both have. The warm VM takes the state,
//! while the order comes from the platform, which alone decides whether there is a child, and who it is:
//! without its order, no warm VM runs.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::rendezvous::{self, Rendezvous};

/// Why nobody can meet.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file to meet in is missing.
    #[error("the files of a fork came without a rendezvous")]
    NoRendezvous,
    /// The wake event is missing.
    #[error("the files of a fork that is announced came without a wake event")]
    NoWakeEvent,
    /// It can't be opened.
    #[error("can't open the rendezvous")]
    Rendezvous(#[from] rendezvous::Error),
    /// The wake event failed.
    #[error("can't {operation} a warm VM's wake event")]
    WakeEvent {
        /// What was tried.
        operation: &'static str,
        /// The system's reason.
        source: io::Error,
    },
}

/// Source of a copy: where it meets its parent, and the files that the image consists of.
#[derive(Debug)]
pub struct CopySource {
    pub(super) rendezvous: Rendezvous,
    pub(super) files: Vec<Arc<File>>,
}

impl CopySource {
    /// From its files: the rendezvous, then those of the image.
    ///
    /// # Errors
    /// [`Error::NoRendezvous`] or [`Error::Rendezvous`].
    pub fn open(files: impl IntoIterator<Item = File>) -> Result<Self, Error> {
        let mut files = files.into_iter();
        let rendezvous = Rendezvous::open(files.next().ok_or(Error::NoRendezvous)?)?;
        Ok(Self { rendezvous, files: files.map(Arc::new).collect() })
    }

    /// Says that `count` children meet there.
    #[must_use]
    pub fn with_children(self, count: u32) -> Self {
        Self { rendezvous: self.rendezvous.with_children(count), ..self }
    }
}

/// Eventfd by which a parent wakes up the warm VM that stands by for its next fork, if there is one.
#[derive(Debug)]
pub(super) struct WakeEvent(EventFd);

impl WakeEvent {
    /// A new one.
    pub(super) fn new() -> Result<Self, Error> {
        let wake_event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        wake_event.map(Self).map_err(|errno| Error::WakeEvent { operation: "make", source: errno.into() })
    }

    /// Wakes up the warm VM.
    pub(super) fn wake(&self) -> Result<(), Error> {
        self.0
            .write(1)
            .map(drop)
            .map_err(|errno| Error::WakeEvent { operation: "write to", source: errno.into() })
    }
}

impl AsFd for WakeEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The warm VM's end.
#[derive(Debug)]
pub struct Standby {
    wake_event: File,
    copy_source: CopySource,
}

impl Standby {
    /// From its files: the wake event, the rendezvous, then those of the image.
    ///
    /// # Errors
    /// [`Error::NoWakeEvent`], or as [`CopySource::open`].
    pub fn open(files: Vec<File>) -> Result<Self, Error> {
        let mut files = files.into_iter();
        Ok(Self {
            wake_event: files.next().ok_or(Error::NoWakeEvent)?,
            copy_source: CopySource::open(files)?,
        })
    }

    /// Waits until the parent writes to the wake event, or something comes from the platform, and says
    /// whether it is the parent. Where both have come, the platform goes first.
    ///
    /// # Errors
    /// [`Error::WakeEvent`].
    pub fn wait(&self, platform: &impl AsFd) -> Result<bool, Error> {
        let mut fds = [
            PollFd::new(platform.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake_event.as_fd(), PollFlags::POLLIN),
        ];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => return Ok(!fds[0].any().unwrap_or(true)),
                Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(Error::WakeEvent { operation: "wait for", source: errno.into() }),
            }
        }
    }

    /// The lowest layer of the image to come.
    pub fn lowest_layer(&self) -> Option<&Arc<File>> {
        self.copy_source.files.first()
    }

    /// Whether the parent has written to the wake event, or something comes from the platform.
    pub fn is_woken(&self, platform: &impl AsFd) -> bool {
        let mut fds = [
            PollFd::new(platform.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake_event.as_fd(), PollFlags::POLLIN),
        ];
        // Whoever can't look waits as if there was something.
        poll(&mut fds, PollTimeout::ZERO) != Ok(0)
    }

    /// What it stands by for: one child, or more for which there are processors.
    pub fn into_copy_source(self) -> CopySource {
        self.copy_source
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    fn files(wake_event: &WakeEvent, rendezvous: &Rendezvous) -> Vec<File> {
        let copies =
            [wake_event.as_fd(), rendezvous.file().as_fd()].map(|fd| fd.try_clone_to_owned().unwrap());
        copies.map(File::from).into()
    }

    #[test]
    fn a_shell_hears_its_parent_and_the_platform_first() {
        let (wake_event, rendezvous) = (WakeEvent::new().unwrap(), Rendezvous::new().unwrap());
        let standby = Standby::open(files(&wake_event, &rendezvous)).unwrap();
        let (platform, mut other_side) = UnixStream::pair().unwrap();
        assert!(!standby.is_woken(&platform));
        wake_event.wake().unwrap();
        assert!(standby.is_woken(&platform));
        assert!(standby.wait(&platform).unwrap());
        other_side.write_all(b"!").unwrap();
        assert!(!standby.wait(&platform).unwrap());
        rendezvous.publish(b"state").unwrap();
        assert_eq!(standby.into_copy_source().rendezvous.wait_state(|| true).unwrap(), b"state");
    }

    #[test]
    fn nobody_stands_by_without_bell_or_rendezvous() {
        let (wake_event, rendezvous) = (WakeEvent::new().unwrap(), Rendezvous::new().unwrap());
        assert!(matches!(Standby::open(Vec::new()), Err(Error::NoWakeEvent)));
        let mut files = files(&wake_event, &rendezvous);
        files.truncate(1);
        assert!(matches!(Standby::open(files), Err(Error::NoRendezvous)));
    }
}
