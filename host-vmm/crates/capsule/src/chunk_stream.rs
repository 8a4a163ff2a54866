//! Chunks on their way: a stream of records, each the number of a chunk, a length, and so many bytes.

use std::io;

use crate::{CHUNK_BYTES, Error};

/// Size of a record's head in bytes: number and length, little-endian.
const HEAD_BYTES: usize = 8;

/// Longest record's data in bytes: a chunk, and which of its pages are not zero.
const MAX_DATA_BYTES: u64 = CHUNK_BYTES + 8;

/// Longest record in bytes.
pub const MAX_BYTES: u64 = HEAD_BYTES as u64 + MAX_DATA_BYTES;

/// Appends the record of a chunk to others. Its data is what `make` appends.
///
/// # Errors
/// Where `make` fails, or has made more than there can be in a chunk.
pub fn append(
    records: &mut Vec<u8>,
    chunk: u32,
    make: impl FnOnce(&mut Vec<u8>) -> Result<(), Error>,
) -> io::Result<()> {
    let head = records.len();
    records.extend_from_slice(&chunk.to_le_bytes());
    records.extend_from_slice(&[0; size_of::<u32>()]);
    make(records).map_err(io::Error::other)?;
    let length = u32::try_from(records.len() - head - HEAD_BYTES).map_err(io::Error::other)?;
    records[head + size_of::<u32>()..head + HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(())
}

/// Decoder of a stream: puts records together again from pieces of any size.
#[derive(Debug, Default)]
pub struct ChunkDecoder {
    /// What has come of a record of which the rest is on its way.
    begun: Vec<u8>,
}

impl ChunkDecoder {
    /// Takes a piece in, and gives chunk and data of each record that is whole now to `take`.
    ///
    /// # Errors
    /// Where a record is longer than a chunk, or `take` fails.
    pub fn push(
        &mut self,
        piece: &[u8],
        mut take: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = piece;
        while !rest.is_empty() {
            if self.begun.is_empty()
                && let Some((chunk, data)) = whole(rest)?
            {
                take(chunk, data)?;
                rest = &rest[HEAD_BYTES + data.len()..];
                continue;
            }
            let (own, behind) = rest.split_at(missing(&self.begun)?.min(rest.len()));
            self.begun.extend_from_slice(own);
            rest = behind;
            if let Some((chunk, data)) = whole(&self.begun)? {
                take(chunk, data)?;
                self.begun.clear();
            }
        }
        Ok(())
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// Where that is in the middle of a record.
    pub fn finish(self) -> io::Result<()> {
        if self.begun.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// Chunk and length of the record that begins here, where its head is there.
fn head(bytes: &[u8]) -> io::Result<Option<(u32, usize)>> {
    let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
    let word = |from: usize| u32::from_le_bytes([head[from], head[from + 1], head[from + 2], head[from + 3]]);
    let (chunk, length) = (word(0), word(4));
    if u64::from(length) > MAX_DATA_BYTES {
        return Err(io::Error::other(format!("a record of {length} bytes is longer than a chunk")));
    }
    Ok(Some((chunk, usize::try_from(length).map_err(io::Error::other)?)))
}

/// Chunk and data of the record that begins here, where all of it is there.
fn whole(bytes: &[u8]) -> io::Result<Option<(u32, &[u8])>> {
    let Some((chunk, length)) = head(bytes)? else { return Ok(None) };
    Ok(bytes.get(HEAD_BYTES..HEAD_BYTES + length).map(|data| (chunk, data)))
}

/// How many bytes are missing of a record of which these are there; or of its head, as long as that is not
/// there.
fn missing(begun: &[u8]) -> io::Result<usize> {
    Ok(head(begun)?.map_or(HEAD_BYTES, |(_, length)| HEAD_BYTES + length) - begun.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn records_survive_being_cut(
            records in proptest::collection::vec((any::<u32>(), proptest::collection::vec(any::<u8>(), 0..50)), 0..10),
            piece in 1..40usize,
        ) {
            let mut bytes = Vec::new();
            for (chunk, data) in &records {
                append(&mut bytes, *chunk, |all| { all.extend_from_slice(data); Ok(()) }).unwrap();
            }
            let (mut parser, mut found) = (ChunkDecoder::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                parser.push(piece, |chunk, data| { found.push((chunk, data.to_vec())); Ok(()) }).unwrap();
            }
            parser.finish().unwrap();
            prop_assert_eq!(found, records);
        }

        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut parser = ChunkDecoder::default();
            drop(parser.push(&bytes, |_, _| Ok(())));
            prop_assert!(parser.begun.len() <= bytes.len());
        }
    }

    #[test]
    fn what_is_too_long_or_cut_off_is_refused() {
        let long = [0u32.to_le_bytes(), u32::MAX.to_le_bytes()].concat();
        assert!(ChunkDecoder::default().push(&long, |_, _| Ok(())).is_err());
        let mut parser = ChunkDecoder::default();
        let cut = [1u32.to_le_bytes(), 9u32.to_le_bytes(), [7; 4]].concat();
        parser.push(&cut, |_, _| panic!("it is not whole")).unwrap();
        assert!(parser.finish().is_err());
    }
}
