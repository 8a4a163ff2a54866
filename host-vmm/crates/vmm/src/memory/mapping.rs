//! One address range that holds a guest's memory for as long as the VM lives, whatever is mapped into it.
//!
//! A range is reserved by this module's own books, in a window of the address space where the kernel puts
//! nothing by itself, and *not* by an inaccessible mapping. To map over an existing mapping means to unmap it
//! first, and where the range is a memory slot already, KVM then looks at each of the guest's pages, mapped
//! or not: 105 us for 512 MiB, and in proportion, where it shadows page tables (measured). To map into a hole
//! takes 7 us.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    fs::File,
    num::NonZeroUsize,
    ops::Range,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    ptr::NonNull,
    sync::{Mutex, atomic::AtomicU32},
    thread,
    time::{Duration, Instant},
};

use base::sync::lock;
use nix::{
    libc::off_t,
    sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap},
};

use super::Error;

/// Addresses for mappings. The kernel places a process's mappings downwards from the stack, and where that
/// room is used up, upwards from a third of the address space, 0x2aaa_aaaa_a000 (kernel source,
/// TASK_UNMAPPED_BASE).
const WINDOW: Range<usize> = 0x2000_0000_0000..0x2a00_0000_0000;

/// Alignment of a mapping in bytes: a huge page of the guest's memory is then one of this process's too.
const ALIGNMENT: usize = 2 << 20;

/// Bytes that are unmapped at once where others are not to be held up: nothing else can be mapped meanwhile.
const UNMAPPED_AT_ONCE: usize = 2 << 20;

/// Most bytes that are unmapped at once on a busy host, which takes 8 ms (measured).
const MOST_UNMAPPED_AT_ONCE: usize = 128 << 20;

/// For how long others may map something then. Without it they get no turn for milliseconds (measured).
const INTERLUDE: Duration = Duration::from_micros(50);

/// Pause for which [`UNMAPPED_AT_ONCE`] bytes more are unmapped at once: 6 % of that time. On a busy host a
/// pause lasts until the thread gets a processor, and 512 MiB in the smallest pieces take 13 s (measured, 18
/// threads on two of them).
const LONG_INTERLUDE: Duration = Duration::from_millis(2);

/// A private view of a file.
const PRIVATE: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);

/// Bytes that are copied at once.
const WORD: usize = size_of::<u64>();

