//! Clocks.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC in nanoseconds. It is the same in all processes of a host, so that their times can be
/// compared.
pub fn monotonic_ns() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

/// CLOCK_MONOTONIC_RAW in nanoseconds: it has the rate of the hardware, whatever disciplines the other
/// clocks.
pub fn monotonic_raw_ns() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC_RAW)
}

/// Time for which threads of this process have had a processor.
pub fn processor_time() -> Duration {
    Duration::from_nanos(nanoseconds(ClockId::CLOCK_PROCESS_CPUTIME_ID))
}

/// Wall-clock time in nanoseconds since 1970 (UTC).
pub fn wall_clock_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

fn nanoseconds(clock: ClockId) -> u64 {
    // The clocks that are asked for here exist on every Linux: the call has no other failure.
    let now = clock_gettime(clock).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}
