//! What belongs to what instant.

use super::*;
use crate::{arch::msr::Msr, kvm::VcpuState};

fn state(tsc: u64, offset: u64, host_tsc: u64) -> VcpuState {
    let msrs = vec![Msr { index: crate::arch::msr::TSC, value: tsc }];
    VcpuState { tsc_offset: offset, host_tsc, ..VcpuState::sample(Vec::new(), msrs, 0, 4096) }
}

fn counters(states: &[VcpuState]) -> Vec<u64> {
    states.iter().filter_map(VcpuState::tsc).collect()
}

#[test]
fn counters_that_were_read_one_after_another_are_those_of_one_instant() {
    let at = HostTime { tsc: 10_000, raw_ns: 0 };
    // Read at 9,000 and 9,500, a little off; the second one was set by the guest to run 7 ahead.
    let mut states =
        [state(4_003, 0_u64.wrapping_sub(5_000), 9_000), state(4_490, 0_u64.wrapping_sub(4_993), 9_500)];
    align(&mut states, at, TscRate::new(Some(2), Some(2)), true);
    assert_eq!(counters(&states), [5_000, 5_007]);
    assert!(states.iter().all(|state| state.host_tsc == 10_000));
}

#[test]
fn scaled_counters_keep_what_lies_between_them() {
    // The guest counts half as fast as the host.
    let mut states = [state(4_000, 100, 9_000), state(3_000, 107, 9_400)];
    align(&mut states, HostTime { tsc: 10_000, raw_ns: 0 }, TscRate::new(Some(1), Some(2)), true);
    assert_eq!(counters(&states), [4_500, 4_507]);
}

#[test]
fn counters_that_stood_still_while_their_vcpus_did_catch_up() {
    // Both were set to the same offset; the second vCPU has not run for 2,000 cycles.
    let mut states =
        [state(4_000, 0_u64.wrapping_sub(5_000), 9_000), state(2_400, 0_u64.wrapping_sub(7_000), 9_400)];
    align(&mut states, HostTime { tsc: 10_000, raw_ns: 0 }, TscRate::new(Some(2), Some(2)), false);
    assert_eq!(counters(&states), [5_000, 5_000]);
    assert_eq!(states.map(|state| state.tsc_offset), [0_u64.wrapping_sub(5_000); 2]);
}

#[test]
fn a_machine_without_counters_is_no_error() {
    let mut states = [VcpuState::sample(Vec::new(), Vec::new(), 0, 4096)];
    align(&mut states, HostTime::now(), TscRate::new(None, None), true);
    assert!(counters(&states).is_empty());
    align(&mut [], HostTime::now(), TscRate::new(None, None), true);
}

#[test]
fn time_is_counted_as_the_guest_counts_it() {
    let rate = |khz, host_khz| TscRate::new(Some(khz), Some(host_khz));
    assert_eq!(rate(2_500_000, 3_000_000).guest_cycles(3_000_000), 2_500_000);
    assert_eq!(rate(3_000_000, 2_500_000).guest_cycles(2_500_000), 3_000_000);
    assert_eq!(rate(u32::MAX, 0).guest_cycles(u64::MAX), u64::MAX);
    assert_eq!(rate(2_500_000, 3_000_000).cycles(1_000_000), 2_500_000);
    assert_eq!(nanoseconds(2_500_000, 2_500_000), 1_000_000);
    assert_eq!((rate(1, 1).scaled(), rate(1, 2).scaled()), (None, Some(1)));
    // A state that does not say how fast its counters ran, and a host that can't tell.
    assert_eq!(TscRate::new(None, Some(7)).khz(), Some(7));
    assert_eq!(TscRate::new(None, Some(7)).scaled(), None);
    assert_eq!(TscRate::new(None, None).guest_cycles(7), 7);
}

#[test]
fn an_instant_lies_between_two_others() {
    let [before, after] = [(1_000, 500), (2_000, 700)].map(|(tsc, raw_ns)| HostTime { tsc, raw_ns });
    let at = |tsc| HostTime::between(before, after, tsc).raw_ns;
    assert_eq!([at(1_000), at(1_500), at(2_000)], [500, 600, 700]);
    // A count from outside of it, as where the host's counters disagree, is none of another time.
    assert_eq!([at(0), at(u64::MAX)], [500, 700]);
    assert_eq!(HostTime::between(after, before, 5).raw_ns, 700);
}

#[test]
fn what_reads_the_hosts_counter_goes_on_with_it() {
    let rate = TscRate::new(Some(2_000_000), Some(2_000_000));
    let past = state(1, 0, 0);
    assert_eq!(
        Time::FromCapture.of_unshifted(Some(&past), rate),
        Time::WithTsc { captured: 1, khz: 2_000_000 }
    );
    assert_eq!(Time::Continuous.of_unshifted(Some(&past), rate), Time::Continuous);
    let ahead = state(u64::MAX, 0, 0);
    assert_eq!(Time::FromCapture.of_unshifted(Some(&ahead), rate), Time::FromCapture);
    assert_eq!(Time::FromCapture.of_unshifted(None, rate), Time::FromCapture);
}
