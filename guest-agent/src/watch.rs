//! The forks that a VM comes out of, as the kernel module tells of them: also those that other processes, or
//! operators, have asked for.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use serde::Serialize;
use vmfork_abi::{Identity, device};

use crate::raw::head;
use crate::route::RawReport;
use crate::{Fork, OpenError, OutcomeError};

/// The device, from which each fork is read once it has been made.
///
/// Any number of processes can watch, each for itself. A copy by an operator is told of within a second. As a
/// file it can be polled: there is something to read where there is a [`Notice`].
#[derive(Debug)]
pub struct Watch {
    device: File,
}

/// A fork that this VM has come out of.
///
/// Serialized, it is the fork's object with one field more, `forks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Notice {
    /// How many forks this VM has come out of since the kernel module was loaded, as far as that has seen.
    /// More than one above that of the last notice: some were made too fast to be read one by one.
    pub forks: u64,
    /// The fork, without its copies: [`Vmm::status`](crate::Vmm::status) has these.
    #[serde(flatten)]
    pub fork: Fork,
}

/// Why it is not known what forks there were.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WatchError {
    /// The device can't be opened.
    #[error("forks can't be watched")]
    Open(#[source] OpenError),
    /// The device can't be read.
    #[error("{} can't be read", device::PATH)]
    Read {
        /// What read(2) answered.
        source: io::Error,
    },
    /// The kernel module was built for other programs.
    #[error(
        "{} gives notices of {bytes} bytes and version {version}, which this program does not know",
        device::PATH
    )]
    Version {
        /// How many bytes were read.
        bytes: usize,
        /// The version that they have, or 0 where that can't be told.
        version: u32,
    },
    /// No fork leaves a VM so.
    #[error("{} tells of a fork that is not possible", device::PATH)]
    Outcome(#[source] OutcomeError),
}

impl Watch {
    /// Opens the device. Of forks that were made before, it does not tell.
    ///
    /// # Errors
    ///
    /// [`OpenError::NoDevice`], [`OpenError::DeviceForbidden`] or [`OpenError::OpenDevice`].
    pub fn open() -> Result<Self, OpenError> {
        Ok(Self { device: File::open(device::PATH).map_err(OpenError::of_device)? })
    }

    /// Waits for the next fork: read(2). Where there were several since the last one that was read, it is the
    /// latest.
    ///
    /// # Errors
    ///
    /// [`WatchError`] where the device can't be read, or what it says makes no sense.
    pub fn next(&self) -> Result<Notice, WatchError> {
        let mut bytes = [0; device::Notice::BYTES];
        loop {
            match (&self.device).read(&mut bytes) {
                Ok(read) => return Notice::from_bytes(&bytes[..read]),
                Err(source) if source.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(WatchError::Read { source }),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl Notice {
    /// The notice that was read, checked as the outcome of a fork is.
    fn from_bytes(bytes: &[u8]) -> Result<Self, WatchError> {
        let unknown = |version| WatchError::Version { bytes: bytes.len(), version };
        let notice =
            bytes.first_chunk().filter(|whole| whole.len() == bytes.len()).ok_or_else(|| unknown(0))?;
        let notice = device::Notice::from_bytes(notice);
        if (notice.bytes, notice.version) != head(device::Notice::BYTES) {
            return Err(unknown(notice.version));
        }
        let report = RawReport { identity: Identity::from_bytes(&notice.identity), ..RawReport::default() };
        Ok(Self { forks: notice.forks, fork: Fork::after_fork(&report).map_err(WatchError::Outcome)? })
    }
}

/// The fork's line.
impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fork.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmfork_abi::Role;

    use super::*;
    use crate::outcome::tests::child;

    /// What the module gives to read of the `forks`-th fork.
    fn notice(forks: u64, identity: Identity) -> [u8; device::Notice::BYTES] {
        let (bytes, version) = head(device::Notice::BYTES);
        device::Notice { bytes, version, forks, identity: identity.to_bytes() }.to_bytes()
    }

    #[test]
    fn a_notice_is_a_fork_and_its_number() {
        let notice = Notice::from_bytes(&notice(3, child())).unwrap();
        assert_eq!((notice.forks, notice.fork.role, notice.fork.index), (3, Role::Child, 2));
        assert!(notice.to_string().starts_with("child 2 of 4: web.2 (web)"));
        let json = serde_json::to_string(&notice).unwrap();
        assert!(json.starts_with(r#"{"forks":3,"role":"child","index":2,"#), "{json}");
    }

    #[test]
    fn notices_of_other_versions_are_not_guessed_at() {
        let whole = notice(3, child());
        for part in [&whole[..0], &whole[..527], &[&whole[..], &[0]].concat()] {
            assert!(matches!(Notice::from_bytes(part), Err(WatchError::Version { version: 0, .. })));
        }
        let newer = device::Notice { version: 2, ..device::Notice::from_bytes(&whole) };
        let error = Notice::from_bytes(&newer.to_bytes()).unwrap_err();
        let text = "/dev/vmfork gives notices of 528 bytes and version 2, which this program does not know";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn a_booted_vm_has_come_out_of_no_fork() {
        let booted = Notice::from_bytes(&notice(1, Identity { role: 0, index: 0, count: 0, ..child() }));
        assert!(matches!(booted, Err(WatchError::Outcome(OutcomeError::NotForked { .. }))));
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_a_notice_or_an_error(
            mut bytes in prop::collection::vec(any::<u8>(), 0..=device::Notice::BYTES),
            role in 0..4u32,
        ) {
            if bytes.len() == device::Notice::BYTES {
                bytes[..8].copy_from_slice(&notice(1, child())[..8]);
                bytes[16..20].copy_from_slice(&role.to_le_bytes());
            }
            if let Ok(notice) = Notice::from_bytes(&bytes) {
                prop_assert!(notice.fork.role != Role::Booted);
            }
        }
    }
}
