//! KVM: the only user of kvm-ioctls. What leaves this module is its own types, and KVM's plain state structs.
//!
//! A [`Hypervisor`] makes a [`Vm`], which is given memory first and interrupt controllers then (the other way
//! round costs milliseconds: see [`Vm::map`]), and then its [`Vcpu`]s. [`Vcpu::run`] runs the guest until an
//! [`Exit`].

use std::io;

mod calls;
mod exit;
mod hypervisor;
mod kick;
mod older;
pub mod probe;
mod time;
mod vcpu;
mod vcpu_state;
mod vm;

pub use exit::Exit;
pub use hypervisor::{Host, HostModel, Hypervisor};
pub use kick::Kicker;
pub use older::VcpuState as OlderVcpuState;
pub use time::{ClockReading, HostTime, Time, TscRate, align, set_counters};
pub use vcpu::Vcpu;
pub use vcpu_state::VcpuState;
pub use vm::{Vm, VmHandle, VmState};

use crate::arch::VcpuId;

/// What KVM refuses or fails to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device is not there or not accessible.
    #[error(
        "can't open /dev/kvm (does it exist, and is this user allowed to, for instance by the group kvm?)"
    )]
    Open(#[source] io::Error),
    /// KVM's API is not the stable one.
    #[error("/dev/kvm speaks API version {0}; 12 is needed")]
    ApiVersion(i32),
    /// A capability that is always needed is missing.
    #[error("this kernel's KVM lacks {0}")]
    Missing(&'static str),
    /// A call on KVM itself or on a VM failed.
    #[error("{call} failed")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// KVM's reason.
        source: io::Error,
    },
    /// A call on a vCPU failed.
    #[error("{call} failed on {vcpu}")]
    VcpuCall {
        /// The vCPU.
        vcpu: VcpuId,
        /// The ioctl.
        call: &'static str,
        /// KVM's reason.
        source: io::Error,
    },
    /// A model-specific register could not be read or written.
    #[error("can't {access} MSR {index:#x} of {vcpu}")]
    Msr {
        /// The vCPU.
        vcpu: VcpuId,
        /// `read` or `write`.
        access: &'static str,
        /// The register.
        index: u32,
    },
    /// A state to be restored does not fit this machine.
    #[error("the state of {vcpu} does not fit: {what}")]
    Unfit {
        /// The vCPU.
        vcpu: VcpuId,
        /// What is wrong.
        what: &'static str,
    },
    /// A piece of memory does not lie in its mapping.
    #[error("memory slot {slot} reaches out of its mapping")]
    Slot {
        /// The slot.
        slot: u32,
    },
}

/// Turns a failed call into an [`Error::Call`].
fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |errno| Error::Call { call, source: errno.into() }
}
