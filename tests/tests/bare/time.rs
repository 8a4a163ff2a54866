//! No clock of a parent or a copy goes back, and all keep their relation.

use std::{collections::BTreeMap, thread, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vmfork_tests::{
    bare_guest::Script,
    cluster::Platforms,
    vmm::{Running, Vmm, console_line},
};
use vmm::kvm::Host;

use super::clones::{know_each_other, vms};

/// MSR_KVM_SYSTEM_TIME_NEW (kernel documentation, virt/kvm/x86/msr.rst), and its bit that switches the clock
/// on.
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const ENABLED: u64 = 1;

/// Where the guest has its clock, and what it has seen of it.
const CLOCK: u64 = 0x40_0000;
const SEEN: u64 = 0x41_0000;

/// What it prints before it tells what it has seen.
const MARK_AT: u64 = 0x42_0000;
const MARK: u32 = 0xc10c_c10c;

/// Looks at the clocks between two reports.
const LOOKS: usize = 20;

/// How far TSC and kvmclock may be apart in a copy from where they are in its parent: what reading them one
/// after another leaves where the host's clock is another one, and a part of the time that has passed for
/// clocks whose rates differ.
const TOLERANCE_NS: i128 = 2_000_000;
const TOLERANCE_PARTS: i128 = 2000;

/// Pause of the parent for its first fork.
const PAUSE: Duration = Duration::from_secs(1);

/// How long an image lies still before copies of it are spawned.
const REST: Duration = Duration::from_secs(2);

/// How much longer a report may have been under way to the test at one time than at another, at the least of
/// many.
const UNDER_WAY: Duration = Duration::from_millis(100);

/// What a guest tells of its clocks.
#[derive(Debug, Clone, Copy)]
struct Report {
    tsc: u64,
    clock_ns: u64,
    /// The host's CLOCK_MONOTONIC when its last line was read.
    told_ns: u64,
}

/// Reports of the VMs of a platform since it was started, once each of these has told so often of its clocks.
fn read(running: &mut Running, wanted: &[(&str, usize)]) -> BTreeMap<String, Vec<Report>> {
    let mut words: BTreeMap<String, Vec<u32>> = BTreeMap::new();
    let mut reports: BTreeMap<String, Vec<Report>> = BTreeMap::new();
    let told = running.wait_for("reports of clocks", |event| {
        let (vm, line) = console_line(event, "")?;
        let words = words.entry(vm.clone()).or_default();
        // A copy begins with the rest of what its parent has begun, and so maybe with a part of a line.
        let word = (line.len() == 8).then(|| u32::from_str_radix(&line, 16).ok()).flatten();
        if word == Some(MARK) {
            words.clear();
        }
        words.extend(word);
        let [MARK, tsc_back, clock_back, tsc_low, tsc, clock_low, clock] = words[..] else { return None };
        assert_eq!((tsc_back, clock_back), (0, 0), "{vm}: TSC and kvmclock have gone back so often");
        let join = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let told_ns = event["t_ns"].as_u64().expect("a time");
        let report = Report { tsc: join(tsc_low, tsc), clock_ns: join(clock_low, clock), told_ns };
        reports.entry(vm).or_default().push(report);
        let count = |name: &str| reports.get(name).map_or(0, Vec::len);
        wanted.iter().all(|(name, wanted)| count(name) >= *wanted).then_some(())
    });
    told.expect("guests that tell of their clocks");
    reports
}

/// Forks the VM while nothing that could become its copy runs, so that it stands still for [`PAUSE`].
fn fork_slowly(running: &mut Running) {
    let vm = running.node("vm").expect("a node");
    let mut others = running.nodes().expect("processes");
    others.retain(|node| *node != vm);
    let signal = |signal| {
        for node in &others {
            let node = Pid::from_raw(i32::try_from(*node).expect("a process ID"));
            kill(node, signal).expect("a process");
        }
    };
    signal(Signal::SIGSTOP);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(PAUSE);
            signal(Signal::SIGCONT);
        });
        running.ask(&["fork", "vm", "--count", "1"]).expect("a copy")
    });
}

/// How far kvmclock is ahead of what the TSC says, in nanoseconds.
fn ahead_ns(report: Report, khz: u32) -> i128 {
    i128::from(report.clock_ns) - i128::from(report.tsc) * 1_000_000 / i128::from(khz)
}

