//! What a node may ask of the kernel: what running a VM takes, and no more (seccomp).
//!
//! Whoever breaks out of a guest finds himself in a process that can open no file, make no socket and no
//! process, run no other program, map nothing as code, and signal nobody else. It has what the platform gave
//! it: its memory, its VM, a pipe for its console, and its connection. Any other call fails as one that this
//! kernel does not have. What a filter can't keep from him: to find out whether a file exists, to write to
//! the log that all nodes share, and to take memory, which a control group has to bound.
//!
//! There are two filters. All that nodes and their zygote do is allowed by one that the zygote sets up for
//! itself, once, and that nodes inherit: to set it up takes 300 us. What only the zygote does, or a node only
//! at its start, a short one takes away from each node.

use std::{collections::BTreeMap, process};

use libc::{c_int, c_long};
use rustix::{
    io::Errno,
    thread::{CapabilitySet, CapabilitySets, set_capabilities},
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Why a process can't be confined.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the rules for system calls make no filter")]
    Rules(#[from] BackendError),
    #[error("privileges can't be given up")]
    Privileges(#[from] Errno),
    #[error("this kernel takes no filter for system calls (CONFIG_SECCOMP_FILTER)")]
    Apply(#[from] seccompiler::Error),
}

/// Calls that are allowed whatever they are given. They work on what the process has: its memory, its
/// descriptors, its threads.
const ALLOWED: &[c_long] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Descriptors.
    libc::SYS_close,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
    libc::SYS_writev,
    // Threads, signals and time.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// Calls that a node has no use for, once it has opened what it needs.
const OF_THE_START: &[c_long] = &[libc::SYS_openat, libc::SYS_pidfd_open, libc::SYS_wait4];

/// What may be done to a descriptor: nothing that makes it send signals to whoever uses the other end.
const FCNTL: &[c_int] =
    &[libc::F_ADD_SEALS, libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_GET_SEALS];

/// What may be said of memory: nothing that makes a page of it unusable for others who share it.
const ADVICE: &[c_int] =
    &[libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE];

/// What may be done to a word that is shared, with any flags: nothing that makes another's wake-up fail.
const FUTEX: &[c_int] = &[libc::FUTEX_WAIT, libc::FUTEX_WAKE, libc::FUTEX_WAIT_BITSET];

/// What comes of a call that is not allowed.
const MISSING: SeccompAction = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());

/// The type of all of KVM's ioctls, KVMIO (linux/kvm.h), and where it stands in their numbers.
const KVM_IOCTLS: u64 = 0xae00;
const IOCTL_TYPE: u64 = 0xff00;

/// The type of all ioctls on faults on missing pages (linux/userfaultfd.h).
const FAULT_IOCTLS: u64 = 0xaa00;

/// PAGEMAP_SCAN (linux/fs.h).
const PAGEMAP_SCAN: u64 = 0xc060_6610;

/// Confines the calling thread, and all that come from it, to what nodes and their zygote do, and takes all
/// privileges from them.
///
/// # Errors
/// [`Error`].
pub(super) fn enter() -> Result<(), Error> {
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(seccompiler::apply_filter(&allowed()?)?)
}

/// Confines the calling thread, and all that come from it, to what a node does that has begun.
///
/// # Errors
/// [`Error`].
pub(super) fn close() -> Result<(), Error> {
    Ok(seccompiler::apply_filter(&forbidden()?)?)
}

fn allowed() -> Result<BpfProgram, BackendError> {
    let calls = ALLOWED.iter().chain(OF_THE_START);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = calls.map(|call| (*call, Vec::new())).collect();
    let flag = |flag: c_int| u64::from(flag.cast_unsigned());
    let any_of = |index, values: &[c_int]| {
        values.iter().map(|value| argument(index, Compare::Eq, flag(*value))).collect::<Result<Vec<_>, _>>()
    };
    rules.insert(libc::SYS_fcntl, any_of(1, FCNTL)?);
    rules.insert(libc::SYS_madvise, any_of(2, ADVICE)?);
    rules.insert(
        libc::SYS_prctl,
        any_of(0, &[libc::PR_SET_NAME, libc::PR_SET_SECCOMP, libc::PR_SET_NO_NEW_PRIVS])?,
    );
    let operation = flag(libc::FUTEX_CMD_MASK);
    let futex = FUTEX.iter().map(|futex| argument(1, Compare::MaskedEq(operation), flag(*futex)));
    rules.insert(libc::SYS_futex, futex.collect::<Result<_, _>>()?);
    // No huge pages: they come in sizes that a file's own may not fit, and out of a small stock.
    let huge = u64::from(libc::MFD_HUGETLB);
    rules.insert(libc::SYS_memfd_create, vec![argument(1, Compare::MaskedEq(huge), 0)?]);
    let not_code = || argument(2, Compare::MaskedEq(flag(libc::PROT_EXEC)), 0);
    rules.insert(libc::SYS_mmap, vec![not_code()?]);
    rules.insert(libc::SYS_mprotect, vec![not_code()?]);
    let kvm = argument(1, Compare::MaskedEq(IOCTL_TYPE), KVM_IOCTLS)?;
    let faults = argument(1, Compare::MaskedEq(IOCTL_TYPE), FAULT_IOCTLS)?;
    rules.insert(libc::SYS_ioctl, vec![kvm, faults, argument(1, Compare::Eq, PAGEMAP_SCAN)?]);
    // The C library comes to this call when clone3, whose flags no filter can see, is not there.
    rules.insert(libc::SYS_clone, Vec::new());
    let of_this_thread = || argument(0, Compare::Eq, 0);
    rules.insert(libc::SYS_sched_setaffinity, vec![of_this_thread()?]);
    rules.insert(libc::SYS_sched_setattr, vec![of_this_thread()?]);
    rules.insert(libc::SYS_seccomp, Vec::new());
    rules.insert(libc::SYS_tgkill, Vec::new());
    SeccompFilter::new(rules, MISSING, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn forbidden() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        OF_THE_START.iter().map(|call| (*call, Vec::new())).collect();
    // A process, and no thread.
    let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
    rules.insert(libc::SYS_clone, vec![argument(0, Compare::MaskedEq(thread), 0)?]);
    rules.insert(libc::SYS_tgkill, vec![argument(0, Compare::Ne, u64::from(process::id()))?]);
    SeccompFilter::new(rules, SeccompAction::Allow, MISSING, TargetArch::x86_64)?.try_into()
}

/// A call of which this argument, taken as 32 bits, is such.
fn argument(index: u8, compare: Compare, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, Length::Dword, compare, value)?])
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io,
        os::unix::{net::UnixStream, process::CommandExt},
        process::Command,
        sync::{Arc, Mutex},
        thread,
    };

    use super::*;
    use vmm::memory::{self, Mapping};

    fn is_missing<T>(what: &str, result: io::Result<T>) {
        let error = result.err().unwrap_or_else(|| panic!("{what} works"));
        assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "{what}: {error}");
    }

    /// On a thread of its own, which is confined alone.
    #[test]
    fn a_confined_thread_can_work_and_reaches_nothing() {
        let confined = thread::spawn(|| {
            enter().unwrap();
            assert!(File::open("/dev/null").is_ok());
            close().unwrap();
            is_missing("opening a file", File::open("/dev/null"));
            is_missing("making a socket", UnixStream::pair());
            // SAFETY: a copy that there should not be ends at once.
            let forked = unsafe { libc::fork() };
            if forked == 0 {
                process::exit(1);
            }
            is_missing("making a process", (forked > 0).then_some(()).ok_or_else(io::Error::last_os_error));
            is_missing("running a program", Err::<(), _>(Command::new("/bin/true").exec()));
            // SAFETY: the descriptor is not open, and the call has no other effect than on what it stands
            // for.
            let owned = unsafe { libc::fcntl(-1, libc::F_SETOWN, 1) };
            is_missing("another's signals", (owned == 0).then_some(()).ok_or_else(io::Error::last_os_error));
            // SAFETY: signal 0 is none.
            let signalled = unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
            is_missing(
                "a signal to another",
                (signalled == 0).then_some(()).ok_or_else(io::Error::last_os_error),
            );
            let access = libc::PROT_READ | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping at an address that the kernel chooses touches no existing one.
            let code = unsafe { libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0) };
            is_missing("code", (code != libc::MAP_FAILED).then_some(()).ok_or_else(io::Error::last_os_error));

            let file = memory::unsealed("test", 4096).unwrap();
            let mapping = Mapping::reserve(4096).unwrap();
            mapping.map_shared(&file).unwrap();
            mapping.write(0, b"here").unwrap();
            let done = Arc::new(Mutex::new(false));
            let worker = Arc::clone(&done);
            thread::Builder::new().spawn(move || *worker.lock().unwrap() = true).unwrap().join().unwrap();
            assert!(*done.lock().unwrap());
        });
        confined.join().unwrap();
    }
}
