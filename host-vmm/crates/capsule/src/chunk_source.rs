//! An image that can be sent, as often as it is needed.

use std::{collections::HashMap, fs::File, io, sync::Arc};

use bytes::Bytes;
use vmm::memory;

use super::chunk_stream;
use crate::{Capsule, Chunk, Description, Digest, Digests, Error, Header, IsWanted, LayerManifest};

/// An image, what it says of itself, and where its memory is.
#[derive(Debug)]
pub struct Parcel {
    description: Description,
    /// Header and description, as they travel.
    head: Bytes,
    /// The layers' files, lowest first.
    files: Vec<Arc<File>>,
    /// Each chunk, and the number of its layer.
    chunks: Vec<(usize, Chunk)>,
}

impl Parcel {
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
    /// As [`Parcel::of`], and [`Error::CalledOff`].
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

    /// What it says of itself.
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

/// The memory of images that are there: who is sent another image need not be sent what that has in common with them.
#[derive(Debug)]
pub struct Stock {
    parcels: Vec<Arc<Parcel>>,
    /// In which parcel each chunk is, and which of its own.
    chunks: HashMap<Digest, (usize, usize)>,
}

impl Stock {
    /// How much memory the stock of some images takes, in bytes.
    pub fn cost(parcels: &[Arc<Parcel>]) -> u64 {
        // A table is up to twice as large as what is in it.
        let entry = 2 * size_of::<(Digest, (usize, usize))>() as u64;
        parcels.iter().map(|parcel| u64::from(parcel.chunks())).sum::<u64>().saturating_mul(entry)
    }

    /// That of some images.
    pub fn of(parcels: Vec<Arc<Parcel>>) -> Self {
        let all = parcels.iter().enumerate().flat_map(|(number, parcel)| {
            parcel.chunks.iter().enumerate().map(move |(at, (_, chunk))| (chunk.digest, (number, at)))
        });
        Self { chunks: all.collect(), parcels }
    }

    /// The file of a layer that has the same content, and to which nobody can write any more: a node may have kept a way to do so to what it has
    /// frozen itself.
    pub fn layer(&self, wanted: &LayerManifest) -> Option<Arc<File>> {
        let is_same = |layer: &LayerManifest| layer.file_pages == wanted.file_pages && layer.chunks == wanted.chunks;
        self.parcels.iter().find_map(|parcel| {
            let at = parcel.description.memory.layers.iter().position(is_same)?;
            Some(&parcel.files[at]).filter(|file| memory::is_sealed(file).is_ok_and(|sealed| sealed)).map(Arc::clone)
        })
    }

    /// The pages that are not zero of a chunk with this digest, one behind another.
    pub fn chunk(&self, digest: &Digest) -> Option<Vec<u8>> {
        let (parcel, at) = *self.chunks.get(digest)?;
        let mut data = Vec::new();
        self.parcels[parcel].read(at, &mut data).ok().map(|()| data)
    }
}
