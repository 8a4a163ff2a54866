//! The first bytes of a capsule: they can be read, and told from other things, without reading more.

use types::PAGE_BYTES;

use super::Error;

/// What each capsule begins with.
const MAGIC: [u8; 8] = *b"VMFORKIM";

/// Version of the format that this program writes. It reads the one before it too.
pub const VERSION: u32 = 2;

/// Oldest version that this program reads.
pub const OLDEST_VERSION: u32 = 1;

/// Size of the header.
pub const HEADER_BYTES: usize = 128;

/// Where the memory begins in a file.
pub const DATA_OFFSET: u64 = PAGE_BYTES;

/// Longest description in bytes: a state, and 44 bytes for each 256 KiB of memory, which comes to a memory of
/// 256 GiB.
pub const MAX_DESCRIPTION_BYTES: u64 = 64 << 20;

/// The memory is compressed (zstd), each chunk by itself.
const COMPRESSED: u64 = 1 << 0;

/// What a capsule begins with.
///
/// ```text
///  0  magic                 24  size of the memory        64  digest of the description
///  8  version               32  size of the description   96  digest of the 96 bytes before
/// 12  size of the header    40  flags (from version 2 on)
/// 16  offset of the memory  48  zero
/// ```
///
/// Numbers are little-endian, sizes in bytes; digests are BLAKE3. The description has a digest of each chunk
/// of the memory, so that the digest of the description stands for all of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Version of the format.
    pub version: u32,
    /// Whether the memory is compressed.
    pub is_compressed: bool,
    /// Size of the memory, as it is stored, in bytes.
    pub data_bytes: u64,
    /// Size of the description in bytes; in a file, it stands behind the memory.
    pub description_bytes: u64,
    /// Digest of the description.
    pub description_digest: [u8; 32],
}

impl Header {
    /// The header of this version of the format.
    pub fn new(is_compressed: bool, data_bytes: u64, description: &[u8]) -> Self {
        let description_digest = blake3::hash(description).into();
        Self {
            version: VERSION,
            is_compressed,
            data_bytes,
            description_bytes: description.len() as u64,
            description_digest,
        }
    }

    /// As it stands in a file.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let size = u32::try_from(HEADER_BYTES).unwrap_or(0);
        let flags = if self.is_compressed { COMPRESSED } else { 0 };
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[12..16].copy_from_slice(&size.to_le_bytes());
        bytes[16..24].copy_from_slice(&DATA_OFFSET.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.data_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.description_bytes.to_le_bytes());
        bytes[40..48].copy_from_slice(&flags.to_le_bytes());
        bytes[64..96].copy_from_slice(&self.description_digest);
        let digest = blake3::hash(&bytes[..96]);
        bytes[96..].copy_from_slice(digest.as_bytes());
        bytes
    }

    /// The header that these bytes are.
    ///
    /// # Errors
    /// [`Error::NoCapsule`], [`Error::Version`], [`Error::Digest`] or [`Error::Invalid`], each for what it
    /// says.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        if bytes[..8] != MAGIC {
            return Err(Error::NoCapsule);
        }
        let version = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default());
        if !(OLDEST_VERSION..=VERSION).contains(&version) {
            return Err(Error::Version {
                what: "the capsule",
                found: version,
                oldest: OLDEST_VERSION,
                newest: VERSION,
            });
        }
        if blake3::hash(&bytes[..96]).as_bytes()[..] != bytes[96..] {
            return Err(Error::Digest("the header"));
        }
        let mut description_digest = [0; 32];
        description_digest.copy_from_slice(&bytes[64..96]);
        let (data_bytes, description_bytes) = (word(24), word(32));
        let is_compressed = version > OLDEST_VERSION && word(40) & COMPRESSED != 0;
        let header = Self { version, is_compressed, data_bytes, description_bytes, description_digest };
        // Whatever else is there is what a program of that version writes.
        if header.to_bytes() != *bytes {
            return Err(Error::Invalid("the header has fields that this version does not know"));
        }
        let is_aligned = is_compressed || data_bytes.is_multiple_of(PAGE_BYTES);
        if description_bytes > MAX_DESCRIPTION_BYTES || !is_aligned || header.file_bytes().is_none() {
            return Err(Error::Invalid("a size is out of range"));
        }
        Ok(header)
    }

    /// Size of header and description together, in bytes, where the header is there of what begins so.
    ///
    /// # Errors
    /// As [`Header::from_bytes`].
    pub fn length_of_head(bytes: &[u8]) -> Result<Option<usize>, Error> {
        let Some(header) = bytes.first_chunk() else { return Ok(None) };
        let description = usize::try_from(Self::from_bytes(header)?.description_bytes);
        Ok(Some(HEADER_BYTES.saturating_add(description.unwrap_or(usize::MAX))))
    }

    /// Checks that a description is the one of this header.
    ///
    /// # Errors
    /// [`Error::Length`] or [`Error::Digest`].
    pub fn check_description(&self, description: &[u8]) -> Result<(), Error> {
        if description.len() as u64 != self.description_bytes {
            return Err(Error::Length { found: description.len() as u64, expected: self.description_bytes });
        }
        if *blake3::hash(description).as_bytes() != self.description_digest {
            return Err(Error::Digest("the description"));
        }
        Ok(())
    }

    /// Size of a file with this header in bytes.
    pub fn file_bytes(&self) -> Option<u64> {
        DATA_OFFSET.checked_add(self.data_bytes)?.checked_add(self.description_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_changed_bit_is_found(at in 0..HEADER_BYTES, bit in 0..8u32, compressed: bool) {
            let header = Header::new(compressed, 8192, b"description");
            let mut bytes = header.to_bytes();
            prop_assert_eq!(Header::from_bytes(&bytes).unwrap(), header);
            bytes[at] ^= 1 << bit;
            prop_assert!(Header::from_bytes(&bytes).is_err());
        }
    }

    /// A header that somebody has made who knows how digests are made.
    fn forged(change: impl FnOnce(&mut [u8])) -> Result<Header, Error> {
        let mut bytes = Header::new(false, 0, b"").to_bytes();
        change(&mut bytes);
        let digest = blake3::hash(&bytes[..96]);
        bytes[96..].copy_from_slice(digest.as_bytes());
        Header::from_bytes(&bytes)
    }

    #[test]
    fn forged_headers_are_refused() {
        assert!(forged(|_| ()).is_ok());
        assert!(matches!(forged(|bytes| bytes[8] = 0), Err(Error::Version { found: 0, .. })));
        assert!(matches!(forged(|bytes| bytes[8] = 3), Err(Error::Version { found: 3, .. })));
        let changes: [(usize, u64); 6] =
            [(12, 0), (16, 0), (24, 1), (24, !0xfff), (32, MAX_DESCRIPTION_BYTES + 1), (40, 2)];
        for (at, word) in changes {
            let result = forged(|bytes| bytes[at..at + 8].copy_from_slice(&word.to_le_bytes()));
            assert!(matches!(result, Err(Error::Invalid(_))), "{at}: {word:#x}");
        }
        // What the version before had no meaning for has none in it.
        assert!(matches!(forged(|bytes| (bytes[8], bytes[40]) = (1, 1)), Err(Error::Invalid(_))));
    }
}
