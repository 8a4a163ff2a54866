//! Faults on pages of a memory that is not all there yet (userfaultfd; kernel documentation,
//! admin-guide/mm/userfaultfd.rst).
//!
//! The memory's files are being filled by somebody else, by ordinary writes. Who touches a page that is not
//! in its file yet stands still, and the fault can be read here. Once the page is there, he is woken up,
//! looks again, and finds it. So nothing is ever copied into a view: what is there is the same for all views
//! of the image, and when all is there, it is an image like any other.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd},
};

use rustix::fs::{OFlags, fcntl_setfl};

use super::{Error, Mapping};

/// Where faults are had from, by those who may open it (since Linux 6.1).
const DEVICE: &str = "/dev/userfaultfd";

/// USERFAULTFD_IOC_NEW.
const NEW: libc::Ioctl = 0xaa00;

/// What `/proc` says that such a descriptor is.
const KIND: &str = "anon_inode:[userfaultfd]";

/// Faults that are read at once.
const AT_ONCE: usize = 16;

/// The kernel's structures (linux/userfaultfd.h).
mod abi {
    /// Version of the interface.
    pub(super) const API: u64 = 0xaa;
    /// Faults on pages that a shared memory file lacks.
    pub(super) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
    /// Faults on pages that are missing.
    pub(super) const REGISTER_MISSING: u64 = 1 << 0;
    /// The event that a fault is.
    pub(super) const EVENT_PAGE_FAULT: u8 = 0x12;

    /// `struct uffdio_api`.
    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    /// `struct uffdio_range`.
    #[repr(C)]
    #[derive(Debug, Default, Clone, Copy)]
    pub(super) struct Range {
        pub(super) start: u64,
        pub(super) bytes: u64,
    }

    /// `struct uffdio_register`.
    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct Register {
        pub(super) range: Range,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    /// Size of `struct uffd_msg`, whose first byte is the event; the address of a fault stands at
    /// [`ADDRESS`].
    pub(super) const MESSAGE_BYTES: usize = 32;
    pub(super) const ADDRESS: usize = 16;

    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    nix::ioctl_read!(unregister, 0xaa, 0x01, Range);
    nix::ioctl_read!(wake, 0xaa, 0x02, Range);
}

/// What faults are had from. It is opened once: a node can open nothing later.
///
/// # Errors
/// Where this kernel has none, or this user may not open it.
pub fn device() -> io::Result<File> {
    File::options().read(true).write(true).open(DEVICE)
}

/// Faults of one process.
#[derive(Debug)]
pub struct Faults(File);

impl Faults {
    /// Those of the calling process.
    ///
    /// # Errors
    /// [`Error::Faults`].
    pub fn of_this_process(device: &File) -> Result<Self, Error> {
        let fail = |errno: nix::Error| Error::Faults { operation: "get", source: errno.into() };
        // SAFETY: the call has no argument but flags, here O_CLOEXEC and O_NONBLOCK, and gives a new
        // descriptor or an error.
        let descriptor = unsafe { libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let descriptor = nix::Error::result(descriptor).map_err(fail)?;
        // SAFETY: the descriptor is new, and nobody else's.
        let file = unsafe { File::from_raw_fd(descriptor) };
        let mut api = abi::Api { api: abi::API, features: abi::FEATURE_MISSING_SHMEM, ..Default::default() };
        // SAFETY: the call reads and writes one struct that lives across it.
        unsafe { abi::api(file.as_raw_fd(), &raw mut api) }.map_err(fail)?;
        Ok(Self(file))
    }

    /// Those of another process, which has sent them.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is something else.
    pub fn from_file(file: File) -> Result<Self, Error> {
        let kind = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        if !kind.is_ok_and(|kind| kind.as_os_str() == KIND) {
            return Err(Error::Invalid("what should tell faults is something else"));
        }
        // Whoever reads them must never wait for one process, whatever that has sent.
        let set = fcntl_setfl(&file, OFlags::NONBLOCK);
        set.map_err(|errno| Error::Faults { operation: "read without waiting for", source: errno.into() })?;
        Ok(Self(file))
    }

    /// The descriptor, to be sent.
    pub fn file(&self) -> &File {
        &self.0
    }

    /// Has all faults in a mapping told here (UFFDIO_REGISTER).
    ///
    /// # Errors
    /// [`Error::Faults`].
    pub fn watch(&self, mapping: &Mapping) -> Result<(), Error> {
        let mut register = abi::Register { range: range(mapping), mode: abi::REGISTER_MISSING, ioctls: 0 };
        // SAFETY: the call reads and writes one struct that lives across it; the range is this process's own.
        let registered = unsafe { abi::register(self.0.as_raw_fd(), &raw mut register) };
        registered.map(drop).map_err(|errno| Error::Faults { operation: "watch for", source: errno.into() })
    }

    /// Has none told any more (UFFDIO_UNREGISTER): those who stand still look again.
    ///
    /// # Errors
    /// [`Error::Faults`].
    pub fn unwatch(&self, mapping: &Mapping) -> Result<(), Error> {
        let mut range = range(mapping);
        // SAFETY: the call reads one struct that lives across it.
        let unregistered = unsafe { abi::unregister(self.0.as_raw_fd(), &raw mut range) };
        unregistered
            .map(drop)
            .map_err(|errno| Error::Faults { operation: "end the watch for", source: errno.into() })
    }

    /// The addresses of faults that were told and not read yet, in the process that has them; none where
    /// there is none.
    ///
    /// # Errors
    /// [`Error::Faults`], also where the process is gone.
    pub fn read(&self) -> Result<Vec<u64>, Error> {
        let mut messages = [0; AT_ONCE * abi::MESSAGE_BYTES];
        let length = match (&self.0).read(&mut messages) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Vec::new()),
            Err(source) => return Err(Error::Faults { operation: "read", source }),
        };
        let messages = messages[..length].chunks_exact(abi::MESSAGE_BYTES);
        let faults = messages.filter(|message| message[0] == abi::EVENT_PAGE_FAULT);
        let address = |message: &[u8]| {
            let bytes = message[abi::ADDRESS..abi::ADDRESS + 8].try_into().unwrap_or_default();
            u64::from_ne_bytes(bytes)
        };
        Ok(faults.map(address).collect())
    }

