//! Platforms that are killed while copies are on their way.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmfork_abi::{ErrorCode, Status, flags};
use vmfork_tests::{
    assets,
    cluster::Platforms,
    proxy::{Fault, Proxy},
    user::{self, Order},
    vmm::{Ended, PATIENCE, Running, Vmm},
};

use super::{
    super::left_behind::{at_rest, become_equal, descriptors, taken},
    LONG_LEASE, fork_again, forks_when_told, know_each_other, vms, wait_until,
};

/// Where copies go.
pub(super) const TARGETS: [&str; 2] = ["b", "c"];

/// How each of them is set up. No shells are ready: each process is a VM's.
pub(super) const AS_TARGET: &str = "ready = 0\nlabels = { role = \"target\" }";

/// How a platform is set up that sends its copies there.
pub(super) const TO_TARGETS: &str = "[placement.\"*\"]\npolicy = \"spread\"\nlabels = { role = \"target\" }";

/// The same, and it forgets none of them meanwhile.
fn to_targets() -> String {
    format!("{LONG_LEASE}\n{TO_TARGETS}")
}

fn start(platforms: &Platforms, target: &str) -> Running {
    Vmm::serve(&platforms.config(target, AS_TARGET)).start().expect("a platform")
}

/// Has a VM fork, and gives the report of that. What else was told meanwhile is added to `told`.
pub(super) fn carry_out(source: &mut Running, order: Order, told: &mut Vec<Value>, meanwhile: impl FnOnce()) -> Value {
    source.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
    meanwhile();
    next_fork(source, told)
}

/// Waits for the report of the next fork.
pub(super) fn next_fork(source: &mut Running, told: &mut Vec<Value>) -> Value {
    loop {
        let event = source.next_event().expect("a report");
        if event["event"] == "forked" {
            return event;
        }
        told.push(event);
    }
}

/// The IDs of the copies that have run on targets which have ended, and how many they were of each fork. None has run twice.
pub(super) fn launched(ended: &[Ended]) -> (BTreeSet<String>, BTreeMap<u64, usize>) {
    let (mut ids, mut by_fork) = (BTreeSet::new(), BTreeMap::new());
    let events = ended.iter().flat_map(|ended| &ended.events);
    for event in events.filter(|event| event["event"] == "launched") {
        assert!(ids.insert(event["id"].to_string()), "a copy has run twice: {event}");
        *by_fork.entry(event["seq"].as_u64().expect("a number")).or_default() += 1;
    }
    (ids, by_fork)
}

#[test]
fn whichever_target_is_killed_no_copy_runs_twice_and_the_parent_goes_on() {
    /// Forks before anybody is killed: what has its size from the most that was needed grows.
    const QUIET: u64 = 8;
    let rounds: u64 = if assets::in_lab() { 5 } else { 100 };
    let platforms = Platforms::new(&["a", "b", "c"]);
    let mut targets: Vec<Running> = TARGETS.iter().map(|name| start(&platforms, name)).collect();
    let kernel = user::kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", &to_targets()));
    let mut source = source.start().expect("host-vmm starts");
    source.wait_for_line("00000001").expect("a guest that takes orders");
    know_each_other(&source, 3);
    let node = source.node("vm").expect("a node");
    let order = Order { count: 2, ..Order::default() };
    let (mut told, mut ended, mut failed) = (Vec::new(), Vec::new(), BTreeSet::new());
    let begun = Instant::now();
    for _ in 0..QUIET {
        assert_eq!(carry_out(&mut source, order, &mut told, || {})["code"], 0);
    }
    let usual = begun.elapsed() / u32::try_from(QUIET).expect("small");
    let before = at_rest(&source, node, 2);
    for round in 1..=rounds {
        let at = target_of(round);
        let report = carry_out(&mut source, order, &mut told, || {
            // Any moment of a fork, and a while after.
            thread::sleep(usual.mul_f64(round_part(round)));
            let killed = targets.remove(at);
            killed.signal(Signal::SIGKILL).expect("a signal");
            ended.push(killed.end().expect("its end"));
            targets.insert(at, start(&platforms, TARGETS[at]));
        });
        // Its copies end by themselves. When it is killed in the next round, they have told that they ran.
        vms(&targets[1 - at], 0);
        match report["code"].as_u64().expect("a code") {
            0 => {}
            code if code == u64::from(ErrorCode::Place.number()) => {
                failed.insert(QUIET + round);
            }
            _ => panic!("round {round}: {report}"),
        }
    }
    println!("{} of {rounds} forks failed; a fork takes {usual:?}", failed.len());
    assert_eq!(carry_out(&mut source, order, &mut told, || {})["code"], 0, "both targets are there");
    for target in &targets {
        vms(target, 0);
        become_equal(|| target.nodes().expect("processes"), Vec::new);
    }
    become_equal(|| taken(&source, node), || before.clone());
    for target in targets {
        target.signal(Signal::SIGTERM).expect("a signal");
        ended.push(target.end().expect("a platform that ends"));
    }
    let (ids, by_fork) = launched(&ended);
    for seq in 1..=QUIET + rounds + 1 {
        let run = by_fork.get(&seq).copied().unwrap_or(0);
        // The target that was not killed has one of them at least.
        let right = if failed.contains(&seq) { 0..=0 } else { 1..=2 };
        assert!(right.contains(&run), "{run} copies of fork {seq} have run");
    }
    // Of what the source was told that it runs, nothing is missing but what was killed in that very round.
    source.signal(Signal::SIGTERM).expect("a signal");
    told.extend(source.end().expect("host-vmm ends").events);
    for event in told.iter().filter(|event| event["event"] == "sent") {
        let seq = event["seq"].as_u64().expect("a number");
        let killed = seq > QUIET && seq <= QUIET + rounds && event["platform"] == TARGETS[target_of(seq - QUIET)];
        assert!(killed || ids.contains(&event["id"].to_string()), "{event}");
    }
}

