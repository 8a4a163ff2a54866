//! One VM's view of its memory, and how it is frozen into an image.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use super::{Error, Image, Layer, Mapping, Run, dirty, memfd};
use crate::arch::layout::PAGE_BYTES;

/// Name of a booted VM's memory file, as `/proc` shows it.
const RAM_NAME: &str = "vm-ram";

/// Name of a delta layer's file.
const DELTA_NAME: &str = "vm-delta";

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

    /// Names the files that an image made now will consist of.
    pub fn plan(&self) -> Result<Plan, Error> {
        match &self.backing {
            Backing::Own(file) => Ok(Plan { files: vec![Arc::clone(file)], delta: None }),
            Backing::Image(image) => {
                let delta = Arc::new(memfd::unsealed(DELTA_NAME, 0)?);
                let mut files: Vec<_> = image.layers().iter().map(|layer| Arc::clone(&layer.file)).collect();
                files.push(Arc::clone(&delta));
                Ok(Plan { files, delta: Some(delta) })
            }
        }
    }

    /// Makes an image of the memory as it is now. The VM must be stopped.
    pub fn freeze(&self, plan: Plan) -> Result<Arc<Image>, Error> {
        match &self.backing {
            Backing::Own(file) => {
                let pages = self.mapping.bytes() as u64 / PAGE_BYTES;
                memfd::seal_future(RAM_NAME, file)?;
                Ok(Arc::new(Image::new(pages, vec![Arc::new(Layer::whole(Arc::clone(file), pages))])?))
            }
            Backing::Image(image) => {
                let Some(delta) = plan.delta else { return Ok(Arc::clone(image)) };
                Ok(Arc::new(self.with_delta(image, delta)?))
            }
        }
    }

    /// `image` with the pages that this VM has written since it was mapped.
    fn with_delta(&self, image: &Image, file: Arc<File>) -> Result<Image, Error> {
        let runs = dirty::join_for(image, dirty::runs(&self.mapping)?);
        let pages = runs.last().map_or(0, |run| run.file_page + run.pages);
        if pages == 0 {
            return Ok(image.clone());
        }
        file.set_len(pages * PAGE_BYTES).map_err(|source| Error::File {
            operation: "grow",
            name: DELTA_NAME.to_owned(),
            source,
        })?;
        for run in &runs {
            self.copy_out(run, &file)?;
        }
        memfd::seal_unmapped(DELTA_NAME, &file)?;
        image.with_layer(Layer { file, runs })
    }

    fn copy_out(&self, run: &Run, file: &File) -> Result<(), Error> {
        let at = to_usize(run.page * PAGE_BYTES)?;
        let bytes = to_usize(run.pages * PAGE_BYTES)?;
        if at + bytes > self.mapping.bytes() {
            return Err(Error::Invalid("a dirty run reaches out of the memory"));
        }
        // SAFETY: the run lies within the mapping, as just checked.
        let start = unsafe { self.mapping.start().byte_add(at) };
        // SAFETY: all of the mapping is mapped readable, and the VM is stopped (the contract of `freeze`): nobody writes to it.
        let content = unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) };
        file.write_all_at(content, run.file_page * PAGE_BYTES).map_err(|source| Error::File {
            operation: "write",
            name: DELTA_NAME.to_owned(),
            source,
        })
    }
}

/// Seals a file for good.
pub fn seal_for_good(file: &File) -> Result<(), Error> {
    memfd::seal_unmapped(RAM_NAME, file)
}

fn to_usize(bytes: u64) -> Result<usize, Error> {
    usize::try_from(bytes).map_err(|_| Error::Invalid("the memory's size is out of range"))
}

#[cfg(test)]
#[path = "view_test.rs"]
mod tests;
