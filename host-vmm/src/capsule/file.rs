//! An image at rest: one file that holds all that copies need.
//!
//! ```text
//! 0       header, 128 bytes, little-endian (see [`Header`]): can be read, and told from other things, without reading more
//! 4096    the pages of the layers that are not zero, one behind another
//! ...     the description (see [`Description`]): what is in which layer, and the state
//! ```
//!
//! Everything is covered by BLAKE3 digests: the header by its own, the description by one in the header, the pages by one in the
//! description. The header is written last, so that a file that was not finished is none.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{MAX_BYTES, codec};
use crate::{
    arch::layout::{MAX_RAM_BYTES, PAGE_BYTES},
    machine::{Config, VmIdentity},
    memory::{self, MAX_LAYERS},
};

/// What each file begins with.
const MAGIC: [u8; 8] = *b"VMFORKIM";

/// Version of the format.
const VERSION: u32 = 1;

const HEADER_BYTES: usize = 128;

/// Where the pages begin.
const DATA_OFFSET: u64 = PAGE_BYTES;

/// Longest description in bytes: the state, and 16 bytes a run of pages.
const MAX_DESCRIPTION_BYTES: u64 = 2 * MAX_BYTES as u64;

/// Bytes that are read at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// Why an image can't be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read or written.
    #[error("can't {0}")]
    Io(&'static str, #[source] io::Error),
    /// It is something else.
    #[error("the file holds no image of a VM")]
    NoImage,
    /// It is of another time.
    #[error("the file has version {found} of the format; this program reads version {VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// Its end is missing, or something follows.
    #[error("the file is {found} bytes long and should be {expected}: it was cut off, or not written to its end")]
    Length {
        /// How long it is.
        found: u64,
        /// How long it should be.
        expected: u64,
    },
    /// It was changed.
    #[error("the file was changed: {0} does not fit its digest")]
    Digest(&'static str),
    /// It was made by somebody who wanted to do harm.
    #[error("the file is not valid: {0}")]
    Invalid(&'static str),
    /// The description can't be coded.
    #[error("can't code the description")]
    Codec(#[from] codec::Error),
    /// There is no memory for a layer.
    #[error("can't make a layer")]
    Memory(#[from] memory::Error),
}

/// All that copies of an image need.
#[derive(Debug)]
pub struct Capsule {
    /// Its ID.
    pub id: Uuid,
    /// When it was made: nanoseconds since 1970 (UTC).
    pub created_ns: u64,
    /// Type of its copies.
    pub vm_type: String,
    /// The VM that it was made of.
    pub original: VmIdentity,
    /// Their shape.
    pub config: Config,
    /// Number of the guest's request that it was made for.
    pub seq: u64,
    /// What [`pack`](super::pack) gave.
    pub state: Vec<u8>,
    /// The files of the memory's layers, in the order in which `state` numbers them.
    pub files: Vec<File>,
}

/// The first bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    /// Size of the pages in bytes.
    data_bytes: u64,
    /// Size of the description in bytes; it stands behind the pages.
    description_bytes: u64,
    /// Digest of the description.
    description_digest: [u8; 32],
}

/// What a file's pages are, and all else.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    id: Uuid,
    created_ns: u64,
    vm_type: String,
    original: VmIdentity,
    config: Config,
    seq: u64,
    state: Vec<u8>,
    layers: Vec<LayerDescription>,
    /// Digest of all pages.
    data_digest: [u8; 32],
}

#[derive(Debug, Serialize, Deserialize)]
struct LayerDescription {
    /// Size of the layer's file in pages.
    pages: u64,
    /// Runs of pages that are not zero: first page, and how many.
    runs: Vec<(u64, u64)>,
}

impl Header {
    /// ```text
    ///  0  magic                 24  size of the pages         64  digest of the description
    ///  8  version               32  size of the description   96  digest of the 96 bytes before
    /// 12  size of the header    40  zero
    /// 16  offset of the pages
    /// ```
    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let size = u32::try_from(HEADER_BYTES).unwrap_or(0);
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&size.to_le_bytes());
        bytes[16..24].copy_from_slice(&DATA_OFFSET.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.data_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.description_bytes.to_le_bytes());
        bytes[64..96].copy_from_slice(&self.description_digest);
        let digest = blake3::hash(&bytes[..96]);
        bytes[96..].copy_from_slice(digest.as_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Error> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        if bytes[..8] != MAGIC {
            return Err(Error::NoImage);
        }
        let version = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default());
        if version != VERSION {
            return Err(Error::Version { found: version });
        }
        if blake3::hash(&bytes[..96]).as_bytes()[..] != bytes[96..] {
            return Err(Error::Digest("the header"));
        }
        let mut description_digest = [0; 32];
        description_digest.copy_from_slice(&bytes[64..96]);
        let header = Self { data_bytes: word(24), description_bytes: word(32), description_digest };
        // Whatever else is there is what this program writes.
        if header.to_bytes() != *bytes {
            return Err(Error::Invalid("the header has fields that this version does not know"));
        }
        if header.description_bytes > MAX_DESCRIPTION_BYTES || !header.data_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(Error::Invalid("a size is out of range"));
        }
        Ok(header)
    }

    fn file_bytes(&self) -> Option<u64> {
        DATA_OFFSET.checked_add(self.data_bytes)?.checked_add(self.description_bytes)
    }
}

