//! /dev/vmfork, past the library: with arguments that the library would not give.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, RawFd},
};

use nix::{errno::Errno, libc};
use vmfork_abi::{
    Identity, ListedCopy,
    device::{self, ForkArguments, Notice, StatusArguments},
    pad_text,
};

/// Room for the copies that a test looks at.
pub(crate) const ROOM: usize = 16;

/// Opens the device.
pub(crate) fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(device::PATH)
}

/// Makes an ioctl, and returns the kernel's answer.
pub(crate) fn control(fd: RawFd, number: u32, argument: *mut u8) -> nix::Result<()> {
    // SAFETY: the argument is either memory of the size that the number says, or the test's business is that
    // it is not: the kernel checks each address, and the callers hand in none that belongs to anything else.
    let result = unsafe { libc::ioctl(fd, libc::c_ulong::from(number), argument) };
    Errno::result(result).map(drop)
}

/// A size as arguments begin with it.
pub(crate) fn size(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// Arguments as they should be.
pub(crate) fn fork_arguments(count: u32) -> ForkArguments {
    ForkArguments {
        bytes: size(ForkArguments::BYTES),
        version: device::VERSION,
        count,
        vm_type: pad_text("web").unwrap_or_default(),
        ..Default::default()
    }
}

/// What a fork has told its caller.
#[derive(Debug)]
pub(crate) struct Forked {
    pub(crate) identity: Identity,
    pub(crate) listed: u32,
    pub(crate) copies: Vec<ListedCopy>,
}

/// Why there was no fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) errno: Errno,
    /// The VMM's code.
    pub(crate) code: u32,
}

/// Makes a fork.
pub(crate) fn fork(file: &File, arguments: ForkArguments) -> Result<Forked, Refused> {
    let mut room = vec![0; ROOM * ListedCopy::BYTES];
    let asked = ForkArguments {
        copies_address: room.as_mut_ptr() as u64,
        copies_room: u32::try_from(ROOM).unwrap_or(0),
        ..arguments
    };
    let mut bytes = asked.to_bytes();
    let result = control(file.as_raw_fd(), device::FORK, bytes.as_mut_ptr());
    let ForkArguments { error, listed, identity, .. } = ForkArguments::from_bytes(&bytes);
    result.map_err(|errno| Refused { errno, code: error })?;
    let copies = room.chunks_exact(ListedCopy::BYTES).take(listed as usize);
    let copies = copies.filter_map(|copy| Some(ListedCopy::from_bytes(copy.first_chunk()?))).collect();
    Ok(Forked { identity: Identity::from_bytes(&identity), listed, copies })
}

/// Asks for the state.
pub(crate) fn status(file: &File) -> nix::Result<StatusArguments> {
    let asked = StatusArguments {
        bytes: size(StatusArguments::BYTES),
        version: device::VERSION,
        ..Default::default()
    };
    let mut bytes = asked.to_bytes();
    control(file.as_raw_fd(), device::STATUS, bytes.as_mut_ptr())?;
    Ok(StatusArguments::from_bytes(&bytes))
}

/// Asks who this VM is.
pub(crate) fn identity(file: &File) -> nix::Result<Identity> {
    let asked = Notice { bytes: size(Notice::BYTES), version: device::VERSION, ..Default::default() };
    let mut bytes = asked.to_bytes();
    control(file.as_raw_fd(), device::IDENTITY, bytes.as_mut_ptr())?;
    Ok(Identity::from_bytes(&Notice::from_bytes(&bytes).identity))
}
