//! An immutable image of a guest's memory: layers of memory files, each one over the ones before it.

use std::{fs::File, sync::Arc};

use serde::{Deserialize, Serialize};
use types::{MAX_RAM_BYTES, PAGE_BYTES};

use super::{Error, PremappedRam};

/// Most pieces that an image may consist of: each costs every VM that maps it a mapping, of which Linux
/// allows a process 65,530 by default (vm.max_map_count).
pub const MAX_EXTENTS: usize = 32_768;

/// Most layers of one image, so that its file descriptors fit into one message (Linux's SCM_MAX_FD is 253).
pub const MAX_LAYERS: usize = 200;

/// From so many layers on, the next one takes in all that lie over the lowest one: each costs every VM a
/// descriptor on its way.
const MANY_LAYERS: usize = 32;

/// Pages that may be held and not show, 4 MiB, whatever the size of an image.
const FEW_PAGES: u64 = 1024;

/// From so many pieces on, likewise.
const MANY_EXTENTS: usize = MAX_EXTENTS / 2;

/// Consecutive pages of the guest's memory that a layer holds, packed in the layer's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// First page of the guest's memory.
    pub page: u64,
    /// Number of pages.
    pub pages: u64,
    /// Page of the layer's file with the first page's content.
    pub file_page: u64,
}

impl Run {
    /// Page of guest memory behind the last one.
    pub fn end(&self) -> u64 {
        self.page + self.pages
    }
}

/// A memory file and the pages that it holds: sorted, without overlap.
#[derive(Debug)]
pub struct Layer {
    /// The sealed file.
    pub file: Arc<File>,
    /// What it holds.
    pub runs: Vec<Run>,
}

impl Layer {
    /// A layer that holds all of a memory of `pages` pages.
    pub fn whole(file: Arc<File>, pages: u64) -> Self {
        Self { file, runs: vec![Run { page: 0, pages, file_page: 0 }] }
    }

    /// Checks that the runs are not empty, sorted, without overlap, within a memory of `pages` pages, and
    /// within the file: a page behind the file's end would be a SIGBUS in the VM that maps it.
    fn check(&self, pages: u64) -> Result<(), Error> {
        let stat = |source| Error::File { operation: "look at", name: "layer".to_owned(), source };
        let file_pages = self.file.metadata().map_err(stat)?.len() / PAGE_BYTES;
        let mut free_from = 0;
        for run in &self.runs {
            let end = run.page.checked_add(run.pages);
            if run.pages == 0 || run.page < free_from || end.is_none_or(|end| end > pages) {
                return Err(Error::Invalid("a layer's runs are not sorted or reach out of the memory"));
            }
            if run.file_page.checked_add(run.pages).is_none_or(|end| end > file_pages) {
                return Err(Error::Invalid("a layer's run reaches out of its file"));
            }
            free_from = run.page + run.pages;
        }
        Ok(())
    }
}

/// A piece of an image: a run, and the layer that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Index of the layer.
    pub layer: usize,
    /// The pages.
    pub run: Run,
}

/// An image: all of a guest's memory at one instant. Layers are shared between the images that build on them.
#[derive(Debug, Clone)]
pub struct Image {
    pages: u64,
    layers: Vec<Arc<Layer>>,
    extents: Vec<Extent>,
}