/// The ranges that are taken: first address, and the first one behind it.
static TAKEN: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// A reserved range of this process's addresses. Nothing is mapped in it at first; what was is unmapped when
/// this is dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: a Mapping is an address range, not a borrow of what lies in it; every access goes through raw
// pointers.
unsafe impl Send for Mapping {}
// SAFETY: as above; the methods that change what is mapped change no Rust object.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `bytes` bytes, aligned to 2 MiB.
    ///
    /// # Errors
    /// [`Error::Addresses`] where there is no such range.
    pub fn reserve(bytes: usize) -> Result<Self, Error> {
        let mut taken = lock(&TAKEN);
        let mut start = WINDOW.start;
        for (&next, &end) in &*taken {
            if start.checked_add(bytes).is_none_or(|end| end <= next) {
                break;
            }
            start = end.next_multiple_of(ALIGNMENT);
        }
        let end = start.checked_add(bytes).filter(|end| bytes > 0 && *end <= WINDOW.end);
        let range = end.zip(NonNull::new(std::ptr::without_provenance_mut(start)));
        let (end, address) = range.ok_or(Error::Addresses { bytes })?;
        taken.insert(start, end);
        Ok(Self { start: address, bytes })
    }

    /// First address.
    pub fn start(&self) -> NonNull<u8> {
        self.start.cast()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Maps the whole of `file` shared, where nothing is mapped yet: what is written here is written to the
    /// file.
    ///
    /// # Errors
    /// [`Error::Map`] where mmap fails.
    pub fn map_shared(&self, file: &File) -> Result<(), Error> {
        self.map(0, self.bytes, file.as_fd(), 0, MapFlags::MAP_SHARED | MapFlags::MAP_FIXED_NOREPLACE)
    }

    /// Maps `bytes` bytes of `file` from `file_offset` at `at`, where nothing is mapped yet, private: a page
    /// is copied when it is first written to.
    ///
    /// # Errors
    /// [`Error::Map`] where mmap fails, [`Error::Invalid`] where the piece is not within the range.
    pub fn map_private(&self, at: usize, bytes: usize, file: &File, file_offset: u64) -> Result<(), Error> {
        self.map(at, bytes, file.as_fd(), file_offset, PRIVATE | MapFlags::MAP_FIXED_NOREPLACE)
    }

    /// As [`Mapping::map_private`], but takes the place of what is mapped there.
    ///
    /// # Errors
    /// As there.
    pub(super) fn map_over(
        &self,
        at: usize,
        bytes: usize,
        file: &File,
        file_offset: u64,
    ) -> Result<(), Error> {
        self.map(at, bytes, file.as_fd(), file_offset, PRIVATE | MapFlags::MAP_FIXED)
    }

    /// Copies bytes out of the mapping, each read once. All of the range must be mapped.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the range is not within the mapping.
    pub fn read(&self, at: usize, bytes: &mut [u8]) -> Result<(), Error> {
        self.check(at, bytes.len())?;
        let in_words = if at.is_multiple_of(WORD) { bytes.len() / WORD * WORD } else { 0 };
        let (words, rest) = bytes.split_at_mut(in_words);
        let rest_at = at + words.len();
        for (offset, word) in (at..).step_by(WORD).zip(words.as_chunks_mut::<WORD>().0) {
            // SAFETY: the address lies within the mapping, as just checked.
            let address = unsafe { self.start().byte_add(offset) };
            // SAFETY: the word is mapped and aligned, since the mapping is; what the guest writes meanwhile
            // is read or not.
            *word = unsafe { address.cast::<u64>().read_volatile() }.to_ne_bytes();
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
        let in_words = if at.is_multiple_of(WORD) { bytes.len() / WORD * WORD } else { 0 };
        let (words, rest) = bytes.split_at(in_words);
        for (offset, word) in (at..).step_by(WORD).zip(words.as_chunks::<WORD>().0) {
            // SAFETY: the address lies within the mapping, as just checked.
            let address = unsafe { self.start().byte_add(offset) };
            // SAFETY: the word is mapped and aligned, since the mapping is; no Rust reference into the
            // mapping exists.
            unsafe { address.cast::<u64>().write_volatile(u64::from_ne_bytes(*word)) };
        }
        for (offset, byte) in (at + words.len()..).zip(rest) {
            // SAFETY: as above.
            let address = unsafe { self.start().byte_add(offset) };
            // SAFETY: as above.
            unsafe { address.write_volatile(*byte) };
        }
        Ok(())
    }

    /// Makes pages present and writable, whatever they hold (MADV_POPULATE_WRITE).
    ///
    /// # Errors
    /// [`Error::Invalid`] where the range is not within the mapping, [`Error::Map`] where there is no memory
    /// for it, or none is mapped.
    pub fn populate(&self, at: usize, bytes: usize) -> Result<(), Error> {
        self.check(at, bytes)?;
        let start = self.start.addr().get() + at;
        populate(start..start + bytes, Access::Write)
    }

    /// Writes bytes of this mapping to a file. All of them must be mapped, and nobody may write to them
    /// meanwhile.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the range is not within the mapping, [`Error::File`] where the file can't be
    /// written.
    pub fn write_to(&self, at: usize, bytes: usize, file: &File, file_offset: u64) -> Result<(), Error> {
        self.check(at, bytes)?;
        // SAFETY: the address lies within the mapping, as just checked.
        let start = unsafe { self.start().byte_add(at) };
        // SAFETY: the range is mapped, and nobody writes to it, which is the caller's part.
        let content = unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) };
        file.write_all_at(content, file_offset).map_err(|source| Error::File {
            operation: "write",
            name: "to copy memory to".to_owned(),
            source,
        })
    }

    /// A word of the mapping that other threads and processes use too. All of the range must be mapped
    /// writable.
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
        // SAFETY: the word is mapped and aligned, lives as long as `self`, and everybody accesses it
        // atomically.
        Ok(unsafe { AtomicU32::from_ptr(address.cast().as_ptr()) })
    }

    /// Takes down what is mapped, piece by piece, so that others can map something meanwhile: all at once
    /// takes 0.5 s for 8 GiB that were used (measured).
    pub fn take_down(self) {
        let (mut at, mut piece) = (0, UNMAPPED_AT_ONCE);
        while at < self.bytes {
            let bytes = piece.min(self.bytes - at);
            // SAFETY: the address lies within the range.
            let start = unsafe { self.start.byte_add(at) };
            // SAFETY: the range is this value's own, holds no Rust object, and nobody uses it any more.
            if let Err(errno) = unsafe { munmap(start, bytes) } {
                // Dropping it says what is lost.
                tracing::debug!(%errno, "munmap failed");
                return;
            }
            at += bytes;
            let began = Instant::now();
            thread::sleep(INTERLUDE);
            piece = next_piece(began.elapsed());
        }
    }

    fn check(&self, at: usize, bytes: usize) -> Result<(), Error> {
        let within = at.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        if within { Ok(()) } else { Err(Error::Invalid("an access reaches out of a mapping")) }
    }

    fn map(
        &self,
        at: usize,
        bytes: usize,
        fd: BorrowedFd<'_>,
        offset: u64,
        flags: MapFlags,
    ) -> Result<(), Error> {
        let fail = |source: nix::Error| Error::Map { what: "guest memory", bytes, source: source.into() };
        self.check(at, bytes)?;
        let length = NonZeroUsize::new(bytes).ok_or_else(|| fail(nix::Error::EINVAL))?;
        let offset = off_t::try_from(offset).map_err(|_| fail(nix::Error::EOVERFLOW))?;
        let address = NonZeroUsize::new(self.start.as_ptr() as usize + at);
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the piece is within this value's own range (checked above), in which there is no Rust
        // object.
        unsafe { mmap(address, length, protection, flags, fd, offset) }.map_err(fail)?;
        Ok(())
    }
}

