//! A captured VM as bytes: what a copy needs beside the memory's files, and the capsule, in which all of it
//! travels or rests.
//!
//! ```text
//!  capsule      header       128 bytes: version, sizes, digests              (header)
//!               memory       the pages that are not zero, chunk by chunk     (manifest)
//!               description  who and what it is, what it needs of a          (description, compat)
//!                            platform, the state, and what the memory is
//! ```
//!
//! In a [`mod@file`] the three stand in this order. Between platforms, header and description go first, and
//! then those chunks that are missing.

#![forbid(unsafe_code)]

use std::{borrow::Cow, fs::File, io, sync::Arc};

use serde::{Deserialize, Serialize};
use vmm::{
    machine::MachineState,
    memory::{self, Image, Layer, Run, budget},
};

mod assembly;
mod chunk;
mod chunk_source;
pub mod chunk_stream;
pub mod codec;
pub mod compat;
mod description;
pub mod file;
pub mod header;
mod incompatibility;
mod manifest;
mod parallel;
#[cfg(any(test, feature = "samples"))]
pub mod samples;
mod v1;

pub use assembly::Assembly;
pub use chunk::{CHUNK_BYTES, CHUNK_PAGES, Chunk, Digest};
pub use chunk_source::{ChunkIndex, ChunkSource};
pub use description::{Description, ImageMetadata};
pub use header::Header;
pub use incompatibility::{Incompatibility, Incompatible};
pub use manifest::{Digests, IsWanted, LayerManifest, Manifest};

/// Largest state in bytes: a machine's is some 20 KiB a vCPU, an image's description 24 bytes a piece.
pub const MAX_BYTES: usize = 16 << 20;

/// Why a state can't be packed or unpacked, or a capsule not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something can't be encoded or decoded.
    #[error("can't code the VM's state")]
    Codec(#[from] codec::Error),
    /// The image makes no sense, or there is no memory for it.
    #[error("the VM's memory does not fit")]
    Memory(#[from] memory::Error),
    /// This host has no memory for it, or may not give it so much.
    #[error("there is no room for the VM's memory")]
    NoRoom(#[from] budget::Error),
    /// A layer can still be changed.
    #[error("a layer of the image is not sealed")]
    Mutable,
    /// A layer is in no file that came with the state.
    #[error("a layer of the image is missing: {0} files came")]
    MissingFile(usize),
    /// A file can't be read or written.
    #[error("can't {0}")]
    Io(&'static str, #[source] io::Error),
    /// There would be too much to say of it.
    #[error(
        "the VM's memory is too large for a capsule: what that says of it would be {found} bytes long, at 44 bytes for each 256 KiB that are in use, and may be {most}"
    )]
    TooLarge {
        /// How long it would be.
        found: u64,
        /// How long it may be.
        most: u64,
    },
    /// It is something else.
    #[error("this is no capsule of a VM")]
    NoCapsule,
    /// It is of another time.
    #[error("{what} has version {found} of its format; this program reads versions {oldest} to {newest}")]
    Version {
        /// What has it.
        what: &'static str,
        /// Its version.
        found: u32,
        /// The oldest that is read.
        oldest: u32,
        /// The newest that is read.
        newest: u32,
    },
    /// Its end is missing, or something follows.
    #[error(
        "the capsule is {found} bytes long and should be {expected}: it was cut off, or not written to its end"
    )]
    Length {
        /// How long it is.
        found: u64,
        /// How long it should be.
        expected: u64,
    },
    /// It was changed.
    #[error("the capsule was changed: {0} does not fit its digest")]
    Digest(&'static str),
    /// It was made by somebody who wanted to do harm.
    #[error("the capsule is not valid: {0}")]
    Invalid(&'static str),
    /// Something that each capsule has is not there.
    #[error("the capsule is not valid: {0} is missing")]
    MissingPart(&'static str),
    /// It has something that must be known to run it.
    #[error(
        "the capsule has a part of the kind {0}, which this program does not know: it was made by a newer one"
    )]
    UnknownPart(u32),
    /// Nobody wants it any more.
    #[error("the capsule was not made: the copies that it was for were called off")]
    CalledOff,
}

/// Longest manifest in bytes: it leaves room in a description for the state of the largest machine.
const MAX_MANIFEST_BYTES: u64 = header::MAX_DESCRIPTION_BYTES - (4 << 20);

/// All that copies of an image need.
#[derive(Debug)]
pub struct Capsule {
    /// Metadata of the image.
    pub metadata: ImageMetadata,
    /// What [`pack`] gave.
    pub state: Vec<u8>,
    /// The files of the memory's layers, in the order in which `state` numbers them.
    pub files: Vec<Arc<File>>,
}

impl Capsule {
    /// Describes it: what it needs, and what is in its memory, all of which is read for that but for what
    /// `digests` knows. The state may come from a process that a guest has broken out into; it is checked
    /// here.
    ///
    /// # Errors
    /// [`Error`]: whatever does not fit, or can't be read.
    pub fn describe(&self, digests: &Digests) -> Result<(Description, Image), Error> {
        self.describe_while(digests, &|| true)
    }

