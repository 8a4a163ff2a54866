//! What an x86 machine of ours looks like, as pure values: no file descriptors, no ioctls.

use std::fmt;

use serde::{Deserialize, Serialize};

pub mod cpuid;
pub mod features;
pub mod layout;
pub mod leaf;
pub mod levels;
pub mod msr;
pub mod paging;
pub mod profile;
pub mod regs;
#[cfg(any(test, feature = "samples"))]
pub mod samples;
pub mod xstate;

/// KVM's plain structs for CPUID and registers, which `kvm-bindings` defines.
pub use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES as MAX_CPUID_LEAVES, kvm_cpuid_entry2 as CpuidEntry, kvm_regs as Registers,
    kvm_segment as Segment, kvm_sregs as SystemRegisters,
};

/// Number of a vCPU, from 0; also its APIC ID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VcpuId(pub u8);

impl VcpuId {
    /// The number as an index.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for VcpuId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vcpu{}", self.0)
    }
}
