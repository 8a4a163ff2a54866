//! What a process has of the host's resources, from `/proc`.

use std::{collections::BTreeMap, fs, io};

/// Sums of a process's memory, in KiB, by their names in `/proc/PID/smaps_rollup`, such as `Pss` and `Private_Dirty`.
///
/// # Errors
/// Where the process is gone.
pub fn memory_kib(pid: u32) -> io::Result<BTreeMap<String, u64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let sums = text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        Some((name.to_owned(), rest.trim().strip_suffix(" kB")?.trim().parse().ok()?))
    });
    Ok(sums.collect())
}

/// Memory that a process shares with no other, in KiB.
///
/// # Errors
/// Where the process is gone.
pub fn private_kib(pid: u32) -> io::Result<u64> {
    let sums = memory_kib(pid)?;
    Ok(["Private_Dirty", "Private_Clean"].iter().filter_map(|name| sums.get(*name)).sum())
}

/// What a process's descriptors are open on, sorted, with how often; sockets, pipes and the process's own files without their numbers.
///
/// # Errors
/// Where the process is gone.
pub fn descriptors(pid: u32) -> io::Result<BTreeMap<String, usize>> {
    let mut open = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that is closed meanwhile is not open.
        let Ok(target) = fs::read_link(entry?.path()) else { continue };
        let target = target.to_string_lossy().into_owned();
        let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
        let kind = kind.replacen(&format!("/proc/{pid}/"), "/proc/self/", 1);
        *open.entry(kind).or_default() += 1;
    }
    Ok(open)
}

/// Processes whose parent is `pid`.
///
/// # Errors
/// Where `/proc` can't be read.
pub fn children(pid: u32) -> io::Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(candidate) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(format!("/proc/{candidate}/stat")) else { continue };
        // The name, in brackets, can hold anything; behind it come the state and the parent.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        if parent == Some(pid) {
            children.push(candidate);
        }
    }
    children.sort_unstable();
    Ok(children)
}