    /// The same, for as long as somebody wants it.
    ///
    /// # Errors
    /// As [`Capsule::describe`], and [`Error::CalledOff`].
    pub fn describe_while(
        &self,
        digests: &Digests,
        is_wanted: IsWanted<'_>,
    ) -> Result<(Description, Image), Error> {
        let (machine, image) = unpack(&self.state, &self.files)?;
        manifest::check_length(&image, MAX_MANIFEST_BYTES)?;
        let requirements = compat::Requirements::of(&machine);
        let (metadata, memory) = (self.metadata.clone(), Manifest::of_while(&image, digests, is_wanted)?);
        Ok((Description { metadata, requirements, machine, memory, stored: None, _grant: None }, image))
    }

    /// Description without chunks, and the image: what is in its memory is not looked at.
    ///
    /// # Errors
    /// [`Error`]: whatever does not fit.
    pub fn describe_sparse(&self) -> Result<(Description, Image), Error> {
        let (machine, image) = unpack(&self.state, &self.files)?;
        // Its clone runs by the time at which all of it is described.
        manifest::check_length(&image, MAX_MANIFEST_BYTES)?;
        let requirements = compat::Requirements::of(&machine);
        let layers = image.layers().iter().map(|layer| LayerManifest::sparse(layer));
        let memory = Manifest { pages: image.pages(), layers: layers.collect::<Result<_, Error>>()? };
        let metadata = self.metadata.clone();
        Ok((Description { metadata, requirements, machine, memory, stored: None, _grant: None }, image))
    }

    /// The one that is described, with its memory in these files, one for each layer, in their order.
    ///
    /// # Errors
    /// [`Error`] where these make no image.
    pub fn from_description(description: &Description, files: Vec<Arc<File>>) -> Result<Self, Error> {
        let Description { metadata, machine, memory, .. } = description;
        if memory.layers.len() != files.len() {
            return Err(Error::MissingFile(files.len()));
        }
        let layers = memory.layers.iter().zip(&files);
        let layer = |(layer, file): (&LayerManifest, &Arc<File>)| {
            Arc::new(Layer { file: Arc::clone(file), runs: layer.runs.clone() })
        };
        let state = pack(machine, &Image::new(memory.pages, layers.map(layer).collect())?, &files)?;
        Ok(Self { metadata: metadata.clone(), state, files })
    }
}

#[derive(Serialize, Deserialize)]
struct Contents<'s> {
    machine: Cow<'s, MachineState>,
    pages: u64,
    /// The layers, lowest first.
    layers: Vec<LayerContents>,
}

#[derive(Serialize, Deserialize)]
struct LayerContents {
    /// Which of the files holds it.
    file: usize,
    /// What the file holds.
    runs: Vec<Run>,
}

/// Packs a state and the description of an image whose layers are in `files`, in any order.
///
/// # Errors
/// [`Error::Codec`], or [`Error::MissingFile`] where `files` lacks one.
pub fn pack(machine: &MachineState, image: &Image, files: &[Arc<File>]) -> Result<Vec<u8>, Error> {
    let layers = image.layers().iter().map(|layer| {
        let file = files.iter().position(|file| Arc::ptr_eq(file, &layer.file));
        Ok(LayerContents { file: file.ok_or(Error::MissingFile(files.len()))?, runs: layer.runs.clone() })
    });
    let layers = layers.collect::<Result<_, Error>>()?;
    Ok(codec::encode(&Contents { machine: Cow::Borrowed(machine), pages: image.pages(), layers })?)
}

/// Unpacks what [`pack`] gave, and checks that the image is whole, and frozen at least: platforms seal
/// images.
///
/// # Errors
/// [`Error`]: whatever does not fit.
pub fn unpack(state: &[u8], files: &[Arc<File>]) -> Result<(MachineState, Image), Error> {
    unpack_where(state, files, memory::is_frozen)
}

/// As [`unpack`], where the image may still be being filled, by somebody who is trusted with that.
///
/// # Errors
/// As there.
pub fn unpack_lazily(state: &[u8], files: &[Arc<File>]) -> Result<(MachineState, Image), Error> {
    unpack_where(state, files, |file| Ok(memory::is_frozen(file)? || memory::is_being_filled(file)?))
}

fn unpack_where(
    state: &[u8],
    files: &[Arc<File>],
    is_safe: impl Fn(&File) -> Result<bool, memory::Error>,
) -> Result<(MachineState, Image), Error> {
    let Contents { machine, pages, layers } = codec::decode(state)?;
    let image = image(pages, layers, files)?;
    // Whoever could shrink one could kill every VM that maps it.
    for layer in image.layers() {
        if !is_safe(&layer.file)? {
            return Err(Error::Mutable);
        }
    }
    Ok((machine.into_owned(), image))
}

fn image(pages: u64, layers: Vec<LayerContents>, files: &[Arc<File>]) -> Result<Image, Error> {
    let layers = layers.into_iter().map(|LayerContents { file, runs }| {
        let file = Arc::clone(files.get(file).ok_or(Error::MissingFile(files.len()))?);
        Ok(Arc::new(Layer { file, runs }))
    });
    Ok(Image::new(pages, layers.collect::<Result<_, Error>>()?)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_do_harm(state in proptest::collection::vec(any::<u8>(), 0..4096), layers in 0..3usize) {
            let sealed = |content: &[u8]| Arc::new(memory::sealed("test", content).unwrap());
            let files: Vec<_> = (0..layers).map(|_| sealed(&[0; 8192])).collect();
            prop_assert!(unpack(&state, &files).is_err());
        }
    }
}
