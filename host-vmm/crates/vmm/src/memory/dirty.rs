//! Which pages of a private view its VM has written to.
//!
//! A page that was written to is an anonymous copy: the kernel shows it present or swapped out, and not as a
//! page of a file (kernel documentation, admin-guide/mm/pagemap.rst). Since Linux 6.7 one call gives the runs
//! of such pages (PAGEMAP_SCAN); it passes over what was never touched, and takes 30 us where reading
//! `/proc/self/pagemap` takes 800 us for 512 MiB (measured). Older kernels are read.

use std::{fs::File, io, os::fd::AsRawFd, os::unix::fs::FileExt};

use nix::errno::Errno;
use types::PAGE_BYTES;

use super::{Error, Image, MAX_DELTA_FILES, MAX_EXTENTS, Mapping, Run};

const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;

/// Bytes of one entry of the page map.
const ENTRY_BYTES: usize = 8;

/// Entries read at once.
const CHUNK_ENTRIES: usize = 64 * 1024;

/// Runs scanned at once.
const CHUNK_RUNS: usize = 1024;

/// Gaps of up to so many pages between dirty ones are copied along: a mapping costs more than a few pages do.
const SHORT_GAP_PAGES: u64 = 8;

/// This process's page map.
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::PageMap`].
    pub fn open() -> Result<Self, Error> {
        File::open("/proc/self/pagemap").map(Self).map_err(Error::PageMap)
    }

    /// The pages that were written to since `mapping` became a private view: sorted runs, packed one behind
    /// another in a file to come.
    ///
    /// # Errors
    /// [`Error::PageMap`] where the page map can't be read.
    pub fn dirty_runs(&self, mapping: &Mapping) -> Result<Vec<Run>, Error> {
        match scan(&self.0, mapping) {
            Err(Errno::ENOTTY) => read(&self.0, mapping).map_err(Error::PageMap),
            other => other.map_err(|errno| Error::PageMap(errno.into())),
        }
    }
}

/// The kernel's `struct pm_scan_arg` and `struct page_region` (linux/fs.h).
mod abi {
    /// Categories of pages.
    pub(super) const PAGE_IS_FILE: u64 = 1 << 2;
    pub(super) const PAGE_IS_PRESENT: u64 = 1 << 3;
    pub(super) const PAGE_IS_SWAPPED: u64 = 1 << 4;

    /// What to look for, and where to write it.
    #[repr(C)]
    #[derive(Debug, Default)]
    pub(super) struct ScanArguments {
        pub(super) size: u64,
        pub(super) flags: u64,
        pub(super) start: u64,
        pub(super) end: u64,
        /// Where the scan has stopped.
        pub(super) walk_end: u64,
        pub(super) regions: u64,
        pub(super) regions_len: u64,
        pub(super) max_pages: u64,
        pub(super) category_inverted: u64,
        pub(super) category_mask: u64,
        pub(super) category_anyof_mask: u64,
        pub(super) return_mask: u64,
    }

    /// Consecutive pages.
    #[repr(C)]
    #[derive(Debug, Default, Clone, Copy)]
    pub(super) struct PageRegion {
        pub(super) start: u64,
        pub(super) end: u64,
        pub(super) categories: u64,
    }

    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArguments);
}

/// Finds the runs by PAGEMAP_SCAN.
fn scan(page_map: &File, mapping: &Mapping) -> nix::Result<Vec<Run>> {
    let first = mapping.start().addr().get() as u64;
    let end = first + mapping.bytes() as u64;
    let mut regions = vec![abi::PageRegion::default(); CHUNK_RUNS];
    let mut arguments = abi::ScanArguments {
        size: size_of::<abi::ScanArguments>() as u64,
        start: first,
        end,
        regions: regions.as_mut_ptr().expose_provenance() as u64,
        regions_len: CHUNK_RUNS as u64,
        category_inverted: abi::PAGE_IS_FILE,
        category_mask: abi::PAGE_IS_FILE,
        category_anyof_mask: abi::PAGE_IS_PRESENT | abi::PAGE_IS_SWAPPED,
        // The same of all pages that are found, so that neighbours are one region.
        return_mask: abi::PAGE_IS_FILE,
        ..Default::default()
    };
    let mut runs = Runs::default();
    while arguments.start < end {
        // SAFETY: `arguments` names its own size, and a buffer that lives across the call and is as long as
        // it says.
        let found = unsafe { abi::pagemap_scan(page_map.as_raw_fd(), &raw mut arguments) }?;
        for region in regions.iter().take(usize::try_from(found).unwrap_or(0)) {
            runs.extend((region.start - first) / PAGE_BYTES, (region.end - region.start) / PAGE_BYTES);
        }
        if arguments.walk_end <= arguments.start {
            return Err(Errno::EIO);
        }
        arguments.start = arguments.walk_end;
    }
    Ok(runs.0)
}

/// Finds the runs by reading the page map entry by entry.
fn read(page_map: &File, mapping: &Mapping) -> io::Result<Vec<Run>> {
    let page_bytes = usize::try_from(PAGE_BYTES).map_err(io::Error::other)?;
    let first = mapping.start().addr().get() / page_bytes;
    let pages = mapping.bytes() / page_bytes;
    let mut runs = Runs::default();
    let mut buffer = vec![0; CHUNK_ENTRIES.min(pages) * ENTRY_BYTES];
    for start in (0..pages).step_by(CHUNK_ENTRIES) {
        let entries = CHUNK_ENTRIES.min(pages - start);
        let bytes = &mut buffer[..entries * ENTRY_BYTES];
        let offset = ((first + start) * ENTRY_BYTES) as u64;
        page_map.read_exact_at(bytes, offset)?;
        for (page, entry) in (start as u64..).zip(bytes.as_chunks::<ENTRY_BYTES>().0) {
            if is_dirty(u64::from_ne_bytes(*entry)) {
                runs.extend(page, 1);
            }
        }
    }
    Ok(runs.0)
}

fn is_dirty(entry: u64) -> bool {
    entry & (PRESENT | SWAPPED) != 0 && entry & OF_A_FILE == 0
}

/// Joins runs across short gaps, and across longer ones until an image of `base` and these has few enough
/// pieces to be mapped.
pub fn join_for(base: &Image, mut runs: Vec<Run>) -> Vec<Run> {
    // Each run adds at most two pieces: itself, and the rest of the one that it cuts in two. Where the next
    // file begins, a run is cut too.
    let room = MAX_EXTENTS.saturating_sub(base.extents().len() + MAX_DELTA_FILES) / 2;
    let mut gap = SHORT_GAP_PAGES;
    runs = join(&runs, gap);
    while runs.len() > room.max(1) {
        gap *= 2;
        runs = join(&runs, gap);
    }
    runs
}

/// The pages of both, each once. Both are sorted and without overlap, and so is the result.
pub fn union(one: &[Run], other: &[Run]) -> Vec<Run> {
    let mut all: Vec<&Run> = one.iter().chain(other).collect();
    all.sort_unstable_by_key(|run| run.page);
    let mut union: Vec<Run> = Vec::with_capacity(all.len());
    for run in all {
        match union.last_mut() {
            Some(last) if run.page <= last.end() => last.pages = last.pages.max(run.end() - last.page),
            _ => union.push(*run),
        }
    }
    join(&union, 0)
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

/// Runs that grow at their end.
#[derive(Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn extend(&mut self, page: u64, pages: u64) {
        match self.0.last_mut() {
            Some(run) if run.end() == page => run.pages += pages,
            _ => self.start(page, pages),
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
    use crate::memory;

    #[test]
    fn close_runs_are_joined_and_packed() {
        let mut dirty = Runs::default();
        for page in [0, 1, 2, 5, 20, 21] {
            dirty.extend(page, 1);
        }
        assert_eq!(
            join(&dirty.0, 2),
            [Run { page: 0, pages: 6, file_page: 0 }, Run { page: 20, pages: 2, file_page: 6 }]
        );
        assert_eq!(join(&dirty.0, 100), [Run { page: 0, pages: 22, file_page: 0 }]);
    }

    #[test]
    fn a_union_has_each_page_once() {
        let runs = |pages: &[(u64, u64)]| -> Vec<Run> {
            pages.iter().map(|&(page, pages)| Run { page, pages, file_page: 77 }).collect()
        };
        let union = union(&runs(&[(0, 2), (10, 5), (30, 1)]), &runs(&[(2, 1), (8, 20), (40, 1)]));
        let run = |page, pages, file_page| Run { page, pages, file_page };
        assert_eq!(union, [run(0, 3, 0), run(8, 20, 3), run(30, 1, 23), run(40, 1, 24)]);
    }

    #[test]
    fn both_ways_find_what_was_written() {
        const PAGES: usize = 9000;
        let file = memory::unsealed("test", PAGES as u64 * PAGE_BYTES).unwrap();
        let mapping = Mapping::reserve(PAGES * 4096).unwrap();
        mapping.map_private(0, PAGES * 4096, &file, 0).unwrap();
        let mut byte = [0];
        for page in 0..PAGES {
            match page % 7 {
                // More runs than one call gives.
                0 | 1 if page != 700 => mapping.write(page * 4096, &[1]).unwrap(),
                2 => mapping.read(page * 4096, &mut byte).unwrap(),
                _ => {}
            }
        }
        let page_map = File::open("/proc/self/pagemap").unwrap();
        let expected = read(&page_map, &mapping).unwrap();
        let pages = expected.iter().flat_map(|run| run.page..run.end());
        assert!(pages.eq((0..PAGES as u64).filter(|page| page % 7 < 2 && *page != 700)));
        match scan(&page_map, &mapping) {
            Ok(runs) => assert_eq!(runs, expected),
            Err(Errno::ENOTTY) => eprintln!("SKIPPED: PAGEMAP_SCAN needs Linux 6.7"),
            Err(errno) => panic!("{errno}"),
        }
    }

    #[test]
    fn dirty_means_an_anonymous_page() {
        assert!(is_dirty(PRESENT));
        assert!(is_dirty(SWAPPED));
        assert!(!is_dirty(PRESENT | OF_A_FILE));
        assert!(!is_dirty(0));
    }
}
