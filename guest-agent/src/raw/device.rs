//! The kernel module's device: its ioctls.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use vmfork_abi::ListedCopy;
use vmfork_abi::device::{FORK, ForkArguments, IDENTITY, Notice, PATH, STATUS, StatusArguments, VERSION};

nix::ioctl_readwrite_bad!(fork, FORK, ForkArguments);
nix::ioctl_readwrite_bad!(status, STATUS, StatusArguments);
nix::ioctl_readwrite_bad!(identity, IDENTITY, Notice);

/// One copy, as the kernel writes it.
pub(crate) type CopyBytes = [u8; ListedCopy::BYTES];

/// The device, opened to ask it.
#[derive(Debug)]
pub(crate) struct DeviceFile {
    device: File,
    may_fork: bool,
}

impl DeviceFile {
    /// Opens [`PATH`], for reading alone where it may not be written.
    pub(crate) fn open() -> io::Result<Self> {
        let open = |may_fork| {
            OpenOptions::new().read(true).write(may_fork).open(PATH).map(|device| Self { device, may_fork })
        };
        match open(true) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => open(false),
            result => result,
        }
    }

    /// Whether the module takes a fork from this file.
    pub(crate) fn may_fork(&self) -> bool {
        self.may_fork
    }

    /// Asks for [`FORK`], with room for these copies, and has `arguments` be the answer, also where there is
    /// an error.
    pub(crate) fn fork(&self, arguments: &mut ForkArguments, copies: &mut [CopyBytes]) -> nix::Result<()> {
        (arguments.bytes, arguments.version) = head(ForkArguments::BYTES);
        (arguments.copies_address, arguments.copies_room) = room(copies);
        // SAFETY: the kernel reads and writes one such struct, and writes copies where the room for them is,
        // which is borrowed for that.
        unsafe { fork(self.device.as_raw_fd(), arguments) }.map(drop)
    }

    /// Asks for [`STATUS`], with room for these copies.
    pub(crate) fn status(&self, copies: &mut [CopyBytes]) -> nix::Result<StatusArguments> {
        let mut arguments = StatusArguments::default();
        (arguments.bytes, arguments.version) = head(StatusArguments::BYTES);
        (arguments.copies_address, arguments.copies_room) = room(copies);
        // SAFETY: as in `fork`.
        unsafe { status(self.device.as_raw_fd(), &raw mut arguments) }?;
        Ok(arguments)
    }

    /// Asks for [`IDENTITY`].
    pub(crate) fn identity(&self) -> nix::Result<Notice> {
        let mut notice = Notice::default();
        (notice.bytes, notice.version) = head(Notice::BYTES);
        // SAFETY: the kernel reads and writes one such struct.
        unsafe { identity(self.device.as_raw_fd(), &raw mut notice) }?;
        Ok(notice)
    }
}

/// Size and version, with which every argument and notice of so many bytes begins.
#[allow(
    clippy::cast_possible_truncation,
    reason = "checked where the requests are numbered: at most 14 bits"
)]
pub(crate) const fn head(bytes: usize) -> (u32, u32) {
    (bytes as u32, VERSION)
}

/// Address and number of the copies that fit into `copies`; more than can be counted are not told of.
fn room(copies: &mut [CopyBytes]) -> (u64, u32) {
    (copies.as_mut_ptr().expose_provenance() as u64, u32::try_from(copies.len()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_where_copies_fit() {
        let mut copies = [[0; ListedCopy::BYTES]; 3];
        let address = copies.as_ptr().addr() as u64;
        assert_eq!(room(&mut copies), (address, 3));
        assert_eq!(room(&mut []).1, 0);
    }

    #[test]
    fn arguments_begin_with_size_and_version() {
        assert_eq!(head(ForkArguments::BYTES), (592, 1));
    }

    #[test]
    fn another_file_knows_no_such_request() {
        let other = DeviceFile { device: File::open("/dev/null").unwrap(), may_fork: false };
        assert_eq!(other.fork(&mut ForkArguments::default(), &mut []), Err(nix::errno::Errno::ENOTTY));
        assert_eq!(other.status(&mut []), Err(nix::errno::Errno::ENOTTY));
        assert_eq!(other.identity(), Err(nix::errno::Errno::ENOTTY));
    }
}
