//! Threads: vCPUs come first.

use std::{
    io,
    sync::OnceLock,
    thread::{self, JoinHandle},
};

use rustix::process::setpriority_process;

/// Number of processors that this process may use, as it was when it was first asked for: finding out takes 100 us.
pub(crate) fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
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

/// Starts a thread for work that nobody waits for. When it wakes up it takes no processor from a thread that runs a vCPU
/// (SCHED_BATCH): it finds another one, or waits for its turn, which is a short one.
///
/// # Errors
/// Where the system has no room for a thread.
pub(crate) fn background<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    thread::Builder::new().name(name.to_owned()).spawn(|| {
        let parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: the call reads one struct that lives across it, and is about the calling thread alone.
        if unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters) } != 0 {
            tracing::debug!(error = %io::Error::last_os_error(), "a background thread stays as important as others");
        }
        // Of the calling thread: on Linux each has its own.
        if let Err(error) = setpriority_process(None, NICENESS) {
            tracing::debug!(%error, "a background thread stays as important as others");
        }
        work()
    })
}
