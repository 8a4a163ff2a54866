//! Chunks of images: the source that they are sent from, and an index of those that are there.

use std::{collections::HashMap, fs::File, io, sync::Arc};

use bytes::Bytes;
use vmm::memory;

use super::chunk_stream;
use crate::{Capsule, Chunk, Description, Digest, Digests, Error, Header, IsWanted, LayerManifest};

/// Source of the chunks of an image, which is sent as often as it is needed: its description and its files.
#[derive(Debug)]
pub struct ChunkSource {
    description: Description,
    /// Header and description, as they travel.
    head: Bytes,
    /// The layers' files, lowest first.
    files: Vec<Arc<File>>,
    /// Each chunk, and the number of its layer.
    chunks: Vec<(usize, Chunk)>,
}

impl ChunkSource {
    /// Makes one of an image.
    ///
    /// # Errors
    /// [`Error`].
    pub fn of(capsule: &Capsule, digests: &Digests) -> Result<Self, Error> {
        Self::of_while(capsule, digests, &|| true)
    }

    /// The same, for as long as somebody wants it.
    ///
    /// # Errors
    /// As [`ChunkSource::of`], and [`Error::CalledOff`].
    pub fn of_while(capsule: &Capsule, digests: &Digests, is_wanted: IsWanted<'_>) -> Result<Self, Error> {
        let (description, image) = capsule.describe_while(digests, is_wanted)?;
        Self::new(description, image.layers().iter().map(|layer| Arc::clone(&layer.file)).collect())
    }

    /// Makes one of an image that is described, and whose layers are in these files, lowest first.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(description: Description, files: Vec<Arc<File>>) -> Result<Self, Error> {
        let bytes = description.to_bytes()?;
        let header = Header::new(false, description.memory.data_bytes(), &bytes);
        let chunks = description.memory.chunks().map(|(layer, chunk)| (layer, *chunk)).collect();
        Ok(Self { head: [header.to_bytes().as_slice(), &bytes].concat().into(), description, files, chunks })
    }

    /// Description of the image.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Header and description, as they travel.
    pub fn head(&self) -> &Bytes {
        &self.head
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.chunks.len()).unwrap_or(u32::MAX)
    }

    /// Size of the memory's pages that are not zero, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.description.memory.data_bytes()
    }

    /// Size of a chunk's pages that are not zero, in bytes.
    pub fn data_bytes(&self, chunk: u32) -> u64 {
        self.chunks.get(chunk as usize).map_or(0, |(_, chunk)| chunk.data_bytes())
    }

    /// Appends a chunk to others, as it travels.
    ///
    /// # Errors
    /// Where there is no such chunk, or it can't be read.
    pub fn record(&self, number: u32, records: &mut Vec<u8>) -> io::Result<()> {
        let at = usize::try_from(number).map_err(io::Error::other)?;
        chunk_stream::append(records, number, |data| self.read(at, data))
    }

    /// Appends the pages of a chunk that are not zero.
    fn read(&self, at: usize, data: &mut Vec<u8>) -> Result<(), Error> {
        let (layer, chunk) = self.chunks.get(at).ok_or(Error::Invalid("there is no such chunk"))?;
        data.reserve_exact(usize::try_from(chunk.data_bytes()).unwrap_or(0));
        chunk.read(&self.files[*layer], data)
    }
}

/// Index by digest of the chunks that are here: a host that is sent another image need not be sent those.
#[derive(Debug)]
pub struct ChunkIndex {
    sources: Vec<Arc<ChunkSource>>,
    /// Number of the source that has each chunk, and the number of the chunk there.
    chunks: HashMap<Digest, (usize, usize)>,
}

impl ChunkIndex {
    /// Memory that the chunk index of some images takes, in bytes.
    pub fn cost(sources: &[Arc<ChunkSource>]) -> u64 {
        // A table is up to twice as large as what is in it.
        let entry = 2 * size_of::<(Digest, (usize, usize))>() as u64;
        sources.iter().map(|source| u64::from(source.chunks())).sum::<u64>().saturating_mul(entry)
    }

    /// The index of some images.
    pub fn of(sources: Vec<Arc<ChunkSource>>) -> Self {
        let all = sources.iter().enumerate().flat_map(|(number, source)| {
            source.chunks.iter().enumerate().map(move |(at, (_, chunk))| (chunk.digest, (number, at)))
        });
        Self { chunks: all.collect(), sources }
    }

    /// The file of a layer that has the same content, and to which nobody can write any more: a node may have
    /// kept a way to do so to what it has frozen itself.
    pub fn layer(&self, wanted: &LayerManifest) -> Option<Arc<File>> {
        let is_same =
            |layer: &LayerManifest| layer.file_pages == wanted.file_pages && layer.chunks == wanted.chunks;
        self.sources.iter().find_map(|source| {
            let at = source.description.memory.layers.iter().position(is_same)?;
            Some(&source.files[at])
                .filter(|file| memory::is_sealed(file).is_ok_and(|sealed| sealed))
                .map(Arc::clone)
        })
    }

    /// The pages that are not zero of a chunk with this digest, one behind another.
    pub fn chunk(&self, digest: &Digest) -> Option<Vec<u8>> {
        let (source, at) = *self.chunks.get(digest)?;
        let mut data = Vec::new();
        self.sources[source].read(at, &mut data).ok().map(|()| data)
    }
}
