//! Getting a vCPU out of guest code from another thread.
//!
//! `immediate_exit` in the vCPU's shared page makes the *next* KVM_RUN return at once; a signal ends the
//! *current* one. A kick does both, in this order, so that it is never lost. The vCPU's thread takes the kick
//! back ([`Kicker::clear`]) *before* it looks what the kick was for.

use std::{
    num::NonZeroUsize,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU8, Ordering},
    },
};

use kvm_bindings::kvm_run;
use nix::{
    sys::{
        mman::{MapFlags, ProtFlags, mmap, munmap},
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    },
    unistd::gettid,
};

use super::Error;
use crate::arch::VcpuId;

/// Ends a KVM_RUN. Its handler does nothing; the system call returns EINTR.
const SIGNAL: Signal = Signal::SIGUSR1;

/// A handle with which any thread can stop a vCPU. Cloning it gives one to the same vCPU.
#[derive(Debug, Clone)]
pub struct Kicker(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    page: RunPage,
    /// Thread that runs the vCPU; 0 before it has begun.
    thread: AtomicI32,
}

impl Kicker {
    /// A kicker for the vCPU `vcpu`, whose shared page is `bytes` long.
    pub(super) fn new(vcpu: VcpuId, fd: &impl AsRawFd, bytes: usize) -> Result<Self, Error> {
        install_handler().map_err(|errno| Error::VcpuCall {
            vcpu,
            call: "sigaction",
            source: errno.into(),
        })?;
        Ok(Self(Arc::new(Inner { page: RunPage::map(vcpu, fd, bytes)?, thread: AtomicI32::new(0) })))
    }

    /// Says that the calling thread runs the vCPU from now on.
    pub fn adopt(&self) {
        self.0.thread.store(gettid().as_raw(), Ordering::Release);
    }

    /// Makes the vCPU's thread leave KVM_RUN, or not enter it, with
    /// [`Exit::Interrupted`](super::Exit::Interrupted).
    pub fn kick(&self) {
        self.0.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.0.thread.load(Ordering::Acquire);
        if thread != 0 {
            let process = std::process::id();
            // SAFETY: tgkill has no memory effects; a thread that has ended meanwhile is ESRCH.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGNAL as i32) };
        }
    }

    /// Takes a kick back, or prepares the next run.
    pub fn clear(&self) {
        self.0.page.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Makes the next KVM_RUN complete the pending exit and run no guest code.
    pub(super) fn arm(&self) {
        self.0.page.immediate_exit().store(1, Ordering::SeqCst);
    }
}

fn install_handler() -> nix::Result<()> {
    extern "C" fn nothing(_: i32) {}
    // No SA_RESTART: the point is that KVM_RUN is interrupted.
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so it is async-signal-safe; no other code of this program uses the
    // signal.
    unsafe { sigaction(SIGNAL, &action) }.map(drop)
}

/// A second mapping of a vCPU's shared page, so that other threads can reach `immediate_exit` while one is in
/// KVM_RUN.
#[derive(Debug)]
struct RunPage {
    start: NonNull<kvm_run>,
    bytes: usize,
}

// SAFETY: the only access is by `immediate_exit`, which is atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(vcpu: VcpuId, fd: &impl AsRawFd, bytes: usize) -> Result<Self, Error> {
        let fail = |source: nix::Error| Error::VcpuCall { vcpu, call: "mmap", source: source.into() };
        let length = NonZeroUsize::new(bytes).filter(|length| length.get() >= size_of::<kvm_run>());
        let length = length.ok_or_else(|| fail(nix::Error::EINVAL))?;
        // SAFETY: the descriptor is open for as long as `fd` is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        // SAFETY: a new mapping at an address that the kernel chooses touches no existing one.
        let start = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, fd, 0)
        };
        Ok(Self { start: start.map_err(fail)?.cast(), bytes })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping is at least as long as kvm_run, so this is an address within it.
        let field = unsafe { &raw mut (*self.start.as_ptr()).immediate_exit };
        // SAFETY: the byte lives as long as `self`, and every access to it in this process is through this
        // function.
        unsafe { AtomicU8::from_ptr(field) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, and no reference into it outlives `self`.
        if let Err(errno) = unsafe { munmap(self.start.cast(), self.bytes) } {
            tracing::error!(%errno, "munmap of a vCPU's page failed");
        }
    }
}
