//! Threads: vCPUs come first.

use std::{
    io,
    sync::OnceLock,
    thread::{self, JoinHandle},
};

/// Number of processors that this process may use, as it was when it was first asked for: finding out takes 100 us.
pub(crate) fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}

/// Number of the processor on which the calling thread runs, or one that there is not.
pub(crate) fn current_processor() -> u32 {
    // SAFETY: the call touches no memory of this process.
    unsafe { libc::sched_getcpu() }.cast_unsigned()
}

/// Has all threads allocate from one heap. With a heap for each, as glibc does it, a thread that allocates little costs 40 us more to
/// start, and 20 KiB.
pub(crate) fn share_one_heap() {
    // SAFETY: the call changes a setting of the allocator, from the one thread that there is.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        tracing::debug!("the allocator keeps a heap for each thread");
    }
}

/// How much less a background thread gets of a processor that it shares with others (its nice value).
const NICENESS: i32 = 10;

/// How long its turns are, in nanoseconds, if nobody else wants the processor. Linux lets a thread that wakes up and has shorter turns take
/// the processor at once, since 6.12; it would wait up to 4 ms otherwise (measured).
const TURN_NS: u64 = 10_000_000;

/// Starts a thread for work that nobody waits for. When it wakes up it takes no processor from a thread that runs a vCPU
/// (SCHED_BATCH): it finds another one, or waits for its turn; and it gives the processor up when such a thread wakes up.
///
/// # Errors
/// Where the system has no room for a thread.
pub(crate) fn background<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.to_owned()).spawn(|| {
        if let Err(error) = step_back() {
            tracing::debug!(%error, "a background thread stays as important as others");
        }
        work()
    })
}

/// Makes the calling thread one that others come before (sched_setattr).
fn step_back() -> io::Result<()> {
    let attributes = libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).map_err(io::Error::other)?,
        sched_policy: u32::try_from(libc::SCHED_BATCH).map_err(io::Error::other)?,
        sched_flags: 0,
        sched_nice: NICENESS,
        sched_priority: 0,
        sched_runtime: TURN_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the call reads one struct that lives across it and names its own size, and is about the calling thread alone.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
