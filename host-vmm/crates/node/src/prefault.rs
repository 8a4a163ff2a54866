//! Prefault of the pages of the program that nodes run.
//!
//! A process that was forked has its parent's pages, but has to ask for most of them again: for those of the
//! program's file, one page fault for each 64 KiB, and for what it writes to, one for each page. A node takes
//! 90 of them until it runs, 450 us in all (measured). Asked for all at once, they cost a tenth of that.

use std::{fs, fs::File, io, ops::Range, os::unix::fs::FileExt};

use vmm::memory::{self, Access};

/// How much of its stack a node uses until its VM runs, in bytes.
const STACK_BYTES: usize = 64 << 10;

const PAGE_BYTES: usize = 4096;

/// Bytes of one entry of the page map, and the bit of those that are present (kernel documentation,
/// admin-guide/mm/pagemap.rst).
const ENTRY_BYTES: usize = 8;
const PRESENT: u64 = 1 << 63;

/// Gaps of up to so many pages between those that are used are asked for too: asking once more costs as much.
const SHORT_GAP_PAGES: usize = 32;

/// Pages that nodes will use: the same addresses in each, since all are forked from one process.
#[derive(Debug)]
pub(super) struct PrefaultSet {
    ranges: Vec<(Range<usize>, Access)>,
}

impl PrefaultSet {
    /// Those of this process: of what it only reads or runs, as much as it has used by now.
    pub(super) fn of_this_process() -> io::Result<Self> {
        let maps = fs::read_to_string("/proc/self/maps")?;
        let page_map = File::open("/proc/self/pagemap")?;
        let mut ranges = Vec::new();
        for (range, access) in maps.lines().filter_map(needed) {
            match access {
                Access::Read => {
                    ranges.extend(present(&page_map, range)?.into_iter().map(|range| (range, access)))
                }
                Access::Write => ranges.push((range, access)),
            }
        }
        Ok(Self { ranges })
    }

    /// Prefaults them. What can't be had now will be asked for when it is used.
    pub(super) fn prefault(&self) {
        for (range, access) in &self.ranges {
            if let Err(error) = memory::populate(range.clone(), *access) {
                tracing::debug!(%error, "a node's pages can't be asked for beforehand");
            }
        }
    }
}

/// The parts of a range that are present, with short gaps between them.
fn present(page_map: &File, range: Range<usize>) -> io::Result<Vec<Range<usize>>> {
    let mut entries = vec![0; range.len() / PAGE_BYTES * ENTRY_BYTES];
    page_map.read_exact_at(&mut entries, (range.start / PAGE_BYTES * ENTRY_BYTES) as u64)?;
    let mut parts: Vec<Range<usize>> = Vec::new();
    for (start, entry) in (range.start..).step_by(PAGE_BYTES).zip(entries.as_chunks::<ENTRY_BYTES>().0) {
        if u64::from_ne_bytes(*entry) & PRESENT == 0 {
            continue;
        }
        match parts.last_mut() {
            Some(last) if start - last.end <= SHORT_GAP_PAGES * PAGE_BYTES => last.end = start + PAGE_BYTES,
            _ => parts.push(start..start + PAGE_BYTES),
        }
    }
    Ok(parts)
}

/// The part of a line of `/proc/self/maps` that nodes use, and how.
fn needed(line: &str) -> Option<(Range<usize>, Access)> {
    let mut words = line.split_ascii_whitespace();
    let (range, access, name) = (words.next()?, words.next()?, words.nth(3)?);
    let (start, end) = range.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    // A memory file is a guest's.
    let is_of_program = name.starts_with('/') && !name.starts_with("/memfd:");
    match access {
        "r-xp" | "r--p" if is_of_program => Some((range, Access::Read)),
        "rw-p" if is_of_program || name == "[heap]" => Some((range, Access::Write)),
        "rw-p" if name == "[stack]" => {
            Some((range.end.saturating_sub(STACK_BYTES).max(range.start)..range.end, Access::Write))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let code = "7f0000001000-7f0000003000 r-xp 00001000 fe:00 123 /usr/bin/host-vmm";
        assert_eq!(needed(code), Some((0x7f00_0000_1000..0x7f00_0000_3000, Access::Read)));
        let stack = "7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]";
        assert_eq!(needed(stack), Some((0x7ffc_0001_1000..0x7ffc_0002_1000, Access::Write)));
        for other in [
            "",
            "7f00-7f01 rw-p 00000000 00:00 0",
            "7f00-7f01 rw-p 00000000 00:01 5 /memfd:vm-ram (deleted)",
            "7f00-7f01 r-xp 00000000 00:00 0 [vdso]",
            "x-y r-xp 0 0 0 /x",
        ] {
            assert_eq!(needed(other), None);
        }
    }

    #[test]
    fn all_of_them_can_be_had() {
        let prefault_set = PrefaultSet::of_this_process().unwrap();
        assert!(prefault_set.ranges.len() >= 3);
        prefault_set.prefault();
    }
}
