//! Guest time: how kvmclock and the time-stamp counters of a copy are set, so that none goes back and all
//! keep their relation.
//!
//! A state holds kvmclock and all counters as they were at one instant, that of its [`ClockReading`]. A
//! copy's kvmclock is set first, which takes effect at some instant within the call; then it is read again
//! together with the host's counter, and each guest counter is set to what belongs to that reading. So the
//! relation of kvmclock and counters is exact, however long the calls take.
//!
//! Counters are set by their offset to the host's (KVM_VCPU_TSC_OFFSET, Linux 5.16; kernel documentation,
//! virt/kvm/devices/vcpu.rst). A value that is written to the register instead is dropped where KVM takes it
//! for an attempt to synchronise vCPUs: where it lies within a second of what another vCPU of the VM, or this
//! one when it was made, would have counted to (kernel source, kvm_synchronize_tsc; Linux 6.1).

use std::arch::x86_64::_rdtsc;

use base::clock::monotonic_raw_ns;

use super::{Error, Vcpu, VcpuState};

/// Nanoseconds in a millisecond: kHz times ms are cycles.
const NS_PER_MS: u128 = 1_000_000;

/// How the time of a copy goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// From the instant of the capture, as if none had passed since: a child's.
    FromCapture,
    /// With the time that has passed since the capture, on this host: the parent's own.
    Continuous,
    /// With the host's time-stamp counter, where a guest's can't be shifted against it
    /// ([`HostModel::tsc_shift`](super::HostModel::tsc_shift)).
    WithTsc {
        /// The guest's counter at the capture.
        captured: u64,
        /// Frequency of the counter in kHz.
        khz: u32,
    },
}

impl Time {
    /// How time goes on where a guest reads the host's own time-stamp counter: with that. A counter that was
    /// ahead of this host's, on another one or before a restart, goes back, and nothing helps it.
    pub fn of_unshifted(self, first: Option<&VcpuState>, rate: TscRate) -> Self {
        let counter = first.and_then(VcpuState::tsc).zip(rate.khz());
        match (self, counter) {
            (Self::FromCapture, Some((captured, khz))) if captured <= HostTime::now().tsc => {
                Self::WithTsc { captured, khz }
            }
            (Self::FromCapture, Some((captured, _))) => {
                tracing::warn!(
                    captured,
                    "the time-stamp counter of a copy goes back: this host's KVM can't shift it"
                );
                self
            }
            _ => self,
        }
    }
}

/// One instant by the clocks of this host on which guest clocks are based.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostTime {
    /// The time-stamp counter.
    pub tsc: u64,
    /// CLOCK_MONOTONIC_RAW in nanoseconds: kvmclock counts as it does (kernel source, get_kvmclock_base_ns).
    pub raw_ns: u64,
}

impl HostTime {
    /// This instant.
    pub fn now() -> Self {
        // SAFETY: every processor with 64-bit mode has the instruction, and it has no effect but its result.
        let tsc = unsafe { _rdtsc() };
        Self { tsc, raw_ns: monotonic_raw_ns() }
    }

    /// The instant between two, at this count of the time-stamp counter.
    pub(super) fn between(before: Self, after: Self, tsc: u64) -> Self {
        let span = u128::from(after.tsc.saturating_sub(before.tsc)).max(1);
        let into = u128::from(tsc.saturating_sub(before.tsc)).min(span);
        let passed_ns = u128::from(after.raw_ns.saturating_sub(before.raw_ns)) * into / span;
        let raw_ns = before.raw_ns.saturating_add(u64::try_from(passed_ns).unwrap_or(u64::MAX));
        Self { tsc, raw_ns }
    }
}

/// A VM's kvmclock and the host's clocks at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockReading {
    /// kvmclock in nanoseconds.
    pub clock_ns: u64,
    /// The host's clocks.
    pub host: HostTime,
}

/// How fast a guest's time-stamp counter runs, and the host's, in kHz, as far as these are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TscRate {
    khz: Option<u32>,
    host_khz: Option<u32>,
}

impl TscRate {
    /// That of a guest whose counter runs at `khz` on a host whose own runs at `host_khz`. Where nobody can
    /// tell the first, it is the other.
    pub fn new(khz: Option<u32>, host_khz: Option<u32>) -> Self {
        Self { khz: khz.or(host_khz), host_khz }
    }

    /// The guest's frequency in kHz, where it is another one than the host's.
    pub fn scaled(self) -> Option<u32> {
        self.khz.filter(|_| self.khz != self.host_khz)
    }

    /// The guest's frequency in kHz.
    pub fn khz(self) -> Option<u32> {
        self.khz
    }

    /// So many cycles of the host's counter in those of the guest's.
    fn guest_cycles(self, host_cycles: u64) -> u64 {
        let Some((khz, host_khz)) = self.scaled().zip(self.host_khz) else { return host_cycles };
        let cycles = u128::from(host_cycles) * u128::from(khz) / u128::from(host_khz.max(1));
        u64::try_from(cycles).unwrap_or(u64::MAX)
    }

