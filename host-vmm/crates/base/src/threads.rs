//! Threads: vCPUs come first.

use std::{
    io,
    sync::OnceLock,
    thread::{self, JoinHandle},
};

use rustix::{
    io::Errno,
    process::Pid,
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// Number of processors that this process may use, as it was when it was first asked for: finding out takes
/// 100 us.
pub fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}

/// Number of the processor on which the calling thread runs, or one that there is not.
pub fn current_processor() -> u32 {
    // SAFETY: the call touches no memory of this process.
    unsafe { libc::sched_getcpu() }.cast_unsigned()
}

/// The processors that this process may use, for as long as it lives: what it was started with, or, where
/// that was all of its control group's, whatever that will have.
fn all() -> io::Result<CpuSet> {
    static ALL: OnceLock<CpuSet> = OnceLock::new();
    if let Some(all) = ALL.get() {
        return Ok(*all);
    }
    let (inherited, mut any) = (sched_getaffinity(None)?, CpuSet::new());
    (0..CpuSet::MAX_CPU).for_each(|processor| any.set(processor));
    sched_setaffinity(None, &any)?;
    let all = if sched_getaffinity(None)? == inherited { any } else { inherited };
    sched_setaffinity(None, &all)?;
    Ok(*ALL.get_or_init(|| all))
}

/// Keeps a thread off one processor, if there are others (sched_setaffinity): the calling one, or the first
/// one of another process.
///
/// Linux wakes a thread up where it has slept, or where it was woken from, and moves none that waits for its
/// turn before its next tick: what is woken up for a busy VM, on its processor, takes that from it, or comes
/// up to 4 ms late (measured, with another processor idle).
///
/// # Errors
/// Where the system refuses it, or the process is gone.
pub fn keep_off(process: Option<u32>, processor: u32) -> io::Result<()> {
    let mut others = all()?;
    let processor = usize::try_from(processor).ok().filter(|processor| *processor < CpuSet::MAX_CPU);
    let Some(processor) = processor.filter(|_| processors() > 1) else { return Ok(()) };
    others.unset(processor);
    let process =
        process.map(|process| i32::try_from(process).ok().and_then(Pid::from_raw).ok_or(Errno::INVAL));
    match sched_setaffinity(process.transpose()?, &others) {
        // There are no others any more.
        Err(Errno::INVAL) => Ok(()),
        result => Ok(result?),
    }
}

/// Lets the calling thread use all processors again.
pub fn use_all_processors() {
    if let Err(error) = all().and_then(|all| Ok(sched_setaffinity(None, &all)?)) {
        tracing::warn!(%error, "a thread may not use all processors");
    }
}

/// Has all threads allocate from one heap. With a heap for each, as glibc does it, a thread that allocates
/// little costs 40 us more to start, and 20 KiB.
pub fn share_one_heap() {
    // SAFETY: the call changes a setting of the allocator, from the one thread that there is.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        tracing::debug!("the allocator keeps a heap for each thread");
    }
}

/// How much less a background thread gets of a processor that it shares with others (its nice value).
const NICENESS: i32 = 10;

/// How long its turns are, in nanoseconds, if nobody else wants the processor. Linux lets a thread that wakes
/// up and has shorter turns take the processor at once, since 6.12; it would wait up to 4 ms otherwise
/// (measured).
const TURN_NS: u64 = 10_000_000;

/// Starts a thread for work that nobody waits for. When it wakes up it takes no processor from a thread that
/// runs a vCPU (SCHED_BATCH): it finds another one, or waits for its turn; and it gives the processor up when
/// such a thread wakes up.
///
/// # Errors
/// Where the system has no room for a thread.
pub fn background<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.to_owned()).spawn(|| {
        step_back();
        work()
    })
}

/// Makes the calling thread, and those that it starts, background threads. There is no way back.
pub fn step_back() {
    if let Err(error) = schedule(libc::SCHED_BATCH, NICENESS, TURN_NS) {
        tracing::debug!(%error, "a background thread stays as important as others");
    }
}

/// Makes the calling thread as important as any: it may have been started by one in the background.
pub fn step_forward() {
    if let Err(error) = schedule(libc::SCHED_OTHER, 0, 0) {
        tracing::warn!(%error, "a thread stays in the background");
    }
}

/// Says how the calling thread is scheduled (sched_setattr).
fn schedule(policy: libc::c_int, niceness: i32, turn_ns: u64) -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).map_err(io::Error::other)?,
        sched_policy: u32::try_from(policy).map_err(io::Error::other)?,
        sched_flags: 0,
        sched_nice: niceness,
        sched_priority: 0,
        sched_runtime: turn_ns,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the call reads one struct that lives across it and names its own size, and is about the calling
    // thread alone.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
