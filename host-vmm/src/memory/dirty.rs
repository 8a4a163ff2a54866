//! Which pages of a private view its VM has written to.
//!
//! A page that was written to is an anonymous copy: `/proc/self/pagemap` shows it present or swapped out, and not as a page of a
//! file (kernel documentation, admin-guide/mm/pagemap.rst).

use std::{fs::File, os::unix::fs::FileExt};

use super::{Error, Image, MAX_EXTENTS, Mapping, Run};
use crate::arch::layout::PAGE_BYTES;

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// Bytes of one entry of the page map.
const ENTRY_BYTES: usize = 8;

/// Entries read at once.
const CHUNK_ENTRIES: usize = 64 * 1024;

/// Gaps of up to so many pages between dirty ones are copied along: a mapping costs more than a few pages do.
const SHORT_GAP_PAGES: u64 = 8;

/// The pages that were written to since `mapping` became a private view: sorted runs, packed one behind another in a file to
/// come.
///
/// # Errors
/// [`Error::PageMap`] where the page map can't be read.
pub fn runs(mapping: &Mapping) -> Result<Vec<Run>, Error> {
    let page_map = File::open("/proc/self/pagemap").map_err(Error::PageMap)?;
    let page_bytes = usize::try_from(PAGE_BYTES).map_err(|_| Error::Invalid("page size"))?;
    let first = mapping.start().as_ptr() as usize / page_bytes;
    let pages = mapping.bytes() / page_bytes;
    let mut runs = Runs::default();
    let mut buffer = vec![0; CHUNK_ENTRIES.min(pages) * ENTRY_BYTES];
    for start in (0..pages).step_by(CHUNK_ENTRIES) {
        let entries = CHUNK_ENTRIES.min(pages - start);
        let bytes = &mut buffer[..entries * ENTRY_BYTES];
        let offset = ((first + start) * ENTRY_BYTES) as u64;
        page_map.read_exact_at(bytes, offset).map_err(Error::PageMap)?;
        for (page, entry) in (start as u64..).zip(bytes.as_chunks::<ENTRY_BYTES>().0) {
            if is_dirty(u64::from_ne_bytes(*entry)) {
                runs.push(page);
            }
        }
    }
    Ok(runs.0)
}

fn is_dirty(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0
}

/// Joins runs across short gaps, and across longer ones until an image of `base` and these has few enough pieces to be mapped.
pub fn join_for(base: &Image, mut runs: Vec<Run>) -> Vec<Run> {
    // Each run adds at most two pieces: itself, and the rest of the one that it cuts in two.
    let room = MAX_EXTENTS.saturating_sub(base.extents().len()) / 2;
    let mut gap = SHORT_GAP_PAGES;
    runs = join(&runs, gap);
    while runs.len() > room.max(1) {
        gap *= 2;
        runs = join(&runs, gap);
    }
    runs
}

/// Joins runs with up to `gap` pages between them.
fn join(runs: &[Run], gap: u64) -> Vec<Run> {
    let mut joined = Runs::default();
    for run in runs {
        match joined.0.last_mut() {
            Some(last) if run.page - last.end() <= gap => last.pages = run.end() - last.page,
            _ => joined.start(run.page, run.pages),
        }
    }
    joined.0
}

/// Runs that grow page by page.
#[derive(Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn push(&mut self, page: u64) {
        match self.0.last_mut() {
            Some(run) if run.end() == page => run.pages += 1,
            _ => self.start(page, 1),
        }
    }

    fn start(&mut self, page: u64, pages: u64) {
        let file_page = self.0.last().map_or(0, |run| run.file_page + run.pages);
        self.0.push(Run { page, pages, file_page });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_runs_are_joined_and_packed() {
        let mut dirty = Runs::default();
        for page in [0, 1, 2, 5, 20, 21] {
            dirty.push(page);
        }
        assert_eq!(
            join(&dirty.0, 2),
            [Run { page: 0, pages: 6, file_page: 0 }, Run { page: 20, pages: 2, file_page: 6 }]
        );
        assert_eq!(join(&dirty.0, 100), [Run { page: 0, pages: 22, file_page: 0 }]);
    }

    #[test]
    fn dirty_means_an_anonymous_page() {
        assert!(is_dirty(PRESENT));
        assert!(is_dirty(SWAPPED));
        assert!(!is_dirty(PRESENT | OF_A_FILE));
        assert!(!is_dirty(0));
    }
}
