//! A capsule's memory that comes in chunk by chunk, in any order, from a file or from another platform.

use std::{
    fs::File,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use types::PAGE_BYTES;
use vmm::memory::{self, Budget, Grant};

use super::{Capsule, Chunk, Description, Error, LayerManifest};

/// Name of a layer's memory file, as `/proc` shows it.
const LAYER_NAME: &str = "vm-loaded";

/// A layer's file.
#[derive(Debug)]
enum LayerFile {
    /// It is being filled.
    New(Arc<File>),
    /// Another image has it: nothing of it is missing.
    Shared(Arc<File>),
}

impl LayerFile {
    fn file(&self) -> &Arc<File> {
        match self {
            Self::New(file) | Self::Shared(file) => file,
        }
    }
}

/// A memory that is being put together. Chunks have numbers here, in the order of
/// [`Manifest::chunks`](super::Manifest::chunks).
#[derive(Debug)]
pub struct Assembly {
    description: Description,
    files: Vec<LayerFile>,
    /// Each chunk, and the number of its layer.
    chunks: Vec<(usize, Chunk)>,
    is_there: Vec<AtomicBool>,
    /// What all of this but the files takes.
    _grant: Option<Grant>,
}

/// Bytes of memory for each chunk beside its content: in the description, and here.
const CHUNK_COST: usize = size_of::<Chunk>() + size_of::<(usize, Chunk)>() + size_of::<AtomicBool>();

impl Assembly {
    /// An empty memory, for all of which there is room in the budget: each chunk counts as often as it
    /// occurs, whether it is to be sent or is here already. Layers for which `shared` has a file are there,
    /// and count where they came from.
    ///
    /// # Errors
    /// [`Error::NoRoom`]; [`Error::Memory`] where there can be no file for a layer.
    pub fn new(
        description: Description,
        budget: &Budget,
        shared: impl Fn(&LayerManifest) -> Option<Arc<File>>,
    ) -> Result<Self, Error> {
        let assembly = Self::unfilled(description, shared)?;
        let layers = assembly.files.iter().zip(&assembly.description.memory.layers);
        let new: Vec<(&Arc<File>, u64)> = layers
            .filter_map(|(file, layer)| match file {
                LayerFile::New(file) => Some((file, layer.data_bytes())),
                LayerFile::Shared(_) => None,
            })
            .collect();
        let cost = assembly.chunks.len().saturating_mul(CHUNK_COST) as u64;
        let mut grant =
            budget.reserve(new.iter().fold(cost, |sum, (_, bytes)| sum.saturating_add(*bytes)))?;
        new.into_iter().for_each(|(file, bytes)| grant.pass_on(file, bytes));
        Ok(Self { _grant: Some(grant), ..assembly })
    }

    /// A memory that nobody fills: to find out whether what comes would be right.
    ///
    /// # Errors
    /// [`Error::Memory`] where there can be no file for a layer.
    pub(super) fn unfilled(
        description: Description,
        shared: impl Fn(&LayerManifest) -> Option<Arc<File>>,
    ) -> Result<Self, Error> {
        let files = description.memory.layers.iter().map(|layer| match shared(layer) {
            Some(file) => Ok(LayerFile::Shared(file)),
            None => {
                Ok(LayerFile::New(Arc::new(memory::unsealed(LAYER_NAME, layer.file_pages * PAGE_BYTES)?)))
            }
        });
        let files: Vec<LayerFile> = files.collect::<Result<_, Error>>()?;
        let chunks: Vec<_> = description.memory.chunks().map(|(layer, chunk)| (layer, *chunk)).collect();
        let is_shared = |layer: usize| matches!(files[layer], LayerFile::Shared(_));
        let is_there = chunks.iter().map(|(layer, _)| AtomicBool::new(is_shared(*layer))).collect();
        Ok(Self { description, files, chunks, is_there, _grant: None })
    }

    /// What is being put together.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The chunks, each with the number of its layer.
    pub fn chunks(&self) -> &[(usize, Chunk)] {
        &self.chunks
    }

    /// Checks a chunk's pages that are not zero, one behind another.
    ///
    /// # Errors
    /// [`Error::Invalid`] or [`Error::Digest`] where they are not those of this chunk.
    pub fn check(&self, number: usize, data: &[u8]) -> Result<(), Error> {
        let (layer, chunk) = self.chunk(number)?;
        let bytes = self.description.memory.layers[layer].chunk_bytes(chunk.number);
        let found = Chunk::of(chunk.number, chunk.pages, data, bytes)?;
        if found == chunk { Ok(()) } else { Err(Error::Digest("the memory")) }
    }

    /// Takes a chunk's pages in that are not zero, one behind another.
    ///
    /// # Errors
    /// As [`Assembly::check`], or [`Error::Io`] where there is no memory for them.
    pub fn put(&self, number: usize, data: &[u8]) -> Result<(), Error> {
        self.check(number, data)?;
        let (layer, chunk) = self.chunk(number)?;
        if let LayerFile::New(file) = &self.files[layer] {
            chunk.write(file, data)?;
        }
        self.is_there[number].store(true, Ordering::Release);
        Ok(())
    }

    fn chunk(&self, number: usize) -> Result<(usize, Chunk), Error> {
        self.chunks.get(number).copied().ok_or(Error::Invalid("there is no such chunk"))
    }

    /// The chunks that are missing, as ranges of their numbers.
    pub fn missing(&self) -> Vec<Range<u32>> {
        let mut missing: Vec<Range<u32>> = Vec::new();
        for (number, _) in (0..).zip(&self.is_there).filter(|(_, is_there)| !is_there.load(Ordering::Acquire))
        {
            match missing.last_mut() {
                Some(last) if last.end == number => last.end += 1,
                _ => missing.push(number..number + 1),
            }
        }
        missing
    }

    /// The capsule, and what it says: nobody can write to its memory from here on.
    ///
    /// # Errors
    /// [`Error::Invalid`] where something is missing; as [`Capsule::from_description`].
    pub fn finish(self) -> Result<(Capsule, Description), Error> {
        if !self.missing().is_empty() {
            return Err(Error::Invalid("some of its memory is missing"));
        }
        self.close()
    }

    /// The capsule whatever is missing: to find out whether it can be one.
    pub(super) fn close(self) -> Result<(Capsule, Description), Error> {
        for file in &self.files {
            if let LayerFile::New(file) = file {
                memory::seal(LAYER_NAME, file)?;
            }
        }
        let files = self.files.iter().map(|file| Arc::clone(file.file())).collect();
        Ok((Capsule::from_description(&self.description, files)?, self.description))
    }
}
