//! What a process has of the host's resources, from `/proc`.

use std::{collections::BTreeMap, fs, io, time::Duration};

use rustix::process::{Pid, Rlimit, prlimit};

pub use rustix::process::Resource;

/// Sums of a process's memory, in KiB, by their names in `/proc/PID/smaps_rollup`, such as `Pss` and
/// `Private_Dirty`.
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

/// How much address space a process takes, in bytes.
///
/// # Errors
/// Where the process is gone.
pub fn address_space(pid: u32) -> io::Result<u64> {
    stat(pid, ADDRESS_SPACE)
}

/// What a process's descriptors are open on, sorted, with how often; sockets, pipes and the process's own
/// files without their numbers.
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

/// Lets a process have no more of something, or as much as there is; what it has already stays (prlimit).
///
/// # Errors
/// Where the process is gone.
pub fn limit(pid: u32, resource: Resource, most: Option<u64>) -> io::Result<()> {
    let limit = Rlimit { current: most, maximum: None };
    prlimit(Pid::from_raw(pid.cast_signed()), resource, limit)?;
    Ok(())
}

/// Processes whose parent is `pid`.
///
/// # Errors
/// Where `/proc` can't be read.
pub fn children(pid: u32) -> io::Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(candidate) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(parent) = stat(candidate, PARENT) else { continue };
        if parent == u64::from(pid) {
            children.push(candidate);
        }
    }
    children.sort_unstable();
    Ok(children)
}

/// Processor time that a process has taken, all of its threads together, for itself and within the kernel.
///
/// # Errors
/// Where the process is gone.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    Ok(Duration::from_millis((stat(pid, USER_TIME)? + stat(pid, SYSTEM_TIME)?) * 1000 / TICKS_PER_SECOND))
}

/// Fields of `/proc/PID/stat`, counted from the one behind the name (proc(5)).
const PARENT: usize = 1;
const USER_TIME: usize = 11;
const SYSTEM_TIME: usize = 12;
const ADDRESS_SPACE: usize = 20;

/// What the kernel counts such times in, for all programs on x86.
const TICKS_PER_SECOND: u64 = 100;

fn stat(pid: u32, field: usize) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in brackets, can hold anything.
    let value = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(field)?.parse().ok());
    value.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