/// Writes an image to an empty file, and waits until it is on its disk.
///
/// # Errors
/// [`Error`]; the file is not valid then.
pub fn save(capsule: &Capsule, file: &File) -> Result<(), Error> {
    let mut pages = Writer { file, at: DATA_OFFSET, digest: blake3::Hasher::new() };
    let layers = capsule.files.iter().map(|layer| pages.layer(layer)).collect::<Result<_, _>>()?;
    let description = codec::encode(&Description {
        id: capsule.id,
        created_ns: capsule.created_ns,
        vm_type: capsule.vm_type.clone(),
        original: capsule.original.clone(),
        config: capsule.config,
        seq: capsule.seq,
        state: capsule.state.clone(),
        layers,
        data_digest: pages.digest.finalize().into(),
    })?;
    let write = |bytes: &[u8], at| file.write_all_at(bytes, at).map_err(|error| Error::Io("write the image", error));
    write(&description, pages.at)?;
    let header = Header {
        data_bytes: pages.at - DATA_OFFSET,
        description_bytes: description.len() as u64,
        description_digest: blake3::hash(&description).into(),
    };
    file.sync_data().map_err(|error| Error::Io("write the image", error))?;
    write(&header.to_bytes(), 0)?;
    file.sync_all().map_err(|error| Error::Io("write the image", error))
}

/// Pages on their way to a file.
struct Writer<'f> {
    file: &'f File,
    at: u64,
    digest: blake3::Hasher,
}

impl Writer<'_> {
    /// Writes the pages of a layer that are not zero.
    fn layer(&mut self, layer: &File) -> Result<LayerDescription, Error> {
        let read = |error| Error::Io("read a layer", error);
        let bytes = layer.metadata().map_err(read)?.len();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut buffer = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(0)];
        let mut at = 0;
        while let Some((start, end)) = next_data(layer, at, bytes).map_err(read)? {
            at = start;
            while at < end {
                let length = usize::try_from(CHUNK_BYTES.min(end - at)).unwrap_or(0);
                let chunk = &mut buffer[..length];
                layer.read_exact_at(chunk, at).map_err(read)?;
                self.chunk(chunk, at / PAGE_BYTES, &mut runs)?;
                at += length as u64;
            }
        }
        Ok(LayerDescription { pages: bytes / PAGE_BYTES, runs })
    }

    fn chunk(&mut self, chunk: &[u8], first_page: u64, runs: &mut Vec<(u64, u64)>) -> Result<(), Error> {
        let page_bytes = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
        for (page, content) in (first_page..).zip(chunk.chunks(page_bytes)) {
            if content.iter().all(|&byte| byte == 0) {
                continue;
            }
            match runs.last_mut() {
                Some((start, pages)) if *start + *pages == page => *pages += 1,
                _ => runs.push((page, 1)),
            }
            self.digest.update(content);
            self.file.write_all_at(content, self.at).map_err(|error| Error::Io("write the image", error))?;
            self.at += content.len() as u64;
        }
        Ok(())
    }
}

/// Where the next piece of a file begins and ends that is not a hole, in whole pages.
fn next_data(file: &File, from: u64, bytes: u64) -> io::Result<Option<(u64, u64)>> {
    use rustix::fs::{SeekFrom, seek};
    if from >= bytes {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start - start % PAGE_BYTES, end.next_multiple_of(PAGE_BYTES).min(bytes))))
}

