//! RAM of a machine that has no content yet, with the lowest layer of an image to come mapped beforehand.
//!
//! A warm VM that stands by for a parent's next fork has the files of the image to come. Most of that image
//! is its lowest layer, as a rule, and the pages that copies write to first are known. So the warm VM maps
//! that layer, and makes those pages its own, while it waits: the guest finds them there. What turns out to
//! be in other layers is mapped over it.

use std::{fs::File, sync::Arc};

use types::PAGE_BYTES;

use super::{Error, Mapping, WorkingSet, memfd};

/// The address range of a guest's memory to come, and the base layer that is mapped over all of it already,
/// if any.
#[derive(Debug)]
pub struct PremappedRam {
    mapping: Arc<Mapping>,
    /// Whether anything may be mapped.
    is_mapped: bool,
    file: Option<Arc<File>>,
}

impl From<Arc<Mapping>> for PremappedRam {
    /// A range in which nothing is mapped.
    fn from(mapping: Arc<Mapping>) -> Self {
        Self { mapping, is_mapped: false, file: None }
    }
}

impl PremappedRam {
    /// Maps the lowest layer of an image to come, private, over what was there.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the file can change, or is not as large as the memory, [`Error::Map`] where
    /// it can't be mapped.
    pub fn premap_base(&mut self, lowest: &Arc<File>) -> Result<(), Error> {
        if self.file.as_ref().is_some_and(|file| Arc::ptr_eq(file, lowest)) {
            return Ok(());
        }
        let bytes = self.mapping.bytes();
        // A page behind the file's end would be a SIGBUS. In this order: once it is sealed, it keeps its
        // length.
        if !memfd::is_frozen(lowest)? || memfd::length(lowest)? < bytes as u64 {
            return Err(Error::Invalid("the lowest layer can change, or does not cover the memory"));
        }
        // Where it can't be mapped, nobody knows what is there.
        (self.is_mapped, self.file) = (true, None);
        self.mapping.map_over(0, bytes, lowest, 0)?;
        self.file = Some(Arc::clone(lowest));
        Ok(())
    }

    /// Makes the pages of a working set its own, for as long as `goes_on` says so.
    ///
    /// # Errors
    /// As [`WorkingSet::prefault`].
    pub fn prefault(&self, working_set: &WorkingSet, goes_on: impl Fn() -> bool) -> Result<(), Error> {
        if self.file.is_some() { working_set.prefault(&self.mapping, goes_on) } else { Ok(()) }
    }

    /// Maps consecutive pages of a layer, private: pages of the memory from `page` on, which are those of the
    /// file from `file_page` on.
    ///
    /// # Errors
    /// [`Error::Invalid`] where they are not within the memory, [`Error::Map`] where they can't be mapped.
    pub(super) fn map(&self, page: u64, pages: u64, file: &Arc<File>, file_page: u64) -> Result<(), Error> {
        let bytes = |pages: u64| {
            let bytes = pages.checked_mul(PAGE_BYTES).and_then(|bytes| usize::try_from(bytes).ok());
            bytes.ok_or(Error::Invalid("the memory is too large"))
        };
        match &self.file {
            Some(base) if Arc::ptr_eq(base, file) && page == file_page => Ok(()),
            _ if self.is_mapped => {
                self.mapping.map_over(bytes(page)?, bytes(pages)?, file, file_page * PAGE_BYTES)
            }
            _ => self.mapping.map_private(bytes(page)?, bytes(pages)?, file, file_page * PAGE_BYTES),
        }
    }

    /// Its first address.
    pub fn start(&self) -> usize {
        self.mapping.start().addr().get()
    }

    /// The range.
    pub fn into_mapping(self) -> Arc<Mapping> {
        self.mapping
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, GuestMemory, Image, Layer, PageMap, Run};

    const PAGES: u64 = 64;
    const PAGE: usize = 4096;

    fn file(value: u8, pages: u64) -> Arc<File> {
        let content: Vec<u8> =
            (0..pages).flat_map(|page| [value.wrapping_add(u8::try_from(page).unwrap()); PAGE]).collect();
        Arc::new(memory::sealed("test", &content).unwrap())
    }

    fn premapped() -> PremappedRam {
        Arc::new(Mapping::reserve(64 * PAGE).unwrap()).into()
    }

    fn image(lowest: &Arc<File>, upper: &Arc<File>) -> Arc<Image> {
        let upper = Layer { file: Arc::clone(upper), runs: vec![Run { page: 10, pages: 4, file_page: 0 }] };
        let layers = vec![Arc::new(Layer::whole(Arc::clone(lowest), PAGES)), Arc::new(upper)];
        Arc::new(Image::new(PAGES, layers).unwrap())
    }

    fn first_bytes(view: &GuestMemory) -> Vec<u8> {
        let byte = |page: usize| {
            let mut byte = [0];
            view.mapping().read(page * PAGE, &mut byte).unwrap();
            byte[0]
        };
        (0..64).map(byte).collect()
    }

    #[test]
    fn a_view_is_the_same_with_a_premapped_base_and_without() {
        let (lowest, other, upper) = (file(1, PAGES), file(101, PAGES), file(201, 4));
        let image = image(&lowest, &upper);
        let plain = GuestMemory::of_image(Arc::clone(&image), premapped()).unwrap();
        let expected = first_bytes(&plain);
        assert_eq!((expected[9], expected[10], expected[14]), (10, 201, 15));
        let working_set = WorkingSet::new(&[Run { page: 8, pages: 4, file_page: 0 }]);
        // The last one it was, another one, and one and then another.
        for files in [vec![&lowest], vec![&other], vec![&other, &lowest]] {
            let mut premapped = premapped();
            for file in files {
                premapped.premap_base(file).unwrap();
                premapped.prefault(&working_set, || true).unwrap();
            }
            let is_right = premapped.file.as_ref().is_some_and(|file| Arc::ptr_eq(file, &lowest));
            let view = GuestMemory::of_image(Arc::clone(&image), premapped).unwrap();
            let own = PageMap::open().unwrap().dirty_runs(view.mapping()).unwrap();
            let own: Vec<_> = own.iter().map(|run| (run.page, run.pages)).collect();
            assert_eq!(own, if is_right { vec![(8, 2)] } else { Vec::new() });
            assert_eq!(first_bytes(&view), expected);
        }
    }

    #[test]
    fn nothing_is_mapped_that_could_kill_who_uses_it() {
        let mut premapped = premapped();
        assert!(premapped.premap_base(&file(1, PAGES - 1)).is_err());
        assert!(
            premapped.premap_base(&Arc::new(memory::unsealed("test", PAGES * PAGE_BYTES).unwrap())).is_err()
        );
        premapped.prefault(&WorkingSet::new(&[Run { page: 0, pages: 1, file_page: 0 }]), || true).unwrap();
    }

    #[test]
    fn filling_stops_when_there_is_something_else_to_do() {
        let mut premapped = premapped();
        premapped.premap_base(&file(1, PAGES)).unwrap();
        premapped
            .prefault(&WorkingSet::new(&[Run { page: 0, pages: PAGES, file_page: 0 }]), || false)
            .unwrap();
        assert!(PageMap::open().unwrap().dirty_runs(&premapped.into_mapping()).unwrap().is_empty());
    }
}