    /// So many nanoseconds in cycles of the guest's counter.
    fn cycles(self, ns: u64) -> u64 {
        let cycles = u128::from(ns) * u128::from(self.khz.unwrap_or(0)) / NS_PER_MS;
        u64::try_from(cycles).unwrap_or(u64::MAX)
    }
}

/// Cycles of a counter of this frequency in nanoseconds.
pub(super) fn nanoseconds(cycles: u64, khz: u32) -> u64 {
    u64::try_from(u128::from(cycles) * NS_PER_MS / u128::from(khz.max(1))).unwrap_or(u64::MAX)
}

/// Has the counters of `states` be those of one instant: of `at`, when kvmclock was read. The vCPUs were
/// stopped meanwhile, and read at instants of their own. Where the host's counter is not steady, those of
/// vCPUs that did not run stood still, for whoever reads them, and catch up when they do: all of them are
/// taken to be where the furthest one is.
pub fn align(states: &mut [VcpuState], at: HostTime, rate: TscRate, is_steady: bool) {
    if !is_steady {
        catch_up(states, at, rate);
    }
    let Some((first_tsc, first_offset)) = states.first().and_then(|first| {
        let passed = rate.guest_cycles(at.tsc.wrapping_sub(first.host_tsc));
        let read = first.tsc()?.wrapping_add(passed);
        // By the offset it is exact; how a scaled counter is rounded only KVM knows.
        let tsc = if rate.scaled().is_none() { at.tsc.wrapping_add(first.tsc_offset) } else { read };
        Some((tsc, first.tsc_offset))
    }) else {
        return;
    };
    for state in states {
        let apart = state.tsc_offset.wrapping_sub(first_offset);
        state.set_tsc(first_tsc.wrapping_add(apart));
        state.host_tsc = at.tsc;
    }
}

/// Sets all counters to the furthest one, as of one instant.
fn catch_up(states: &mut [VcpuState], at: HostTime, rate: TscRate) {
    let passed = |state: &VcpuState| rate.guest_cycles(at.tsc.saturating_sub(state.host_tsc));
    let at_once = |state: &VcpuState| state.tsc().map(|tsc| tsc.wrapping_add(passed(state)));
    let Some(furthest) = states.iter().filter_map(at_once).max() else { return };
    for state in states {
        let behind = at_once(state).map_or(0, |tsc| furthest.wrapping_sub(tsc));
        state.set_tsc(furthest);
        state.tsc_offset = state.tsc_offset.wrapping_add(behind);
        state.host_tsc = at.tsc;
    }
}

/// Sets the time-stamp counters of vCPUs that take `states`, once the kvmclock of their VM was set to go on
/// as `time` says, from `captured_ns` on, and was read again: `set`.
///
/// # Errors
/// [`Error::VcpuCall`] or [`Error::Msr`].
pub fn set_counters(
    vcpus: &[Vcpu],
    states: &[VcpuState],
    (captured_ns, set): (u64, ClockReading),
    rate: TscRate,
    time: Time,
) -> Result<(), Error> {
    let (Some(first), Some(first_state)) = (vcpus.first(), states.first()) else { return Ok(()) };
    match time {
        // It stands in the same relation to the same host's counter as before.
        Time::Continuous => set_offsets(vcpus, states, first_state.tsc_offset),
        Time::FromCapture => {
            let Some(captured) = first_state.tsc() else { return Ok(()) };
            let tsc = captured.wrapping_add(rate.cycles(set.clock_ns.saturating_sub(captured_ns)));
            let unshifted = match rate.scaled() {
                None => set.host.tsc,
                Some(_) => {
                    // How a product of more than 100 bits is rounded only KVM knows.
                    let (unshifted, at_host_tsc) = first.unshifted_tsc()?;
                    unshifted.wrapping_sub(rate.guest_cycles(at_host_tsc.wrapping_sub(set.host.tsc)))
                }
            };
            set_offsets(vcpus, states, tsc.wrapping_sub(unshifted))
        }
        Time::WithTsc { .. } => Ok(()),
    }
}

/// Gives the first vCPU this offset, and the others theirs, as far from it as they were.
fn set_offsets(vcpus: &[Vcpu], states: &[VcpuState], first: u64) -> Result<(), Error> {
    let Some(captured) = states.first().and_then(VcpuState::tsc) else { return Ok(()) };
    vcpus.iter().zip(states).try_for_each(|(vcpu, state)| {
        let apart = state.tsc().map_or(0, |tsc| tsc.wrapping_sub(captured));
        vcpu.set_tsc_offset(first.wrapping_add(apart))
    })
}

#[cfg(test)]
#[path = "time_test.rs"]
mod tests;