impl Image {
    /// An image of `pages` pages of guest memory from its layers, lowest first.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the layers do not cover the memory exactly, have unsorted runs, or are too
    /// many.
    pub fn new(pages: u64, layers: Vec<Arc<Layer>>) -> Result<Self, Error> {
        if layers.len() > MAX_LAYERS {
            return Err(Error::Invalid("too many layers"));
        }
        if pages == 0 || pages > MAX_RAM_BYTES / PAGE_BYTES {
            return Err(Error::Invalid("the memory's size is out of range"));
        }
        let mut extents = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            layer.check(pages)?;
            extents = overlay(&extents, index, &layer.runs);
        }
        let mut covered = 0;
        for extent in &extents {
            if extent.run.page != covered {
                return Err(Error::Invalid("the layers leave a hole"));
            }
            covered = extent.run.end();
        }
        if covered != pages {
            return Err(Error::Invalid("the layers do not reach the end of the memory"));
        }
        if extents.len() > MAX_EXTENTS {
            return Err(Error::Invalid("too many pieces"));
        }
        Ok(Self { pages, layers, extents })
    }

    /// The base of the next delta, and the pages that the delta has to hold beside its own. That is this
    /// image and none; where it has many layers or extents, or most pages of its layers are hidden, its
    /// lowest layer and all pages above that, which compacts the chain.
    ///
    /// # Errors
    /// As [`Image::new`].
    pub fn delta_base(&self) -> Result<(Self, Vec<Run>), Error> {
        let upper = || self.extents.iter().filter(|extent| extent.layer > 0).map(|extent| extent.run);
        let showing_pages: u64 = upper().map(|run| run.pages).sum();
        let held_pages: u64 =
            self.layers.iter().skip(1).flat_map(|layer| &layer.runs).map(|run| run.pages).sum();
        let is_wasteful = held_pages > 2 * showing_pages + FEW_PAGES;
        if self.layers.len() < MANY_LAYERS && self.extents.len() < MANY_EXTENTS && !is_wasteful {
            return Ok((self.clone(), Vec::new()));
        }
        let lowest = Self::new(self.pages, self.layers[..1].to_vec())?;
        Ok((lowest, upper().collect()))
    }

    /// This image with more layers over it. Layers of which nothing shows any more are left out, but for the
    /// lowest one.
    ///
    /// # Errors
    /// As [`Image::new`].
    pub fn with_layers(&self, layers: Vec<Layer>) -> Result<Self, Error> {
        let layers: Vec<_> = self.layers.iter().cloned().chain(layers.into_iter().map(Arc::new)).collect();
        let image = Self::new(self.pages, layers)?;
        let mut shows = vec![false; image.layers.len()];
        shows[0] = true;
        image.extents.iter().for_each(|extent| shows[extent.layer] = true);
        if shows.iter().all(|shows| *shows) {
            return Ok(image);
        }
        let showing = image.layers.into_iter().zip(shows).filter_map(|(layer, shows)| shows.then_some(layer));
        Self::new(self.pages, showing.collect())
    }

    /// Size of the guest's memory in pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The layers, lowest first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// Where each page's content is: sorted, and without holes or overlap.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Where a page of the guest's memory is: number of the layer, and page of its file.
    pub fn find(&self, page: u64) -> Option<(usize, u64)> {
        let at = self.extents.partition_point(|extent| extent.run.end() <= page);
        let Extent { layer, run } = self.extents.get(at).filter(|extent| extent.run.page <= page)?;
        Some((*layer, run.file_page + (page - run.page)))
    }

    /// Maps all of the image as a private view.
    ///
    /// # Errors
    /// [`Error::Map`] where a piece can't be mapped.
    pub(super) fn map_private(&self, premapped: &PremappedRam) -> Result<(), Error> {
        self.extents.iter().try_for_each(|Extent { layer, run }| {
            premapped.map(run.page, run.pages, &self.layers[*layer].file, run.file_page)
        })
    }
}

