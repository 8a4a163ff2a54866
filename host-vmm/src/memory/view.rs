//! One VM's view of its memory, and how it is frozen into an image.

use std::{fs::File, sync::Arc, thread};

use rustix::fs::{FallocateFlags, fallocate};

use super::{Error, Image, Layer, Mapping, PageMap, Run, dirty, memfd};
use crate::{arch::layout::PAGE_BYTES, threads};

/// Name of a booted VM's memory file, as `/proc` shows it.
const RAM_NAME: &str = "vm-ram";

/// Name of a delta layer's file.
const DELTA_NAME: &str = "vm-delta";

/// Pages that any VM writes to.
const FEW_PAGES: u64 = 4;

/// Dirty memory in bytes for which one more thread is worth its start, and the mapping that it needs.
const BYTES_PER_WORKER: usize = 4 << 20;

/// Longest piece of it that is copied at once, in bytes.
const PIECE_BYTES: usize = 256 << 10;

/// A VM's memory: one address range, and what it shows.
#[derive(Debug)]
pub struct View {
    mapping: Arc<Mapping>,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    /// The file is this VM's alone, and mapped shared.
    Own(Arc<File>),
    /// The image is mapped private; what the VM writes is its own.
    Image(Arc<Image>),
}

/// Which files the image of a fork will consist of.
#[derive(Debug)]
pub struct Plan {
    files: Vec<Arc<File>>,
    delta: Option<Arc<File>>,
}

impl Plan {
    /// The files, lowest layer first.
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }
}

impl View {
    /// The empty memory of a VM that is about to boot, in `mapping`.
    ///
    /// # Errors
    /// [`Error::Map`] or [`Error::File`] where there is no room for it.
    pub fn own(mapping: Arc<Mapping>) -> Result<Self, Error> {
        let file = memfd::unsealed(RAM_NAME, mapping.bytes() as u64)?;
        mapping.map_shared(&file)?;
        Ok(Self { mapping, backing: Backing::Own(Arc::new(file)) })
    }

    /// A private view of an image, in `mapping`.
    ///
    /// # Errors
    /// [`Error::Map`] where a piece of it can't be mapped.
    pub fn of_image(image: Arc<Image>, mapping: Arc<Mapping>) -> Result<Self, Error> {
        image.map_private(&mapping)?;
        Ok(Self { mapping, backing: Backing::Image(image) })
    }

    /// Takes it down without holding others up, if nobody else has its address range.
    pub fn take_down(self) {
        if let Some(mapping) = Arc::into_inner(self.mapping) {
            mapping.take_down();
        }
    }

    /// The address range.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// The file behind a booted VM's memory; `None` once the memory is an image.
    pub fn own_file(&self) -> Option<&Arc<File>> {
        match &self.backing {
            Backing::Own(file) => Some(file),
            Backing::Image(_) => None,
        }
    }

    /// Names the files that an image made now will consist of. `delta` is the one for pages that the VM has written to, if there are any.
    pub fn plan(&self, delta: &Arc<File>) -> Plan {
        match &self.backing {
            Backing::Own(file) => Plan { files: vec![Arc::clone(file)], delta: None },
            Backing::Image(image) => {
                let layers = image.layers().iter().map(|layer| Arc::clone(&layer.file));
                let files = layers.chain([Arc::clone(delta)]).collect();
                Plan { files, delta: Some(Arc::clone(delta)) }
            }
        }
    }

    /// Makes an image of the memory as it is now. The VM must be stopped.
    ///
    /// # Errors
    /// [`Error`]: the VM may go on as if nothing had happened.
    pub fn freeze(&self, plan: Plan, page_map: &PageMap) -> Result<Arc<Image>, Error> {
        match &self.backing {
            Backing::Own(file) => {
                let pages = self.mapping.bytes() as u64 / PAGE_BYTES;
                memfd::seal_future(RAM_NAME, file)?;
                Ok(Arc::new(Image::new(pages, vec![Arc::new(Layer::whole(Arc::clone(file), pages))])?))
            }
            Backing::Image(image) => {
                let Some(delta) = plan.delta else { return Ok(Arc::clone(image)) };
                Ok(Arc::new(self.with_delta(image, delta, page_map)?))
            }
        }
    }

