//! One address range that holds a guest's memory for as long as the VM lives, whatever is mapped into it.

use std::{
    ffi::c_void,
    fs::File,
    io,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd},
    ptr::NonNull,
};

use nix::{
    libc::off_t,
    sys::mman::{MRemapFlags, MapFlags, ProtFlags, mmap, mmap_anonymous, mremap, munmap},
};

use super::Error;

/// Alignment of a mapping in bytes: with both sides aligned to what one top-level page-table entry covers, `mremap` moves whole
/// subtrees of page tables (measured: 25 us for 8 GiB).
const ALIGNMENT: usize = 1 << 30;

/// A reserved range of this process's addresses. It is given back on drop.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: a Mapping is an address range, not a borrow of what lies in it; every access goes through raw pointers.
unsafe impl Send for Mapping {}
// SAFETY: as above; the methods that change what is mapped change no Rust object.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `bytes` bytes, aligned to 1 GiB, with nothing mapped (mmap PROT_NONE).
    ///
    /// # Errors
    /// [`Error::Map`] where the kernel has no such range.
    pub fn reserve(bytes: usize) -> Result<Self, Error> {
        let fail = |source: nix::Error| Error::Map { what: "a reserved range", bytes, source: source.into() };
        let wanted = NonZeroUsize::new(bytes + ALIGNMENT).ok_or_else(|| fail(nix::Error::EINVAL))?;
        // SAFETY: a new mapping at an address that the kernel chooses touches no existing one.
        let raw = unsafe {
            mmap_anonymous(None, wanted, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)
        }
        .map_err(fail)?;
        let before = raw.as_ptr().align_offset(ALIGNMENT);
        // SAFETY: `before` is less than ALIGNMENT, and the range is longer than that.
        let start = unsafe { raw.byte_add(before) };
        unmap(raw, before);
        // SAFETY: `start + bytes` is at most the end of the range, since `before <= ALIGNMENT`.
        unmap(unsafe { start.byte_add(bytes) }, ALIGNMENT - before);
        Ok(Self { start, bytes })
    }

    /// First address.
    pub fn start(&self) -> NonNull<u8> {
        self.start.cast()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Maps the whole of `file` shared: what is written here is written to the file.
    ///
    /// # Errors
    /// [`Error::Map`] where mmap fails.
    pub fn map_shared(&self, file: &File) -> Result<(), Error> {
        self.map(0, self.bytes, file.as_fd(), 0, MapFlags::MAP_SHARED)
    }

    /// Maps `bytes` bytes of `file` from `file_offset` at `at`, private: a page is copied when it is first written to.
    ///
    /// # Errors
    /// [`Error::Map`] where the piece is not within the mapping, or mmap fails.
    pub fn map_private(&self, at: usize, bytes: usize, file: &File, file_offset: u64) -> Result<(), Error> {
        self.map(at, bytes, file.as_fd(), file_offset, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)
    }

    /// Copies bytes out of the mapping, each read once. All of the range must be mapped.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the range is not within the mapping.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Error> {
        self.check(at, bytes.len())?;
        for (offset, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: the address lies within the mapping, as just checked.
            let address = unsafe { self.start().byte_add(at + offset) };
            // SAFETY: the address is mapped; a byte that the guest writes meanwhile is read before or after.
            *byte = unsafe { address.read_volatile() };
        }
        Ok(())
    }

    /// Copies bytes into the mapping. All of the range must be mapped.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the range is not within the mapping.
    pub fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Error> {
        self.check(at, bytes.len())?;
        for (offset, byte) in bytes.iter().enumerate() {
            // SAFETY: the address lies within the mapping, as just checked.
            let address = unsafe { self.start().byte_add(at + offset) };
            // SAFETY: the address is mapped; no Rust reference into the mapping exists.
            unsafe { address.write_volatile(*byte) };
        }
        Ok(())
    }

    fn check(&self, at: usize, bytes: usize) -> Result<(), Error> {
        let within = at.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        if within { Ok(()) } else { Err(Error::Invalid("an access reaches out of a mapping")) }
    }

    fn map(&self, at: usize, bytes: usize, fd: BorrowedFd<'_>, offset: u64, flags: MapFlags) -> Result<(), Error> {
        let fail = |source: nix::Error| Error::Map { what: "guest memory", bytes, source: source.into() };
        self.check(at, bytes)?;
        let length = NonZeroUsize::new(bytes).ok_or_else(|| fail(nix::Error::EINVAL))?;
        let offset = off_t::try_from(offset).map_err(|_| fail(nix::Error::EOVERFLOW))?;
        let address = NonZeroUsize::new(self.start.as_ptr() as usize + at);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: MAP_FIXED replaces only pages within this reserved range (checked above), which holds no Rust object.
        unsafe { mmap(address, length, protection, flags | MapFlags::MAP_FIXED, fd, offset) }.map_err(fail)?;
        Ok(())
    }

    /// Moves what is mapped here into `other`, a reserved range of the same size; this range is empty then (mremap).
    ///
    /// # Errors
    /// [`Error::Map`] where mremap fails; nothing has moved then.
    pub fn move_to(&self, other: &Self) -> Result<(), Error> {
        let fail = |source: io::Error| Error::Map { what: "moved guest memory", bytes: self.bytes, source };
        if other.bytes != self.bytes {
            return Err(fail(io::ErrorKind::InvalidInput.into()));
        }
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: both ranges are owned by a Mapping, are of one size, do not overlap, and hold no Rust object.
        unsafe { mremap(self.start, self.bytes, self.bytes, flags, Some(other.start)) }
            .map_err(|errno| fail(errno.into()))?;
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.start, self.bytes);
    }
}

fn unmap(start: NonNull<c_void>, bytes: usize) {
    if bytes == 0 {
        return;
    }
    // SAFETY: the callers pass pieces of a range that a Mapping owns or is about to, and that nobody uses any more.
    if let Err(errno) = unsafe { munmap(start, bytes) } {
        tracing::error!(%errno, bytes, "munmap failed: the range is lost until this process ends");
    }
}
