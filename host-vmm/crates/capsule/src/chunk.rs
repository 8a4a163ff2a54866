//! A chunk of a layer's file: 256 KiB, of which only the pages that are not zero are kept, sent and written,
//! one behind another.

use std::{fs::File, iter, ops::Range, os::unix::fs::FileExt};

use serde::{Deserialize, Serialize};
use types::PAGE_BYTES;

use super::Error;

/// Pages of a chunk.
pub const CHUNK_PAGES: u64 = 64;

/// Bytes of a chunk.
pub const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_BYTES;

/// The same for what is in memory.
const PAGE: usize = 4096;
const CHUNK: usize = 64 * PAGE;
/// Pages that are read at once where it is not known which of them are zero.
const READ_PAGES: usize = 8;
const _: () = assert!(PAGE as u64 == PAGE_BYTES && CHUNK as u64 == CHUNK_BYTES);

/// A chunk to which nobody has written.
static ZEROES: [u8; CHUNK] = [0; CHUNK];

/// A BLAKE3 digest.
pub type Digest = [u8; 32];

/// A chunk of a layer's file that is not all zero bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Where it is: in units of a chunk, from the start of the file.
    pub number: u32,
    /// Which of its pages are not zero, the first one in the lowest bit.
    pub pages: u64,
    /// Digest of all of its bytes, the zero ones too.
    pub digest: Digest,
}

impl Chunk {
    /// The chunk with this number, of so many bytes, whose pages that are not zero are said to be these.
    ///
    /// # Errors
    /// [`Error::Invalid`] where they are others, or none of this chunk.
    pub fn of(number: u32, pages: u64, data: &[u8], bytes: u64) -> Result<Self, Error> {
        check(pages, data, bytes)?;
        let mut hasher = blake3::Hasher::new();
        let (mut at, mut rest) = (0, data);
        for run in runs(pages) {
            let (own, behind) = rest.split_at(run.len());
            hasher.update(&ZEROES[at..run.start]).update(own);
            (at, rest) = (run.end, behind);
        }
        let end = usize::try_from(bytes).unwrap_or(CHUNK).min(CHUNK);
        hasher.update(&ZEROES[at..end]);
        Ok(Self { number, pages, digest: hasher.finalize().into() })
    }

    /// Offset in the layer's file in bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.number) * CHUNK_BYTES
    }

    /// Size of its pages that are not zero, in bytes.
    pub fn data_bytes(&self) -> u64 {
        u64::from(self.pages.count_ones()) * PAGE_BYTES
    }

    /// Reads these pages from the layer's file, and appends them to `data`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, file: &File, data: &mut Vec<u8>) -> Result<(), Error> {
        for run in runs(self.pages) {
            append(file, self.offset() + run.start as u64, run.len(), data)?;
        }
        Ok(())
    }

    /// Writes these pages to the layer's file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, file: &File, data: &[u8]) -> Result<(), Error> {
        write(file, self.offset(), self.pages, data)
    }
}

/// Checks whether this can be what is in those pages of a chunk of so many bytes that are not zero.
fn check(pages: u64, data: &[u8], bytes: u64) -> Result<(), Error> {
    if data.len() as u64 != u64::from(pages.count_ones()) * PAGE_BYTES {
        return Err(Error::Invalid("a chunk has too few or too many pages"));
    }
    if u64::from(u64::BITS - pages.leading_zeros()) * PAGE_BYTES > bytes {
        return Err(Error::Invalid("a chunk reaches out of its layer"));
    }
    if data.chunks(PAGE).any(is_zero) {
        return Err(Error::Invalid("other pages of a chunk are zero than it says"));
    }
    Ok(())
}

fn write(file: &File, offset: u64, pages: u64, data: &[u8]) -> Result<(), Error> {
    let mut rest = data;
    for run in runs(pages) {
        let (own, behind) = rest.split_at(run.len().min(rest.len()));
        let written = file.write_all_at(own, offset + run.start as u64);
        written.map_err(|error| Error::Io("write to memory", error))?;
        rest = behind;
    }
    Ok(())
}

/// Writes those pages of a piece of a layer's file that are not zero, as [`read_piece`] has read them.
///
/// # Errors
/// [`Error::Invalid`] where they are others, or none of this piece; [`Error::Io`].
pub(super) fn write_piece(
    file: &File,
    offset: u64,
    bytes: u64,
    pages: u64,
    data: &[u8],
) -> Result<(), Error> {
    check(pages, data, bytes)?;
    write(file, offset, pages, data)
}