    /// `image` with the pages that this VM has written since it was mapped.
    fn with_delta(&self, image: &Image, file: Arc<File>, page_map: &PageMap) -> Result<Image, Error> {
        let dirty = page_map.dirty_runs(&self.mapping)?;
        if dirty.is_empty() {
            return Ok(image.clone());
        }
        let (footing, upper) = image.footing()?;
        let runs = dirty::join_for(&footing, dirty::union(&dirty, &upper));
        let pages = runs.last().map_or(0, |run| run.file_page + run.pages);
        self.copy_out(&runs, to_usize(pages * PAGE_BYTES)?, &file)?;
        memfd::seal(DELTA_NAME, &file)?;
        footing.with_layer(Layer { file, runs })
    }

    /// Writes runs of this memory to a file of `bytes` bytes.
    fn copy_out(&self, runs: &[Run], bytes: usize, file: &File) -> Result<(), Error> {
        let workers = threads::processors().min(bytes / BYTES_PER_WORKER);
        if workers > 1 { self.copy_on(workers, runs, bytes, file) } else { self.write_out(runs, file) }
    }

    fn write_out(&self, runs: &[Run], file: &File) -> Result<(), Error> {
        runs.iter().try_for_each(|run| {
            let (at, bytes) = (to_usize(run.page * PAGE_BYTES)?, to_usize(run.pages * PAGE_BYTES)?);
            self.mapping.write_to(at, bytes, file, run.file_page * PAGE_BYTES)
        })
    }

    /// Copies on several processors. They need a mapping for that: a file takes one write at a time.
    fn copy_on(&self, workers: usize, runs: &[Run], bytes: usize, file: &File) -> Result<(), Error> {
        let target = Mapping::reserve(bytes)?;
        file.set_len(bytes as u64).map_err(|source| Error::File {
            operation: "grow",
            name: DELTA_NAME.to_owned(),
            source,
        })?;
        target.map_shared(file)?;
        let pieces = pieces(runs)?;
        let copy = |piece: &Piece| target.copy_from(piece.to, &self.mapping, piece.from, piece.bytes);
        thread::scope(|scope| {
            let mut shares = pieces.chunks(pieces.len().div_ceil(workers));
            let own = shares.next().unwrap_or_default();
            let others: Vec<_> = shares.map(|share| scope.spawn(move || share.iter().try_for_each(copy))).collect();
            let done = own.iter().try_for_each(copy);
            others.into_iter().fold(done, |done, other| done.and(other.join().unwrap_or(Err(Error::Worker))))
        })
    }
}

/// A piece of memory that is copied at once.
#[derive(Debug)]
struct Piece {
    from: usize,
    to: usize,
    bytes: usize,
}

/// The runs in pieces, none of them long, so that they can be shared out evenly.
fn pieces(runs: &[Run]) -> Result<Vec<Piece>, Error> {
    let mut pieces = Vec::with_capacity(runs.len());
    for run in runs {
        let (from, to) = (to_usize(run.page * PAGE_BYTES)?, to_usize(run.file_page * PAGE_BYTES)?);
        let bytes = to_usize(run.pages * PAGE_BYTES)?;
        let steps = (0..bytes).step_by(PIECE_BYTES);
        pieces.extend(steps.map(|at| Piece { from: from + at, to: to + at, bytes: PIECE_BYTES.min(bytes - at) }));
    }
    Ok(pieces)
}

/// An empty file for the pages that a VM has written to.
///
/// # Errors
/// [`Error::File`].
pub fn delta_file() -> Result<File, Error> {
    memfd::unsealed(DELTA_NAME, 0)
}

/// Takes the memory from the host that such a file needs for the few pages that any VM writes to before it forks (fallocate). It stays
/// empty.
///
/// # Errors
/// [`Error::File`].
pub fn warm_up_delta(delta: &File) -> Result<(), Error> {
    fallocate(delta, FallocateFlags::KEEP_SIZE, 0, FEW_PAGES * PAGE_BYTES).map_err(|errno| Error::File {
        operation: "take memory for",
        name: DELTA_NAME.to_owned(),
        source: errno.into(),
    })
}

fn to_usize(bytes: u64) -> Result<usize, Error> {
    usize::try_from(bytes).map_err(|_| Error::Invalid("the memory's size is out of range"))
}

#[cfg(test)]
#[path = "view_test.rs"]
mod tests;
