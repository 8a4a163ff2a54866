//! Chunks on their way: a stream of records, each the number of a chunk, a length, and so many bytes.

use std::io;

use hyper::body::Bytes;

use crate::capsule::CHUNK_BYTES;

/// Size of a record's head in bytes: number and length, little-endian.
const HEAD_BYTES: usize = 8;

/// Longest record's data in bytes: a chunk, and which of its pages are not zero.
const MAX_DATA_BYTES: u64 = CHUNK_BYTES + 8;

/// One chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its number.
    pub chunk: u32,
    /// Its pages that are not zero, one behind another.
    pub data: Vec<u8>,
}

impl Record {
    /// As it travels.
    pub fn into_bytes(self) -> Bytes {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.data.len());
        bytes.extend_from_slice(&self.chunk.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.data.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&self.data);
        bytes.into()
    }
}

/// Puts records together again from pieces of any size.
#[derive(Debug, Default)]
pub struct Records {
    buffer: Vec<u8>,
}

impl Records {
    /// Takes a piece in, and gives each record that is whole now to `take`.
    ///
    /// # Errors
    /// Where a record is longer than a chunk, or `take` fails.
    pub fn push(&mut self, piece: &[u8], mut take: impl FnMut(Record) -> io::Result<()>) -> io::Result<()> {
        self.buffer.extend_from_slice(piece);
        let mut at = 0;
        while let Some((head, rest)) = self.buffer[at..].split_at_checked(HEAD_BYTES) {
            let word = |from: usize| u32::from_le_bytes(head[from..from + 4].try_into().unwrap_or_default());
            let (chunk, length) = (word(0), word(4));
            if u64::from(length) > MAX_DATA_BYTES {
                return Err(io::Error::other(format!("a record of {length} bytes is longer than a chunk")));
            }
            let Some(data) = rest.get(..length as usize) else { break };
            take(Record { chunk, data: data.to_vec() })?;
            at += HEAD_BYTES + length as usize;
        }
        self.buffer.drain(..at);
        Ok(())
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// Where that is in the middle of a record.
    pub fn finish(self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
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
            let records: Vec<Record> = records.into_iter().map(|(chunk, data)| Record { chunk, data }).collect();
            let bytes: Vec<u8> = records.iter().cloned().flat_map(Record::into_bytes).collect();
            let (mut parser, mut found) = (Records::default(), Vec::new());
            for piece in bytes.chunks(piece) {
                parser.push(piece, |record| { found.push(record); Ok(()) }).unwrap();
            }
            parser.finish().unwrap();
            prop_assert_eq!(found, records);
        }

        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut parser = Records::default();
            drop(parser.push(&bytes, |_| Ok(())));
            prop_assert!(parser.buffer.len() <= bytes.len());
        }
    }

    #[test]
    fn what_is_too_long_or_cut_off_is_refused() {
        let long = [0u32.to_le_bytes(), u32::MAX.to_le_bytes()].concat();
        assert!(Records::default().push(&long, |_| Ok(())).is_err());
        let mut parser = Records::default();
        parser.push(&Record { chunk: 1, data: vec![7; 9] }.into_bytes()[..10], |_| panic!("it is not whole")).unwrap();
        assert!(parser.finish().is_err());
    }
}