/// Reads a piece of a layer's file, and appends those of its pages that are not zero to `data`. Says which
/// these are.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn read_piece(file: &File, offset: u64, bytes: u64, data: &mut Vec<u8>) -> Result<u64, Error> {
    let bytes = usize::try_from(bytes).unwrap_or(CHUNK).min(CHUNK);
    // Piece by piece: new memory has to be made page by page, and little of a chunk may be kept.
    let (mut piece, mut pages) = ([0; READ_PAGES * PAGE], 0u64);
    for at in (0..bytes).step_by(piece.len()) {
        let content = &mut piece[..(bytes - at).min(READ_PAGES * PAGE)];
        file.read_exact_at(content, offset + at as u64).map_err(|error| Error::Io("read a layer", error))?;
        let found = pages_in(content);
        for run in runs(found) {
            data.extend_from_slice(&content[run.start..run.end.min(content.len())]);
        }
        pages |= found << (at / PAGE);
    }
    Ok(pages)
}

fn append(file: &File, offset: u64, bytes: usize, data: &mut Vec<u8>) -> Result<(), Error> {
    let start = data.len();
    data.resize(start + bytes, 0);
    file.read_exact_at(&mut data[start..], offset).map_err(|error| Error::Io("read a layer", error))
}

/// Which pages of a chunk are not zero.
fn pages_in(content: &[u8]) -> u64 {
    (0..).zip(content.chunks(PAGE)).map(|(bit, page)| u64::from(!is_zero(page)) << bit).sum()
}

/// The C library compares as fast as memory is read.
fn is_zero(page: &[u8]) -> bool {
    *page == ZEROES[..page.len()]
}

/// Where in a chunk these pages are, in bytes: those that lie side by side together.
fn runs(pages: u64) -> impl Iterator<Item = Range<usize>> {
    let mut end = 0;
    iter::from_fn(move || {
        let rest = pages.unbounded_shr(end);
        if rest == 0 {
            return None;
        }
        let start = end + rest.trailing_zeros();
        end = start + pages.unbounded_shr(start).trailing_ones();
        Some(start as usize * PAGE..end as usize * PAGE)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use vmm::memory;

    proptest! {
        #[test]
        fn runs_are_the_pages(pages: u64) {
            let all = runs(pages).flat_map(|run| run.step_by(PAGE)).map(|at| 1u64 << (at / PAGE));
            prop_assert_eq!(all.sum::<u64>(), pages);
            let ranges: Vec<_> = runs(pages).collect();
            prop_assert!(ranges.is_sorted_by(|one, next| one.end < next.start));
        }

        #[test]
        fn what_was_read_is_written_as_it_was(content in proptest::collection::vec(0..2u8, 1..65)) {
            let bytes: Vec<u8> = content.iter().flat_map(|&byte| iter::repeat_n(byte, PAGE)).collect();
            let from = memory::sealed("test", &bytes).unwrap();
            let mut data = vec![9];
            let pages = read_piece(&from, 0, bytes.len() as u64, &mut data).unwrap();
            let chunk = Chunk::of(0, pages, &data[1..], bytes.len() as u64).unwrap();
            prop_assert_eq!(chunk.digest, *blake3::hash(&bytes).as_bytes());
            let mut again = vec![9];
            chunk.read(&from, &mut again).unwrap();
            prop_assert_eq!(&again, &data);
            let to = memory::unresizable("test", bytes.len() as u64).unwrap();
            chunk.write(&to, &data[1..]).unwrap();
            let mut written = vec![7; bytes.len()];
            to.read_exact_at(&mut written, 0).unwrap();
            prop_assert_eq!(written, bytes);
        }
    }

    #[test]
    fn other_pages_are_refused() {
        let page = [1; PAGE];
        assert!(Chunk::of(0, 1 << 63, &page, CHUNK_BYTES).is_ok());
        assert!(Chunk::of(0, 0, &[], CHUNK_BYTES).is_ok());
        for (pages, data, bytes) in [
            (1, &page[1..], CHUNK_BYTES),
            (3, &page[..], CHUNK_BYTES),
            (0, &page[..], CHUNK_BYTES),
            (2, &page[..], PAGE_BYTES),
            (1 << 63, &page[..], CHUNK_BYTES - PAGE_BYTES),
            (1, &ZEROES[..PAGE], CHUNK_BYTES),
        ] {
            assert!(matches!(Chunk::of(0, pages, data, bytes), Err(Error::Invalid(_))), "{pages:x} {bytes}");
        }
    }
}
