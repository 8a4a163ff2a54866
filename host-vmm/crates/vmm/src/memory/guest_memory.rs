//! The memory of one VM, and how it is frozen into an image.

use std::{fs::File, sync::Arc, thread};

use base::threads;
use rustix::fs::{FallocateFlags, fallocate};
use types::PAGE_BYTES;

use super::{Error, Image, Layer, Mapping, PageMap, PremappedRam, Run, dirty, memfd};

/// Name of a booted VM's memory file, as `/proc` shows it.
const RAM_NAME: &str = "vm-ram";

/// Name of a delta layer's file.
const DELTA_NAME: &str = "vm-delta";

/// Pages that any VM writes to.
const FEW_PAGES: u64 = 4;

/// Dirty pages for which one more thread is worth its start.
const PAGES_PER_WORKER: u64 = 1024;

/// Most files of a delta: each is a layer of the images to come, and a descriptor on the way to each copy.
pub(super) const MAX_DELTA_FILES: usize = 4;

/// Dirty memory in bytes from which on a VM goes on as a view of the image that it was copied to: what it
/// does not write to again is not copied again at its next fork, and takes no memory twice. To bring a VM
/// elsewhere takes as long as copying 1 MiB, and each page that it does write to again costs it a fault.
const MUCH_BYTES: u64 = 8 << 20;

/// The memory of one VM: an address range, and what is mapped there.
#[derive(Debug)]
pub struct GuestMemory {
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
    delta: Vec<Arc<File>>,
}

impl Plan {
    /// The files, lowest layer first.
    pub fn files(&self) -> &[Arc<File>] {
        &self.files
    }
}

/// What a VM has changed since its memory was an image.
#[derive(Debug)]
pub enum Changes {
    /// All: its memory was no image yet.
    Whole,
    /// What an image consists of that shows it: so many pages of this VM's memory, over those of another
    /// image.
    Over {
        /// The image below.
        base: Image,
        /// The pages, packed in the file of a layer to come.
        runs: Vec<Run>,
    },
}

/// Whether a VM is rebased onto the image that was made of it: whether it goes on as a private view of that
/// image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebase {
    /// It keeps its memory.
    No,
    /// It is, if it can be: that saves memory, and work at the next fork.
    Preferred,
    /// It has to be: its memory is the image now.
    Required,
}

impl Changes {
    /// Whether the VM is rebased.
    pub fn rebase(&self) -> Rebase {
        match self {
            Self::Whole => Rebase::Required,
            Self::Over { runs, .. } if pages(runs) * PAGE_BYTES >= MUCH_BYTES => Rebase::Preferred,
            Self::Over { .. } => Rebase::No,
        }
    }
}

/// How many pages packed runs have.
fn pages(runs: &[Run]) -> u64 {
    runs.last().map_or(0, |run| run.file_page + run.pages)
}

impl GuestMemory {
    /// The empty memory of a VM that is about to boot, in `mapping`.
    ///
    /// # Errors
    /// [`Error::Map`] or [`Error::File`] where there is no room for it.
    pub fn own(mapping: Arc<Mapping>) -> Result<Self, Error> {
        let file = memfd::unsealed(RAM_NAME, mapping.bytes() as u64)?;
        mapping.map_shared(&file)?;
        Ok(Self { mapping, backing: Backing::Own(Arc::new(file)) })
    }

