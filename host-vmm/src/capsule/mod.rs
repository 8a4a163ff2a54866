//! A captured VM as bytes: what a copy needs beside the memory's files.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use serde::{Deserialize, Serialize};

pub mod codec;

use crate::{
    machine::MachineState,
    memory::{self, Image, Layer, Run},
};

/// Largest capsule in bytes that is read: a machine's state is some 20 KiB a vCPU, an image's description 24 bytes a piece.
const MAX_BYTES: usize = 64 << 20;

/// Why a capsule can't be made or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be encoded or decoded.
    #[error("can't code the VM's state")]
    Codec(#[from] codec::Error),
    /// Its file could not be made, or its image makes no sense.
    #[error("the VM's memory does not fit")]
    Memory(#[from] memory::Error),
    /// Its file could not be read.
    #[error("can't read the VM's state")]
    Read(#[source] io::Error),
    /// It is larger than any can be.
    #[error("the VM's state is too large")]
    TooLarge,
    /// A layer can still be changed.
    #[error("a layer of the image is not sealed")]
    Mutable,
    /// The number of files that came with it is another than it needs.
    #[error("the VM's state needs {needed} memory files, {got} came")]
    Files {
        /// Files that the image's layers are in.
        needed: usize,
        /// Files that came.
        got: usize,
    },
}

#[derive(Serialize, Deserialize)]
struct Contents {
    machine: MachineState,
    pages: u64,
    /// What each layer's file holds, lowest layer first.
    layers: Vec<Vec<Run>>,
}

/// A captured VM: a sealed file with its state, and the files of its image's layers.
#[derive(Debug, Clone)]
pub struct Capsule {
    /// The state.
    pub state: Arc<File>,
    /// The layers, lowest first.
    pub layers: Vec<Arc<File>>,
}

impl Capsule {
    /// Packs a state and an image.
    ///
    /// # Errors
    /// [`Error::Codec`] or [`Error::Memory`].
    pub fn pack(machine: MachineState, image: &Image) -> Result<Self, Error> {
        let layers = image.layers();
        let contents =
            Contents { machine, pages: image.pages(), layers: layers.iter().map(|layer| layer.runs.clone()).collect() };
        let state = memory::sealed("vm-state", &codec::encode(&contents)?)?;
        Ok(Self { state: Arc::new(state), layers: layers.iter().map(|layer| Arc::clone(&layer.file)).collect() })
    }

    /// The capsule as files: the state first, then the layers.
    pub fn files(&self) -> Vec<&File> {
        std::iter::once(&self.state).chain(&self.layers).map(AsRef::as_ref).collect()
    }

    /// The capsule that [`Capsule::files`] gave, or `None` where there is no file at all.
    pub fn from_files(files: Vec<File>) -> Option<Self> {
        let mut files = files.into_iter().map(Arc::new);
        Some(Self { state: files.next()?, layers: files.collect() })
    }

    /// Unpacks it, and checks that the image is whole.
    ///
    /// # Errors
    /// [`Error`]: whatever does not fit.
    pub fn unpack(self) -> Result<(MachineState, Image), Error> {
        let length = self.state.metadata().map_err(Error::Read)?.len();
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_BYTES).ok_or(Error::TooLarge)?;
        let mut bytes = vec![0; length];
        // By offset: all processes that have the file share one position in it.
        self.state.read_exact_at(&mut bytes, 0).map_err(Error::Read)?;
        let Contents { machine, pages, layers } = codec::decode(&bytes)?;
        if layers.len() != self.layers.len() {
            return Err(Error::Files { needed: layers.len(), got: self.layers.len() });
        }
        for file in &self.layers {
            // Whoever could shrink it could kill every VM that maps it.
            if !memory::is_immutable(file)? {
                return Err(Error::Mutable);
            }
        }
        let layers = layers.into_iter().zip(self.layers).map(|(runs, file)| Arc::new(Layer { file, runs })).collect();
        Ok((machine, Image::new(pages, layers)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_do_harm(state in proptest::collection::vec(any::<u8>(), 0..4096), layers in 0..3usize) {
            let sealed = |content: &[u8]| memory::sealed("test", content).unwrap();
            let files = [sealed(&state)].into_iter().chain((0..layers).map(|_| sealed(&[0; 8192]))).collect();
            prop_assert!(Capsule::from_files(files).unwrap().unpack().is_err());
        }
    }

    #[test]
    fn a_capsule_has_a_state() {
        assert!(Capsule::from_files(Vec::new()).is_none());
    }
}
