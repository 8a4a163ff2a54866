//! Platforms that are killed while copies are on their way.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use vmfork_abi::{Status, flags};
use vmfork_tests::{
    cluster::Platforms,
    fault_rounds,
    proxy::{Fault, Proxy},
    user_guest,
    vmm::{Ended, Running, TIMEOUT, Vmm},
};

use super::{
    fork_again,
    forks::{AS_TARGET, Forks, Rest, TARGETS, end_target, launched, to_targets},
    forks_when_told, know_each_other, vms, wait_until,
};

/// Starts a platform that copies go to.
pub(super) fn start(platforms: &Platforms, target: &str, more: &str) -> Running {
    Vmm::serve(&platforms.config(target, &format!("{AS_TARGET}\n{more}"))).start().expect("a platform")
}

#[test]
fn whichever_target_is_killed_no_copy_runs_twice_and_the_parent_goes_on() {
    let mut chance = fault_rounds::chance();
    let platforms = Platforms::new(&["a", "b", "c"]);
    let mut targets: Vec<_> = TARGETS.iter().map(|name| start(&platforms, name, "")).collect();
    let source = platforms.config("a", &to_targets());
    let mut forks = Forks::start(3, |vmm| vmm.config(&source).start().expect("host-vmm starts"));
    let (mut ended, mut killed) = (Vec::new(), BTreeMap::new());
    for _ in 0..fault_rounds::rounds(100, 5) {
        let (at, moment) = (chance.usize(0..TARGETS.len()), forks.moment(&mut chance));
        killed.insert(forks.last + 1, TARGETS[at]);
        forks.again(|| {
            thread::sleep(moment);
            targets[at].signal(Signal::SIGKILL).expect("a signal");
            ended.push(start_again(&platforms, &mut targets, at, ""));
        });
        // Its copies end by themselves. When it is killed in the next round, they have told that they ran.
        vms(&targets[1 - at], 0);
    }
    let forked = forks.end();
    ended.extend(targets.into_iter().map(end_target));
    forked.agree_with(&ended, &killed);
}

/// Starts a target again that ends, and gives what has come of it.
pub(super) fn start_again(platforms: &Platforms, targets: &mut Vec<Running>, at: usize, more: &str) -> Ended {
    let ended = targets.remove(at).end().expect("its end");
    targets.insert(at, start(platforms, TARGETS[at], more));
    ended
}

#[test]
fn what_a_killed_source_has_begun_is_undone_after_its_lease() {
    let platforms = Platforms::new(&["a", "b", "c"]);
    let way = Proxy::start(platforms.address("c")).expect("a proxy");
    let mut targets = TARGETS.map(|name| start(&platforms, name, ""));
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
    let before = targets.each_ref().map(Rest::of);
    // One target has all, and waits for the other, which has a part.
    way.set(Fault::StallAfter(bytes / 2));
    source.type_bytes(b"!").expect("a guest that waits");
    wait_until(&targets[0], &["ps", "--json"], |list| {
        list["vms"].as_array().is_some_and(|vms| vms.len() == 2)
    });
    let deadline = Instant::now() + TIMEOUT;
    while way.passed() <= bytes / 2 {
        assert!(Instant::now() < deadline, "nothing passes");
        thread::sleep(Duration::from_millis(1));
    }
    source.signal(Signal::SIGKILL).expect("a signal");
    drop((source, way));
    targets.iter().zip(before).for_each(|(target, before)| before.comes_again(target, 1));
}

#[test]
fn whenever_a_source_is_killed_its_copies_run_once_or_never_and_nobody_elses_are_lost() {
    let mut chance = fault_rounds::chance();
    let platforms = Platforms::new(&["a", "b", "c", "d"]);
    let targets = TARGETS.map(|name| start(&platforms, name, ""));
    let config = |name| platforms.config(name, &to_targets());
    let mut forks = Forks::start(3, |vmm| vmm.config(&config("a")).start().expect("host-vmm starts"));
    let before = targets.each_ref().map(Rest::of);
    let kernel = user_guest::kernel();
    let mut killed = Vec::new();
    for _ in 0..fault_rounds::rounds(100, 2) {
        let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&config("d"));
        let mut source = source.start().expect("host-vmm starts");
        source.wait_for_line("00000001").expect("a guest that takes orders");
        know_each_other(&source, 4);
        // Of a VM that has not forked before, all memory goes away.
        let (moment, order) = (2 * forks.moment(&mut chance), forks.order);
        forks.again(|| {
            source.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
            thread::sleep(moment);
            source.signal(Signal::SIGKILL).expect("a signal");
        });
        killed.push(source.end().expect("its end"));
    }
    // What it has begun is undone after its lease.
    targets.iter().zip(before).for_each(|(target, before)| before.comes_again(target, 0));
    let forked = forks.end();
    let ended = targets.map(end_target);
    forked.agree_with(&ended, &BTreeMap::new());
    let (copies, mut count) = (launched(&ended), 0);
    assert!(copies.values().all(|copy| copy.has_said), "a copy is lost");
    for source in &killed {
        let own =
            source.events.iter().find(|event| event["event"] == "started").expect("a VM")["id"].to_string();
        let run = copies.values().filter(|copy| copy.parent == own).count();
        count += run;
        let failed = source.forks().iter().any(|fork| fork["code"] != 0);
        assert!(run <= if failed { 0 } else { 2 }, "{run} copies of a fork have run");
        let sent = source.events.iter().filter(|event| event["event"] == "sent");
        sent.for_each(|event| assert!(copies.contains_key(&event["id"].to_string()), "{event}"));
    }
    println!("{count} copies of {} sources have run", killed.len());
}
