//! The state of a vCPU as it was saved before the memory types, the machine-check banks and the
//! page-directory pointers were part of it, and before the time-stamp counters of all vCPUs were read as of
//! one instant.

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::vcpu_state;
use crate::arch::{
    CpuidEntry,
    msr::{self, Msr},
};

/// Time-stamp counters of vCPUs that are no further apart were not set by the guest, but read one after
/// another: half a second or more.
const TOGETHER_CYCLES: u64 = 1 << 31;

/// Version 1 of the state of a vCPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuState {
    host_tsc: u64,
    cpuid: Vec<CpuidEntry>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: Option<kvm_xcrs>,
    xsave: Vec<u32>,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<Msr>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// The states of a VM's vCPUs. Of what they lack they get what it is at boot; and the time-stamp counters
    /// that are next to each other are made equal, as KVM did when it restored them.
    pub fn into_current(older: Vec<Self>) -> Vec<vcpu_state::VcpuState> {
        tracing::info!(
            vcpus = older.len(),
            "the image is of an earlier format: memory types (MTRR) and machine-check banks are as at boot"
        );
        let mut states: Vec<_> = older.into_iter().map(Self::into_one).collect();
        let counters = || states.iter().filter_map(vcpu_state::VcpuState::tsc);
        let (least, most) = (counters().min().unwrap_or(0), counters().max().unwrap_or(0));
        if most - least < TOGETHER_CYCLES {
            states.iter_mut().for_each(|state| state.set_tsc(most));
        }
        states
    }

    fn into_one(self) -> vcpu_state::VcpuState {
        let Self { host_tsc, cpuid, mp_state, regs, sregs, xcrs, xsave, debugregs, lapic, mut msrs, events } =
            self;
        let missing = msr::unlisted().into_iter().filter(|index| msrs.iter().all(|msr| msr.index != *index));
        let missing: Vec<Msr> = missing.map(msr::at_boot).collect();
        msrs.extend(missing);
        msrs.sort_by_key(|msr| msr.index);
        let (tsc_offset, pdptrs) = (0, None);
        vcpu_state::VcpuState {
            host_tsc,
            tsc_offset,
            cpuid,
            mp_state,
            regs,
            sregs,
            pdptrs,
            xcrs,
            xsave,
            debugregs,
            lapic,
            msrs,
            events,
        }
    }
}

#[cfg(any(test, feature = "samples"))]
impl VcpuState {
    /// What a program of that time would have saved.
    pub fn of(state: vcpu_state::VcpuState) -> Self {
        let vcpu_state::VcpuState {
            host_tsc,
            cpuid,
            mp_state,
            regs,
            sregs,
            xcrs,
            xsave,
            debugregs,
            lapic,
            ..
        } = state;
        let (unlisted, events) = (msr::unlisted(), state.events);
        let msrs = state.msrs.into_iter().filter(|msr| !unlisted.contains(&msr.index)).collect();
        Self { host_tsc, cpuid, mp_state, regs, sregs, xcrs, xsave, debugregs, lapic, msrs, events }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn older(counters: &[u64]) -> Vec<VcpuState> {
        let state = |tsc| {
            let msrs = [(msr::TSC, tsc), (0xc000_0081, 5)].map(|(index, value)| Msr { index, value });
            VcpuState::of(vcpu_state::VcpuState::sample(Vec::new(), msrs.to_vec(), 0, 4096))
        };
        counters.iter().copied().map(state).collect()
    }

    fn counters(states: &[vcpu_state::VcpuState]) -> Vec<u64> {
        states.iter().filter_map(vcpu_state::VcpuState::tsc).collect()
    }

    #[test]
    fn what_was_not_saved_is_as_at_boot_and_the_rest_as_it_was() {
        let states = VcpuState::into_current(older(&[7]));
        let value = |index| states[0].msrs().iter().find(|msr| msr.index == index).map(|msr| msr.value);
        assert_eq!(
            [msr::TSC, 0xc000_0081, msr::MTRR_DEF_TYPE, msr::MCG_CAP, 0x400].map(value),
            [Some(7), Some(5), Some(0x806), Some(32), Some(0)]
        );
        assert!(states[0].msrs().is_sorted_by_key(|msr| msr.index));
    }

    #[test]
    fn counters_that_were_read_one_after_another_are_equal_and_others_are_as_the_guest_has_set_them() {
        assert_eq!(counters(&VcpuState::into_current(older(&[1_000, 250_000, 90_000]))), [250_000; 3]);
        assert_eq!(counters(&VcpuState::into_current(older(&[1_000, 1 << 40]))), [1_000, 1 << 40]);
        assert_eq!(VcpuState::into_current(Vec::new()).len(), 0);
    }
}