/// The least time in nanoseconds that reports have been under way, with what the guest's TSC is behind the
/// host's clock.
fn behind_ns(reports: &[Report], khz: u32) -> i128 {
    let tsc_ns = |report: &Report| i128::from(report.tsc) * 1_000_000 / i128::from(khz);
    reports.iter().map(|report| i128::from(report.told_ns) - tsc_ns(report)).min().expect("a report")
}

#[test]
fn no_clock_goes_back_and_all_keep_their_relation() {
    let model = Host::open().expect("KVM").model;
    let khz = model.tsc_khz.expect("a TSC of a known frequency");
    let tell = |script: Script, at| script.print(at);
    let look = (0..LOOKS).fold(Script::new(), |script, _| script.look_at_clocks(CLOCK, SEEN));
    let words = [MARK_AT, SEEN + 16, SEEN + 20, SEEN, SEEN + 4, SEEN + 8, SEEN + 12];
    let script = Script::new().store(MARK_AT, MARK).write_msr(SYSTEM_TIME, CLOCK | ENABLED);
    let kernel = script.forever(words.into_iter().fold(look, tell)).to_kernel();
    let platforms = Platforms::new(&["a", "b"]);
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M");
    let mut source = vmm.config(&platforms.config("a", "keep = [\"vm\"]")).start().expect("host-vmm starts");
    let mut target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    know_each_other(&source, 2);

    let first = read(&mut source, &[("vm", 10)]).remove("vm").expect("reports");
    // The first fork, for which warm VMs stand ready since the start, and some more; a copy of a copy; a
    // clone.
    let mut copies = vec!["vm.1".to_owned()];
    fork_slowly(&mut source);
    for number in 2..=4 {
        source.ask(&["fork", "vm", "--count", "1"]).expect("a copy");
        copies.push(format!("vm.{number}"));
    }
    source.ask(&["fork", "vm.1", "--count", "1"]).expect("a copy of a copy");
    copies.push("vm.5".into());
    source.ask(&["clone", "--vm", "vm", "--to", "b"]).expect("a clone");
    let until_image = read(&mut source, &[("vm", first.len() + 10)]).remove("vm").expect("reports");
    // What is kept is the image of the last fork into children here.
    thread::sleep(REST);
    let image = source.kept_image().expect("an image");
    source.ask(&["spawn", "--image", &image, "--count", "1"]).expect("a copy of an image");
    vms(&source, 7);
    copies.push("vm.6".into());
    let wanted = copies.iter().map(|name| (name.as_str(), 10)).chain([("vm", until_image.len() + 10)]);
    let reports = read(&mut source, &wanted.collect::<Vec<_>>());
    let cloned = read(&mut target, &[("vm.1", 10)]);

    let began = first[0];
    let ahead = ahead_ns(began, khz);
    let all = reports.iter().chain(&cloned);
    for (name, report) in all.flat_map(|(name, reports)| reports.iter().map(move |report| (name, *report))) {
        let passed_ns = i128::from(report.clock_ns) - i128::from(began.clock_ns);
        assert!(passed_ns >= 0, "{name}: kvmclock is behind where its parent's began");
        let apart = ahead_ns(report, khz) - ahead;
        let most = TOLERANCE_NS + passed_ns / TOLERANCE_PARTS;
        assert!(apart.abs() <= most, "{name}: TSC and kvmclock have come apart by {apart} ns: {report:?}");
    }
    // The parent goes on with the time of the host, its pauses included.
    let lost = behind_ns(&reports["vm"][first.len()..], khz) - behind_ns(&first, khz);
    assert!(lost.unsigned_abs() < UNDER_WAY.as_nanos(), "the parent has lost {lost} ns");
    // For a copy no time passes while it lies still, where its TSC can be set.
    if model.tsc_shift {
        let spawned = reports["vm.6"][0];
        let beside =
            reports["vm"].iter().find(|report| report.told_ns >= spawned.told_ns).expect("a later report");
        let missed_ns = u128::from(beside.clock_ns.saturating_sub(spawned.clock_ns));
        assert!(
            missed_ns >= REST.as_nanos() / 2,
            "it has counted the time of its rest: {spawned:?}, {beside:?}"
        );
    }
}