/// The pieces of `below` with `runs` of `layer` laid over them. Both are sorted and without overlap, and so
/// is the result.
fn overlay(below: &[Extent], layer: usize, runs: &[Run]) -> Vec<Extent> {
    let mut above = runs.iter().copied().peekable();
    let mut result = Vec::with_capacity(below.len() + 2 * runs.len());
    for extent in below {
        let mut rest = extent.run;
        while let Some(run) = above.peek().copied().filter(|run| run.page < rest.end()) {
            if run.page > rest.page {
                result.push(Extent { layer: extent.layer, run: Run { pages: run.page - rest.page, ..rest } });
            }
            if run.end() > rest.end() {
                // It reaches into the next piece: this one has nothing left to show.
                rest.pages = 0;
                break;
            }
            result.push(Extent { layer, run });
            above.next();
            let hidden = run.end().saturating_sub(rest.page);
            rest = Run {
                page: rest.page + hidden,
                pages: rest.pages - hidden,
                file_page: rest.file_page + hidden,
            };
        }
        if rest.pages > 0 {
            result.push(Extent { layer: extent.layer, run: rest });
        }
    }
    result.extend(above.map(|run| Extent { layer, run }));
    result
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 64;

    fn layer(runs: Vec<Run>) -> Arc<Layer> {
        let file = crate::memory::unsealed("test", PAGES * PAGE_BYTES).unwrap();
        Arc::new(Layer { file: Arc::new(file), runs })
    }

    /// Runs of the pages whose bit is set, packed in the file.
    fn packed(mask: u64) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (file_page, page) in (0..).zip((0..PAGES).filter(|page| mask >> page & 1 == 1)) {
            match runs.last_mut() {
                Some(run) if run.end() == page => run.pages += 1,
                _ => runs.push(Run { page, pages: 1, file_page }),
            }
        }
        runs
    }

    proptest! {
        /// The naive model: an array with, for each page, the layer and the file's page that show.
        #[test]
        fn extents_show_the_topmost_layer(masks in proptest::collection::vec(any::<u64>(), 0..6)) {
            let mut model: Vec<(usize, u64)> = (0..PAGES).map(|page| (0, page)).collect();
            let mut layers = vec![layer(vec![Run { page: 0, pages: PAGES, file_page: 0 }])];
            for mask in masks {
                let runs = packed(mask);
                for run in &runs {
                    for at in 0..run.pages {
                        model[usize::try_from(run.page + at).unwrap()] = (layers.len(), run.file_page + at);
                    }
                }
                layers.push(layer(runs));
            }
            let image = Image::new(PAGES, layers).unwrap();
            let shown: Vec<(usize, u64)> = image
                .extents()
                .iter()
                .flat_map(|extent| (0..extent.run.pages).map(|at| (extent.layer, extent.run.file_page + at)))
                .collect();
            let found: Vec<_> = (0..PAGES).map(|page| image.find(page).unwrap()).collect();
            prop_assert_eq!(&found, &model);
            prop_assert_eq!(image.find(PAGES), None);
            prop_assert_eq!(shown, model);
        }
    }

    fn owned(runs: Vec<Run>) -> Vec<Layer> {
        vec![Arc::into_inner(layer(runs)).unwrap()]
    }

    #[test]
    fn a_layer_that_does_not_show_any_more_is_let_go() {
        let run = |page, pages| vec![Run { page, pages, file_page: 0 }];
        let lowest = Image::new(PAGES, vec![layer(run(0, PAGES))]).unwrap();
        let one = lowest.with_layers(owned(run(3, 4))).unwrap();
        assert_eq!(one.layers().len(), 2);
        // Some of it still shows, then nothing.
        let two = one.with_layers(owned(run(4, 10))).unwrap();
        assert_eq!(two.layers().len(), 3);
        let three = two.with_layers(owned(run(3, 1))).unwrap();
        assert_eq!(three.layers().len(), 3);
        // The lowest one stays: it is what others are laid on.
        let all = three.with_layers(owned(run(0, PAGES))).unwrap();
        assert_eq!(all.layers().len(), 2);
        assert!(Arc::ptr_eq(&all.layers()[0], &lowest.layers()[0]));
    }

    #[test]
    fn what_mostly_does_not_show_is_folded() {
        const MANY: u64 = 4 * FEW_PAGES;
        let file = || Arc::new(crate::memory::unsealed("test", MANY * PAGE_BYTES).unwrap());
        let part = |page, pages| vec![Layer { file: file(), runs: vec![Run { page, pages, file_page: 0 }] }];
        let mut image = Image::new(MANY, vec![Arc::new(Layer::whole(file(), MANY))]).unwrap();
        // Each hides all of the one before it but a page.
        for page in 0..3 {
            assert_eq!(image.delta_base().unwrap().1, []);
            image = image.with_layers(part(page, MANY - 10)).unwrap();
        }
        image = image.with_layers(part(3, MANY - 10)).unwrap();
        let (base, upper) = image.delta_base().unwrap();
        assert_eq!(base.layers().len(), 1);
        assert_eq!(upper.iter().map(|run| run.pages).sum::<u64>(), MANY - 7);
    }

    #[test]
    fn a_bad_description_is_refused() {
        let run = |page, pages, file_page| Run { page, pages, file_page };
        for (runs, why) in [
            (vec![], "nothing"),
            (vec![run(0, 63, 0)], "end missing"),
            (vec![run(1, 63, 0)], "start missing"),
            (vec![run(0, 65, 0)], "too long"),
            (vec![run(0, 64, 1)], "behind the file"),
            (vec![run(0, 64, u64::MAX)], "overflow in the file"),
            (vec![run(u64::MAX, 2, 0)], "overflow"),
            (vec![run(0, 0, 0), run(0, 64, 0)], "empty run"),
            (vec![run(32, 32, 0), run(0, 32, 32)], "unsorted"),
            (vec![run(0, 33, 0), run(32, 32, 32)], "overlap"),
        ] {
            assert!(Image::new(PAGES, vec![layer(runs)]).is_err(), "{why}");
        }
        assert!(Image::new(0, vec![]).is_err());
        assert!(Image::new(u64::MAX, vec![]).is_err());
    }
}
