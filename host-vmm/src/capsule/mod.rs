//! A captured VM as bytes: what a copy needs beside the memory's files.

use std::{borrow::Cow, fs::File, sync::Arc};

use serde::{Deserialize, Serialize};

pub mod codec;
pub mod compat;
mod difference;
pub mod file;

pub use difference::{Difference, Incompatible};
pub use file::Capsule;

use crate::{
    machine::MachineState,
    memory::{self, Image, Layer, Run},
};

/// Largest state in bytes: a machine's is some 20 KiB a vCPU, an image's description 24 bytes a piece.
pub const MAX_BYTES: usize = 16 << 20;

/// Why a state can't be packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be encoded or decoded.
    #[error("can't code the VM's state")]
    Codec(#[from] codec::Error),
    /// The image makes no sense.
    #[error("the VM's memory does not fit")]
    Memory(#[from] memory::Error),
    /// A layer can still be changed.
    #[error("a layer of the image is not sealed")]
    Mutable,
    /// A layer is in no file that came with the state.
    #[error("a layer of the image is missing: {0} files came")]
    MissingFile(usize),
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

/// Unpacks what [`pack`] gave, and checks that the image is whole and can't change.
///
/// # Errors
/// [`Error`]: whatever does not fit.
pub fn unpack(state: &[u8], files: &[Arc<File>]) -> Result<(MachineState, Image), Error> {
    let Contents { machine, pages, layers } = codec::decode(state)?;
    let layers = layers.into_iter().map(|LayerContents { file, runs }| {
        let file = Arc::clone(files.get(file).ok_or(Error::MissingFile(files.len()))?);
        // Whoever could shrink it could kill every VM that maps it.
        if !memory::is_immutable(&file)? {
            return Err(Error::Mutable);
        }
        Ok(Arc::new(Layer { file, runs }))
    });
    let layers = layers.collect::<Result<_, Error>>()?;
    Ok((machine.into_owned(), Image::new(pages, layers)?))
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