/// Bytes that are unmapped at once after a pause of this length.
fn next_piece(paused: Duration) -> usize {
    let times = usize::try_from(paused.as_micros() / LONG_INTERLUDE.as_micros()).unwrap_or(usize::MAX);
    UNMAPPED_AT_ONCE.saturating_mul(times).clamp(UNMAPPED_AT_ONCE, MOST_UNMAPPED_AT_ONCE)
}

/// What pages are asked for to be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// To be read, or run.
    Read,
    /// To be written to.
    Write,
}

/// Makes pages of any mapping of this process present (MADV_POPULATE_READ, MADV_POPULATE_WRITE). What they
/// hold stays as it is. Linux can do that since 5.14; an older one makes each page when it is used, as
/// always.
///
/// # Errors
/// [`Error::Map`] where something of the range is not mapped, or not for this access.
pub fn populate(range: Range<usize>, access: Access) -> Result<(), Error> {
    let fail =
        |source: nix::Error| Error::Map { what: "touched memory", bytes: range.len(), source: source.into() };
    let start = NonNull::new(std::ptr::without_provenance_mut(range.start))
        .ok_or_else(|| fail(nix::Error::EINVAL))?;
    let advice = match access {
        Access::Read => MmapAdvise::MADV_POPULATE_READ,
        Access::Write => MmapAdvise::MADV_POPULATE_WRITE,
    };
    // SAFETY: it changes no content, and is an error where nothing is mapped.
    match unsafe { madvise(start, range.len(), advice) } {
        // The advice is unknown: the range is in whole pages, so that nothing else can be invalid.
        Ok(()) | Err(nix::Error::EINVAL) => Ok(()),
        Err(errno) => Err(fail(errno)),
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, holds no Rust object, and nobody uses it any more.
        if let Err(errno) = unsafe { munmap(self.start, self.bytes) } {
            tracing::error!(%errno, self.bytes, "munmap failed: the range is lost until this process ends");
            return;
        }
        lock(&TAKEN).remove(&self.start.addr().get());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn ranges_do_not_overlap_and_are_used_again() {
        let sizes = [4096, 3 << 20, 1 << 30, 4096];
        let ranges: Vec<_> = sizes.map(|bytes| Mapping::reserve(bytes).unwrap()).into();
        for (index, one) in ranges.iter().enumerate() {
            assert!(one.start().addr().get().is_multiple_of(ALIGNMENT));
            for other in &ranges[..index] {
                let (one_start, other_start) = (one.start().addr().get(), other.start().addr().get());
                assert!(one_start >= other_start + other.bytes || other_start >= one_start + one.bytes);
            }
        }
        assert!(Mapping::reserve(0).is_err());
        assert!(Mapping::reserve(usize::MAX).is_err());
        assert!(Mapping::reserve(WINDOW.len()).is_err(), "some of it is taken");
        let freed = ranges[2].start();
        drop(ranges);
        // Other tests reserve ranges meanwhile, but this large a one only here.
        assert!(Mapping::reserve(1 << 30).unwrap().start() <= freed);
    }

    #[test]
    fn a_memory_is_taken_down_in_fewer_pieces_where_the_host_is_busy() {
        let mib = |ms| next_piece(Duration::from_millis(ms)) >> 20;
        assert_eq!([0, 1, 4, 100, 1000].map(mib), [2, 2, 4, 100, 128]);
        assert_eq!(next_piece(Duration::MAX), MOST_UNMAPPED_AT_ONCE);
        let mapping = Mapping::reserve(5 << 20).unwrap();
        mapping.map_shared(&memory::unsealed("test", 5 << 20).unwrap()).unwrap();
        mapping.take_down();
    }

    #[test]
    fn nothing_is_mapped_over_what_is_there() {
        let file = memory::unsealed("test", 8192).unwrap();
        let mapping = Mapping::reserve(8192).unwrap();
        mapping.map_private(4096, 4096, &file, 0).unwrap();
        assert!(matches!(mapping.map_shared(&file), Err(Error::Map { .. })));
        assert!(matches!(mapping.map_private(4096, 4096, &file, 0), Err(Error::Map { .. })));
        mapping.map_private(0, 4096, &file, 4096).unwrap();
        for (at, content) in [(4090, &b"both pages"[..]), (4088, &b"both pages, from a word on"[..])] {
            mapping.write(at, content).unwrap();
            let mut read = vec![0; content.len()];
            mapping.read(at, &mut read).unwrap();
            assert_eq!(read, content);
        }
        assert!(matches!(mapping.map_private(4096, 8192, &file, 0), Err(Error::Invalid(_))));
    }
}