    /// Wakes up who stands still at one of these addresses (UFFDIO_WAKE). Both are in whole pages.
    ///
    /// # Errors
    /// [`Error::Faults`].
    pub fn wake(&self, start: u64, bytes: u64) -> Result<(), Error> {
        let mut range = abi::Range { start, bytes };
        // SAFETY: the call reads one struct that lives across it, and changes no memory.
        let woken = unsafe { abi::wake(self.0.as_raw_fd(), &raw mut range) };
        woken.map(drop).map_err(|errno| Error::Faults { operation: "wake up after", source: errno.into() })
    }
}

impl AsFd for Faults {
    /// Readable while there are faults to read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn range(mapping: &Mapping) -> abi::Range {
    abi::Range { start: mapping.start().addr().get() as u64, bytes: mapping.bytes() as u64 }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, sync::Arc, thread};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::memory;

    const PAGE: usize = 4096;

    #[test]
    fn who_touches_a_missing_page_waits_for_it() {
        let device = match device() {
            Ok(device) => device,
            Err(error) => return eprintln!("SKIPPED: {DEVICE} can't be opened: {error}"),
        };
        let file = memory::unsealed("test", 4 * PAGE as u64).unwrap();
        file.write_all_at(&[1; PAGE], 0).unwrap();
        let mapping = Arc::new(Mapping::reserve(4 * PAGE).unwrap());
        mapping.map_private(0, 4 * PAGE, &file, 0).unwrap();
        let faults = Faults::of_this_process(&device).unwrap();
        faults.watch(&mapping).unwrap();
        let mut byte = [0];
        mapping.read(0, &mut byte).unwrap();
        assert_eq!(byte, [1], "what is there is had without a fault");
        assert!(faults.read().unwrap().is_empty());
        // One reads, and one writes.
        for (page, write) in [(1, false), (2, true)] {
            let reader = {
                let mapping = Arc::clone(&mapping);
                thread::spawn(move || {
                    let mut bytes = [0; 2];
                    if write {
                        mapping.write(page * PAGE, &[9]).unwrap();
                    }
                    mapping.read(page * PAGE, &mut bytes).unwrap();
                    bytes
                })
            };
            let sent = Faults::from_file(faults.file().try_clone().unwrap()).unwrap();
            let mut fds = [PollFd::new(sent.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)), Ok(1));
            let address = (mapping.start().addr().get() + page * PAGE) as u64;
            assert_eq!(sent.read().unwrap(), [address]);
            file.write_all_at(&[7; PAGE], (page * PAGE) as u64).unwrap();
            sent.wake(address, PAGE as u64).unwrap();
            assert_eq!(reader.join().unwrap(), [if write { 9 } else { 7 }, 7]);
        }
        // What was written is the view's own.
        let mut content = [0];
        file.read_exact_at(&mut content, 2 * PAGE as u64).unwrap();
        assert_eq!(content, [7]);
        faults.unwatch(&mapping).unwrap();
        mapping.read(3 * PAGE, &mut byte).unwrap();
        assert_eq!(byte, [0], "a hole is zero once nobody watches");
        assert!(Faults::from_file(file).is_err());
    }
}