/// Reads an image. Its layers are memory files that nobody can write to.
///
/// # Errors
/// [`Error`]: whatever is wrong with the file.
pub fn load(file: &mut File) -> Result<Capsule, Error> {
    let read = |error| Error::Io("read the image", error);
    let found = file.metadata().map_err(read)?.len();
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::NoImage,
        _ => read(error),
    })?;
    let header = Header::from_bytes(&header)?;
    let expected = header.file_bytes().ok_or(Error::Invalid("a size is out of range"))?;
    if found != expected {
        return Err(Error::Length { found, expected });
    }
    let mut description = vec![0; usize::try_from(header.description_bytes).unwrap_or(0)];
    file.read_exact_at(&mut description, DATA_OFFSET + header.data_bytes).map_err(read)?;
    if *blake3::hash(&description).as_bytes() != header.description_digest {
        return Err(Error::Digest("the description"));
    }
    let description: Description = codec::decode(&description)?;
    check(&description, header.data_bytes)?;
    let mut pages = Reader { file, at: DATA_OFFSET, digest: blake3::Hasher::new() };
    let files = description.layers.iter().map(|layer| pages.layer(layer)).collect::<Result<_, _>>()?;
    if *pages.digest.finalize().as_bytes() != description.data_digest {
        return Err(Error::Digest("the memory"));
    }
    let Description { id, created_ns, vm_type, original, config, seq, state, .. } = description;
    Ok(Capsule { id, created_ns, vm_type, original, config, seq, state, files })
}

/// Checks that the layers are of a possible size, that their runs are sorted and within them, and that the pages are all theirs.
fn check(description: &Description, data_bytes: u64) -> Result<(), Error> {
    let Description { layers, state, vm_type, .. } = description;
    if layers.len() > MAX_LAYERS || state.len() > MAX_BYTES || !vmfork_abi::is_vm_type(vm_type) {
        return Err(Error::Invalid("it has too many layers, too large a state, or no VM type"));
    }
    let mut pages: u64 = 0;
    for layer in layers {
        if layer.pages > MAX_RAM_BYTES / PAGE_BYTES {
            return Err(Error::Invalid("a layer is too large"));
        }
        let mut free_from = 0;
        for &(page, count) in &layer.runs {
            let end = page.checked_add(count).filter(|end| count > 0 && page >= free_from && *end <= layer.pages);
            free_from = end.ok_or(Error::Invalid("a layer's runs are not sorted, or reach out of it"))?;
            pages += count;
        }
    }
    if pages.checked_mul(PAGE_BYTES) == Some(data_bytes) {
        Ok(())
    } else {
        Err(Error::Invalid("it has more or fewer pages than its layers"))
    }
}

/// Pages on their way from a file.
struct Reader<'f> {
    file: &'f File,
    at: u64,
    digest: blake3::Hasher,
}

impl Reader<'_> {
    fn layer(&mut self, layer: &LayerDescription) -> Result<File, Error> {
        let target = memory::unsealed("vm-loaded", layer.pages * PAGE_BYTES)?;
        let mut buffer = vec![0; usize::try_from(CHUNK_BYTES).unwrap_or(0)];
        for &(page, pages) in &layer.runs {
            let (mut to, end) = (page * PAGE_BYTES, (page + pages) * PAGE_BYTES);
            while to < end {
                let chunk = &mut buffer[..usize::try_from(CHUNK_BYTES.min(end - to)).unwrap_or(0)];
                self.file.read_exact_at(chunk, self.at).map_err(|error| Error::Io("read the image", error))?;
                self.digest.update(chunk);
                target.write_all_at(chunk, to).map_err(|error| Error::Io("write to memory", error))?;
                (self.at, to) = (self.at + chunk.len() as u64, to + chunk.len() as u64);
            }
        }
        memory::seal("vm-loaded", &target)?;
        Ok(target)
    }
}

/// Writes an image to a new file of this name, all of it or none.
///
/// # Errors
/// [`Error`]; there is no new file then, and one that was there stays.
pub fn save_as(capsule: &Capsule, path: &std::path::Path) -> Result<(), Error> {
    let io = |error| Error::Io("make the file", error);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".image-").tempfile_in(folder).map_err(io)?;
    save(capsule, file.as_file())?;
    file.flush().map_err(io)?;
    file.persist(path).map_err(|error| Error::Io("give the file its name", error.error))?;
    Ok(())
}

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
