//! What the clocks of a guest show while it forks.

use std::{
    arch::x86_64::{_mm_lfence, _rdtsc},
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use serde_json::json;
use vmfork::Role;

use crate::{cpu_count, fork, kernel_log, wall};

/// Time over which it is measured how fast the TSC runs.
const MEASURED: Duration = Duration::from_secs(1);

/// How often two clocks are read one after the other for the one time that took least.
const TRIES: usize = 200;

/// Readings of a vCPU between two rests, and how long these are.
const READINGS: usize = 50;
const REST: Duration = Duration::from_micros(500);

/// What the kernel says of clocks that it does not trust.
const COMPLAINTS: [&str; 5] =
    ["nstable", "skew", "clocksource: timekeeping watchdog", "went backwards", "time warp"];

/// Clocks that must not go back on whatever vCPU they are read, and what they have shown at most.
#[derive(Debug, Default)]
struct Watched {
    most: [AtomicU64; 3],
    went_back: [AtomicU64; 3],
}

impl Watched {
    /// Looks at each clock.
    fn look(&self) -> anyhow::Result<()> {
        let read: [fn() -> anyhow::Result<u64>; 3] =
            [|| Ok(tsc()), || clock(ClockId::CLOCK_MONOTONIC), || clock(ClockId::CLOCK_BOOTTIME)];
        for ((most, went_back), read) in self.most.iter().zip(&self.went_back).zip(read) {
            // What another vCPU has shown before this one is read.
            let before = most.load(SeqCst);
            let now = read()?;
            went_back.fetch_add(u64::from(now < before), SeqCst);
            most.fetch_max(now, SeqCst);
        }
        Ok(())
    }

    fn went_back(&self) -> [u64; 3] {
        self.went_back.each_ref().map(|count| count.load(SeqCst))
    }
}

/// TSC and CLOCK_MONOTONIC_RAW at one instant, and CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy)]
struct Reading {
    tsc: u64,
    raw_ns: u64,
    monotonic_ns: u64,
}

impl Reading {
    fn now() -> anyhow::Result<Self> {
        let mut best: Option<(u64, u64, u64)> = None;
        for _ in 0..TRIES {
            let (before, raw_ns, after) = (tsc(), clock(ClockId::CLOCK_MONOTONIC_RAW)?, tsc());
            let took = after.wrapping_sub(before);
            if best.is_none_or(|(least, ..)| took < least) {
                best = Some((took, before.wrapping_add(took / 2), raw_ns));
            }
        }
        let (_, tsc, raw_ns) = best.unwrap_or_default();
        Ok(Self { tsc, raw_ns, monotonic_ns: clock(ClockId::CLOCK_MONOTONIC)? })
    }

    /// What is between this and an earlier one: by the TSC, which counts so often in a nanosecond, and by the
    /// clock, in nanoseconds.
    fn since(self, earlier: Self, frequency: f64) -> (f64, f64) {
        #[allow(clippy::cast_precision_loss, reason = "differences of some seconds are exact")]
        let (cycles, ns) = (
            self.tsc.wrapping_sub(earlier.tsc).cast_signed() as f64,
            self.raw_ns.wrapping_sub(earlier.raw_ns).cast_signed() as f64,
        );
        (cycles / frequency, ns)
    }
}

/// Forks again and again; each copy tells what its clocks show.
pub(crate) fn run(forks: u32) -> anyhow::Result<()> {
    let watched = Arc::new(Watched::default());
    for cpu in 0..cpu_count()? {
        let watched = Arc::clone(&watched);
        thread::spawn(move || -> anyhow::Result<()> {
            stay_on(cpu)?;
            loop {
                (0..READINGS).try_for_each(|_| watched.look())?;
                thread::sleep(REST);
            }
        });
    }
    let at_boot = complaints()?;
    let begun = Reading::now()?;
    thread::sleep(MEASURED);
    let (at_1, ns) = Reading::now()?.since(begun, 1.0);
    let frequency = at_1 / ns;
    for number in 1..=forks {
        let before = Reading::now()?;
        let fork = fork("clock", 1)?;
        // The furthest that a vCPU's TSC is ahead of its clock, or behind.
        let mut apart_ns = 0.0_f64;
        for cpu in 0..cpu_count()? {
            stay_on(cpu)?;
            let (by_tsc, by_clock) = Reading::now()?.since(before, frequency);
            if (by_tsc - by_clock).abs() > apart_ns.abs() {
                apart_ns = by_tsc - by_clock;
            }
        }
        let after = Reading::now()?;
        // Long enough for each vCPU to look at all clocks.
        thread::sleep(Duration::from_millis(20));
        let complaints: Vec<String> =
            complaints()?.into_iter().filter(|line| !at_boot.contains(line)).collect();
        let told = json!({
            "child": fork.role == Role::Child,
            "fork": number,
            "index": fork.index,
            "went_back": watched.went_back(),
            "apart_us": apart_ns / 1000.0,
            "passed_ms": after.monotonic_ns.wrapping_sub(before.monotonic_ns).cast_signed() / 1_000_000,
            "wall_ms": wall()?.as_millis(),
            "clocksource": clocksource()?,
            "complaints": complaints,
        });
        println!("CLOCKS {told}");
        if fork.role == Role::Child {
            return Ok(());
        }
    }
    Ok(())
}

/// What the kernel has said until now of clocks that it does not trust.
fn complaints() -> anyhow::Result<Vec<String>> {
    let is_one = |line: &&str| COMPLAINTS.iter().any(|complaint| line.contains(complaint));
    Ok(kernel_log()?.lines().filter(is_one).map(str::to_owned).collect())
}

fn stay_on(cpu: usize) -> anyhow::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?)
}

fn clock(clock: ClockId) -> anyhow::Result<u64> {
    Ok(u64::try_from(Duration::from(clock_gettime(clock)?).as_nanos())?)
}

/// The TSC of the vCPU on which this runs, once all that comes before is done, and before anything that comes
/// behind.
fn tsc() -> u64 {
    // SAFETY: each 64-bit processor has the instruction, and it has no effect but on the order of others.
    unsafe { _mm_lfence() };
    // SAFETY: each 64-bit processor has the instruction, and it has no effect but its result.
    let tsc = unsafe { _rdtsc() };
    // SAFETY: as above.
    unsafe { _mm_lfence() };
    tsc
}

fn clocksource() -> anyhow::Result<String> {
    let path = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    Ok(fs::read_to_string(path)?.trim().to_owned())
}
