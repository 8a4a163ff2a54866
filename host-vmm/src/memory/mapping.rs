//! One address range that holds a guest's memory for as long as the VM lives, whatever is mapped into it.

use std::{
    ffi::c_void,
    fs::File,
    num::NonZeroUsize,
    os::fd::{AsFd, BorrowedFd},
    ptr::NonNull,
    sync::atomic::AtomicU32,
};

use nix::{
    libc::off_t,
    sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};

use super::Error;

/// Alignment of a mapping in bytes: a huge page of the guest's memory is then one of this process's too.
const ALIGNMENT: usize = 2 << 20;

/// Bytes that are copied at once.
const WORD: usize = 64;

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
    /// Reserves `bytes` bytes, aligned to 2 MiB, with nothing mapped (mmap PROT_NONE).
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
        let (words, rest) = bytes.as_chunks_mut::<WORD>();
        let rest_at = at + words.len() * WORD;
        for (offset, word) in (at..).step_by(WORD).zip(words) {
            // SAFETY: the address lies within the mapping, as just checked.
            let address = unsafe { self.start().byte_add(offset) };
            // SAFETY: the word is mapped, and need not be aligned in an array of bytes; what the guest writes meanwhile is read or not.
            *word = unsafe { address.cast::<[u8; WORD]>().read_volatile() };
        }
        for (offset, byte) in (rest_at..).zip(rest) {
            // SAFETY: as above.
            let address = unsafe { self.start().byte_add(offset) };
            // SAFETY: as above.
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
        let (words, rest) = bytes.as_chunks::<WORD>();
        for (offset, word) in (at..).step_by(WORD).zip(words) {
            // SAFETY: the address lies within the mapping, as just checked.
            let address = unsafe { self.start().byte_add(offset) };
            // SAFETY: the word is mapped; no Rust reference into the mapping exists.
            unsafe { address.cast::<[u8; WORD]>().write_volatile(*word) };
        }
        for (offset, byte) in (at + words.len() * WORD..).zip(rest) {
            // SAFETY: as above.
            let address = unsafe { self.start().byte_add(offset) };
            // SAFETY: as above.
            unsafe { address.write_volatile(*byte) };
        }
        Ok(())
    }

    /// A word of the mapping that other threads and processes use too. All of the range must be mapped writable.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the word is not within the mapping, or not aligned.
    pub fn word(&self, at: usize) -> Result<&AtomicU32, Error> {
        self.check(at, size_of::<AtomicU32>())?;
        if !at.is_multiple_of(align_of::<AtomicU32>()) {
            return Err(Error::Invalid("a word is not aligned"));
        }
        // SAFETY: the address lies within the mapping, as just checked.
        let address = unsafe { self.start().byte_add(at) };
        // SAFETY: the word is mapped and aligned, lives as long as `self`, and everybody accesses it atomically.
        Ok(unsafe { AtomicU32::from_ptr(address.cast().as_ptr()) })
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