/// Which target is killed in a round.
fn target_of(round: u64) -> usize {
    usize::try_from(round % 2).expect("small")
}

/// When: a part of what a fork takes.
pub(super) fn round_part(round: u64) -> f64 {
    f64::from(u32::try_from(round * 617 % 1009).expect("small")) / 700.0
}

/// What a platform has taken of its host, once it keeps no image that has come.
fn taken_without_images(target: &Running) -> (usize, BTreeMap<String, usize>) {
    let images = wait_until(target, &["image", "ls", "--json"], Value::is_array);
    for image in images.as_array().expect("an array") {
        target.ask(&["image", "rm", image["id"].as_str().expect("an ID")]).expect("an image");
    }
    (target.nodes().expect("processes").len(), descriptors(target.pid()))
}

/// The same, when it has been so for a second.
fn rest(target: &Running) -> (usize, BTreeMap<String, usize>) {
    let deadline = Instant::now() + PATIENCE;
    let (mut last, mut since) = (taken_without_images(target), Instant::now());
    while since.elapsed() < Duration::from_secs(1) {
        assert!(Instant::now() < deadline, "no rest: {last:?}");
        thread::sleep(Duration::from_millis(100));
        let now = taken_without_images(target);
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}

#[test]
fn what_a_killed_source_has_begun_is_undone_after_its_lease() {
    let platforms = Platforms::new(&["a", "b", "c"]);
    let way = Proxy::start(platforms.address("c")).expect("a proxy");
    let mut targets = TARGETS.map(|name| start(&platforms, name));
    let kernel = forks_when_told(2, 2, flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
    let source = source.config(&platforms.config_by_way("a", Some(("c", way.address())), &to_targets()));
    let mut source = source.start().expect("host-vmm starts");
    know_each_other(&source, 3);
    way.set(Fault::None);
    assert_eq!(fork_again(&mut source, 1), [(Status::Forked.number(), 0)]);
    let bytes = way.passed();
    for target in &mut targets {
        target.wait_for_lines("", 3).expect("the clone runs");
    }
    let before = targets.each_ref().map(rest);
    assert_eq!(before.each_ref().map(|(processes, _)| *processes), [1, 1]);
    // One target has all, and waits for the other, which has a part.
    way.set(Fault::StallAfter(bytes / 2));
    source.type_bytes(b"!").expect("a guest that waits");
    wait_until(&targets[0], &["ps", "--json"], |list| list["vms"].as_array().is_some_and(|vms| vms.len() == 2));
    let deadline = Instant::now() + PATIENCE;
    while way.passed() <= bytes / 2 {
        assert!(Instant::now() < deadline, "nothing passes");
        thread::sleep(Duration::from_millis(1));
    }
    source.signal(Signal::SIGKILL).expect("a signal");
    drop((source, way));
    for (target, (processes, before)) in targets.iter().zip(before) {
        vms(target, 1);
        // What its connections to the source took may be gone too.
        let surplus = || {
            let (now, mut taken) = taken_without_images(target);
            taken.retain(|name, count| before.get(name).is_none_or(|before| *count > *before));
            (now - processes, taken)
        };
        become_equal(surplus, Default::default);
    }
}
