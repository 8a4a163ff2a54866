//! Which pages a copy writes to first: recorded in one, and made ready in those that come after it.
//!
//! A guest's first write to a page costs it a fault in which the page is copied (measured: 18 us where KVM
//! shadows page tables). The host makes a page that is known beforehand for 2 us, beside the guest, and then
//! the guest's own fault takes 6 us.

use serde::{Deserialize, Serialize};
use types::PAGE_BYTES;

use super::{Error, Mapping, Run};

/// Most runs of a working set: what is scattered more than that would not fit into a message.
const MAX_RUNS: usize = 2048;

/// Most pages of a working set, 64 MiB: nobody knows whether a copy will use them all.
const MAX_PAGES: u64 = 16 * 1024;

/// Fewest pages of one that is filled: starting a thread for it, beside the guest, takes as long as the
/// faults that it saves.
const MIN_PAGES: u64 = 16;

/// Pages that are made at once.
const PAGES_AT_ONCE: u64 = 64;

/// A working set: runs of pages, each as its first page and how many they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet(Vec<(u64, u64)>);

impl WorkingSet {
    /// The first of these pages, for as many as a working set may have.
    pub fn new(runs: &[Run]) -> Self {
        let mut left = MAX_PAGES;
        let runs = runs.iter().take(MAX_RUNS).map(|run| {
            let pages = run.pages.min(left);
            left -= pages;
            (run.page, pages)
        });
        Self(runs.filter(|(_, pages)| *pages > 0).collect())
    }

    /// Whether it is no larger than one may be: it comes from a process in which a guest runs.
    pub fn is_valid(&self) -> bool {
        self.0.len() <= MAX_RUNS && self.pages().is_some_and(|pages| pages <= MAX_PAGES)
    }

    /// Whether it is large enough for a thread to be started for it.
    pub fn is_worthwhile(&self) -> bool {
        self.pages().is_none_or(|pages| pages >= MIN_PAGES)
    }

    /// Its runs: first page, and how many they are.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().copied()
    }

    fn pages(&self) -> Option<u64> {
        self.0.iter().try_fold(0u64, |sum, (_, pages)| sum.checked_add(*pages))
    }

    /// Makes the pages, in a private view, for as long as `goes_on` says so.
    ///
    /// # Errors
    /// [`Error::Invalid`] where they are not all within the mapping, [`Error::Map`] where there is no memory
    /// for them.
    pub fn prefault(&self, mapping: &Mapping, goes_on: impl Fn() -> bool) -> Result<(), Error> {
        let bytes = |pages: u64| {
            let bytes = pages.checked_mul(PAGE_BYTES).and_then(|bytes| usize::try_from(bytes).ok());
            bytes.ok_or(Error::Invalid("a working set reaches out of the memory"))
        };
        for &(first, pages) in &self.0 {
            // Piece by piece, so that the guest's own faults come in between.
            for at in (0..pages).step_by(usize::try_from(PAGES_AT_ONCE).unwrap_or(1)) {
                if !goes_on() {
                    return Ok(());
                }
                mapping.populate(bytes(first.saturating_add(at))?, bytes(PAGES_AT_ONCE.min(pages - at))?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{self, PageMap};

    fn run(page: u64, pages: u64) -> Run {
        Run { page, pages, file_page: 0 }
    }

    #[test]
    fn it_is_never_too_large() {
        let one = WorkingSet::new(&[run(0, MAX_PAGES + 1), run(u64::MAX, 1)]);
        assert_eq!(one.0, [(0, MAX_PAGES)]);
        let many: Vec<Run> =
            (0..u64::try_from(MAX_RUNS).unwrap() + 5).map(|number| run(2 * number, 1)).collect();
        assert_eq!(WorkingSet::new(&many).0.len(), MAX_RUNS);
        assert!(one.is_valid() && WorkingSet::new(&many).is_valid());
        assert!(!WorkingSet(vec![(0, MAX_PAGES + 1)]).is_valid());
        assert!(!WorkingSet(vec![(0, u64::MAX), (0, 2)]).is_valid());
        assert!(!WorkingSet(vec![(0, 1); MAX_RUNS + 1]).is_valid());
        assert!(one.is_worthwhile() && !WorkingSet(vec![(0, 1); 15]).is_worthwhile());
    }

    #[test]
    fn its_pages_become_the_views_own() {
        let file = memory::sealed("test", &[7; 200 * 4096]).unwrap();
        let mapping = Mapping::reserve(200 * 4096).unwrap();
        mapping.map_private(0, 200 * 4096, &file, 0).unwrap();
        WorkingSet(vec![(3, 2), (10, 130)]).prefault(&mapping, || true).unwrap();
        let own = PageMap::open().unwrap().dirty_runs(&mapping).unwrap();
        assert_eq!(own.iter().map(|run| (run.page, run.pages)).collect::<Vec<_>>(), [(3, 2), (10, 130)]);
        let mut byte = [0];
        mapping.read(10 * 4096, &mut byte).unwrap();
        assert_eq!(byte, [7]);
        for beyond in [(199, 2), (200, 1), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(WorkingSet(vec![beyond]).prefault(&mapping, || true).is_err());
        }
    }
}