    /// A private view of an image, in this range.
    ///
    /// # Errors
    /// [`Error::Map`] where a piece of it can't be mapped.
    pub fn of_image(image: Arc<Image>, premapped: impl Into<PremappedRam>) -> Result<Self, Error> {
        let premapped = premapped.into();
        image.map_private(&premapped)?;
        Ok(Self { mapping: premapped.into_mapping(), backing: Backing::Image(image) })
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

    /// Names the files that an image made now will consist of. `delta` are those for pages that the VM has
    /// written to, if there are any.
    pub fn plan(&self, delta: &Delta) -> Plan {
        match &self.backing {
            Backing::Own(file) => Plan { files: vec![Arc::clone(file)], delta: Vec::new() },
            Backing::Image(image) => {
                let layers = image.layers().iter().map(|layer| &layer.file);
                Plan { files: layers.chain(&delta.0).map(Arc::clone).collect(), delta: delta.0.clone() }
            }
        }
    }

    /// What the VM has changed since it was mapped. It must be stopped.
    ///
    /// # Errors
    /// [`Error::PageMap`].
    pub fn changes(&self, page_map: &PageMap) -> Result<Changes, Error> {
        let Backing::Image(image) = &self.backing else { return Ok(Changes::Whole) };
        let dirty = page_map.dirty_runs(&self.mapping)?;
        if dirty.is_empty() {
            return Ok(Changes::Over { base: Image::clone(image), runs: dirty });
        }
        let (base, upper) = image.delta_base()?;
        let runs = dirty::join_for(&base, dirty::union(&dirty, &upper));
        Ok(Changes::Over { base, runs })
    }

    /// Makes an image of the memory as it is now, with these changes. The VM must still be stopped.
    ///
    /// # Errors
    /// [`Error`]: the VM may go on as if nothing had happened.
    pub fn freeze(&self, plan: Plan, changes: Changes) -> Result<Arc<Image>, Error> {
        let image = match (&self.backing, changes) {
            (Backing::Own(file), _) => {
                let pages = self.mapping.bytes() as u64 / PAGE_BYTES;
                memfd::seal_future(RAM_NAME, file)?;
                Image::new(pages, vec![Arc::new(Layer::whole(Arc::clone(file), pages))])?
            }
            (_, Changes::Over { base, runs }) if !runs.is_empty() => {
                base.with_layers(self.copy_out(&runs, plan.delta)?)?
            }
            (Backing::Image(image), _) => return Ok(Arc::clone(image)),
        };
        Ok(Arc::new(image))
    }

    /// Writes runs of this memory to layers in these files: to one where they are few; else on several
    /// processors, each to a file of its own, since a file takes one write at a time.
    fn copy_out(&self, runs: &[Run], files: Vec<Arc<File>>) -> Result<Vec<Layer>, Error> {
        let most = usize::try_from(pages(runs) / PAGES_PER_WORKER).unwrap_or(usize::MAX);
        let workers = files.len().min(most).max(1);
        let layers: Vec<Layer> =
            files.into_iter().zip(shares(runs, workers)).map(|(file, runs)| Layer { file, runs }).collect();
        thread::scope(|scope| {
            let Some((own, others)) = layers.split_first() else { return Ok(()) };
            let others: Vec<_> = others.iter().map(|layer| scope.spawn(|| self.write_out(layer))).collect();
            let done = self.write_out(own);
            others.into_iter().fold(done, |done, other| done.and(other.join().unwrap_or(Err(Error::Worker))))
        })?;
        Ok(layers)
    }

    fn write_out(&self, layer: &Layer) -> Result<(), Error> {
        for run in &layer.runs {
            let (at, bytes) = (to_usize(run.page * PAGE_BYTES)?, to_usize(run.pages * PAGE_BYTES)?);
            self.mapping.write_to(at, bytes, &layer.file, run.file_page * PAGE_BYTES)?;
        }
        memfd::seal_future(DELTA_NAME, &layer.file)
    }
}

/// The runs in so many shares of one size, or fewer, each packed in a file of its own.
fn shares(runs: &[Run], count: usize) -> Vec<Vec<Run>> {
    let most_pages = pages(runs).div_ceil(u64::try_from(count.max(1)).unwrap_or(1));
    let (mut shares, mut share, mut taken_pages) = (Vec::with_capacity(count), Vec::new(), 0);
    for run in runs {
        let (mut page, end) = (run.page, run.end());
        while page < end {
            let pages = (end - page).min(most_pages - taken_pages);
            share.push(Run { page, pages, file_page: taken_pages });
            (page, taken_pages) = (page + pages, taken_pages + pages);
            if taken_pages == most_pages {
                shares.push(std::mem::take(&mut share));
                taken_pages = 0;
            }
        }
    }
    if !share.is_empty() {
        shares.push(share);
    }
    shares
}

/// Empty files for the pages that a VM has written to: one for each processor that may copy them.
#[derive(Debug)]
pub struct Delta(Vec<Arc<File>>);

impl Delta {
    /// New ones.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn new() -> Result<Self, Error> {
        let files = threads::processors().min(MAX_DELTA_FILES);
        (0..files).map(|_| memfd::unsealed(DELTA_NAME, 0).map(Arc::new)).collect::<Result<_, _>>().map(Self)
    }

    /// Takes the memory from the host that is needed for the few pages that any VM writes to before it forks
    /// (fallocate). The files stay empty.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn warm_up(&self) -> Result<(), Error> {
        let Some(first) = self.0.first() else { return Ok(()) };
        fallocate(first, FallocateFlags::KEEP_SIZE, 0, FEW_PAGES * PAGE_BYTES).map_err(|errno| Error::File {
            operation: "take memory for",
            name: DELTA_NAME.to_owned(),
            source: errno.into(),
        })
    }
}

fn to_usize(bytes: u64) -> Result<usize, Error> {
    usize::try_from(bytes).map_err(|_| Error::Invalid("the memory's size is out of range"))
}

#[cfg(test)]
#[path = "guest_memory_test.rs"]
mod tests;
