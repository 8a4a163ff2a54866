//! Platforms that know each other by an etcd, which may be gone, or out of reach.

use std::{
    cell::Cell,
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmfork_tests::{
    cluster::Platforms,
    etcd::Etcd,
    fault_rounds,
    proxy::{Fault, Proxy},
    vmm::{Running, Vmm},
};

use super::{
    FORKED, NO_PLACE, fork_again,
    forks::{AS_TARGET, Forks, Rest, TARGETS, TO_TARGETS, end_target},
    know_each_other, source, vms, wait_until,
};

/// Waits until a platform says whether it is cut off from the others.
pub(super) fn is_cut_off(running: &Running, is: bool) {
    wait_until(running, &["platforms", "--json"], |known| known["partitioned"] == is);
}

/// Waits until a platform has heard from its etcd since a moment. One that is not cut off may be about to be:
/// it is a member until its lease is over, though it has lost etcd and not found it again yet.
fn has_heard_since(running: &Running, moment: Instant) {
    let asked = Cell::new(moment.elapsed());
    wait_until(running, &["platforms", "--json"], |known| {
        let others =
            known["platforms"].as_array().and_then(|platforms| platforms.get(1..)).unwrap_or_default();
        let is_recent = |other: &Value| {
            other["age_ms"].as_u64().is_some_and(|ms| Duration::from_millis(ms) < asked.get())
        };
        let has_heard = !others.is_empty() && others.iter().all(is_recent);
        asked.set(moment.elapsed());
        has_heard
    });
}

/// The names of those that a platform knows, its own first.
pub(super) fn names(known: &Value) -> Vec<&str> {
    let platforms = known["platforms"].as_array().map_or(&[][..], Vec::as_slice);
    platforms.iter().filter_map(|platform| platform["name"].as_str()).collect()
}

#[test]
fn an_etcd_can_come_and_go_while_vms_go_on() {
    let Some(mut etcd) = Etcd::start() else { return };
    let platforms = Platforms::new(&["a", "b", "c"]);
    let config = |name| platforms.config_by_etcd(name, etcd.address(), "");
    let target = Vmm::serve(&config("b")).start().expect("a platform");
    let killed = Vmm::serve(&config("c")).start().expect("a platform");
    let (mut source, _kernel) = source(&config("a"), 3);
    know_each_other(&source, 3);
    know_each_other(&target, 3);
    killed.signal(Signal::SIGKILL).expect("a signal");
    let begun = Instant::now();
    know_each_other(&source, 2);
    // etcd looks for leases that have ended now and then.
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "a platform with a lease of 3 s was there for {:?}",
        begun.elapsed()
    );
    assert_eq!(fork_again(&mut source, 1), [FORKED]);
    vms(&target, 1);

    etcd.kill();
    is_cut_off(&source, true);
    is_cut_off(&target, true);
    assert_eq!(fork_again(&mut source, 2), [FORKED, NO_PLACE]);
    vms(&target, 1);
    etcd.restart();
    is_cut_off(&source, false);
    is_cut_off(&target, false);
    know_each_other(&source, 2);
    assert_eq!(fork_again(&mut source, 3), [FORKED, NO_PLACE, FORKED]);
    vms(&target, 2);
    vms(&source, 1);
}

#[test]
fn a_platform_that_is_cut_off_keeps_its_vms_and_gets_no_new_ones() {
    let Some(etcd) = Etcd::start() else { return };
    let platforms = Platforms::new(&["a", "b", "c"]);
    let way = Proxy::start(etcd.address()).expect("a proxy");
    let others = Vmm::serve(&platforms.config_by_etcd("c", etcd.address(), "")).start().expect("a platform");
    let target = Vmm::serve(&platforms.config_by_etcd("b", way.address(), "")).start().expect("a platform");
    // It knows the others by a list too: so it goes on to ask the one that is cut off.
    let peer = format!("{{ name = \"b\", address = \"{}\" }}", platforms.address("b"));
    let pinned = "[placement.\"*\"]\npolicy = \"pinned\"\npinned = [\"b\"]";
    let more = format!("peers = [{peer}]\nkeep = [\"web\"]\n{pinned}");
    let (mut source, _kernel) = source(&platforms.config_by_etcd("a", etcd.address(), &more), 3);
    for platform in [&source, &target, &others] {
        know_each_other(platform, 3);
    }
    assert_eq!(fork_again(&mut source, 1), [FORKED]);
    let clone = vms(&target, 1);
    way.set(Fault::StallAfter(0));
    is_cut_off(&target, true);
    wait_until(&others, &["platforms", "--json"], |known| names(known) == ["c", "a"]);
    wait_until(&source, &["platforms", "--json"], |known| names(known) == ["a", "b", "c"]);
    assert_eq!(fork_again(&mut source, 2), [FORKED, NO_PLACE]);
    let images = wait_until(&source, &["image", "ls", "--json"], |images| images[0]["id"].is_string());
    let image = images[0]["id"].as_str().expect("an ID");
    let refused =
        source.ask(&["clone", "--image", image, "--to", "b"]).expect_err("a platform that is cut off");
    assert!(refused.to_string().contains("cut off from its cluster"), "{refused:#}");
    assert_eq!(vms(&target, 1)[0]["id"], clone[0]["id"]);
    way.set(Fault::None);
    is_cut_off(&target, false);
    know_each_other(&others, 3);
    assert_eq!(fork_again(&mut source, 3), [FORKED, NO_PLACE, FORKED]);
    vms(&target, 2);
}

#[test]
fn who_has_ended_is_gone_at_once() {
    let Some(etcd) = Etcd::start() else { return };
    let platforms = Platforms::new(&["a", "b"]);
    let config = |name| {
        platforms.config_by_etcd(name, etcd.address(), "").replace("lease_seconds = 3", "lease_seconds = 60")
    };
    let stays = Vmm::serve(&config("b")).start().expect("a platform");
    let ends: [fn(&Running); 2] = [
        |running| drop(running.ask(&["stop", "vm"]).expect("a VM that is there")),
        |running| running.signal(Signal::SIGTERM).expect("a signal"),
    ];
    for end in ends {
        let (mut running, _kernel) = source(&config("a"), 1);
        running.wait_for("the VM", |event| (event["event"] == "started").then_some(())).expect("a VM");
        know_each_other(&stays, 2);
        end(&running);
        running.end().expect("its end");
        let ended = Instant::now();
        know_each_other(&stays, 1);
        assert!(ended.elapsed() < Duration::from_secs(20), "it was there until its lease was over");
    }
}

#[test]
fn whenever_an_etcd_is_killed_and_comes_back_all_copies_of_a_fork_run_or_none() {
    /// Longer than the lease: everybody is cut off.
    const LONG: Duration = Duration::from_secs(4);
    /// As long as it takes at most where nobody is.
    const SHORT: Duration = Duration::from_millis(500);
    let Some(mut etcd) = Etcd::start() else { return };
    let mut chance = fault_rounds::chance();
    let platforms = Platforms::new(&["a", "b", "c"]);
    let [a, b, c] = [("a", TO_TARGETS), (TARGETS[0], AS_TARGET), (TARGETS[1], AS_TARGET)]
        .map(|(name, more)| platforms.config_by_etcd(name, etcd.address(), more));
    let targets = [b, c].map(|config| Vmm::serve(&config).start().expect("a platform"));
    let mut forks = Forks::start(3, |vmm| vmm.config(&a).start().expect("host-vmm starts"));
    let before = targets.each_ref().map(Rest::of);
    for round in 0..fault_rounds::rounds(5, 5) {
        let (up, down) = (SHORT.mul_f64(chance.f64()), SHORT.mul_f64(chance.f64()));
        let down = if round % 5 == 2 { LONG } else { down };
        thread::scope(|scope| {
            let outage = scope.spawn(|| {
                thread::sleep(up);
                etcd.kill();
                thread::sleep(down);
                etcd.restart();
            });
            while !outage.is_finished() {
                forks.again(|| {});
                // Of more than a hundred within a second that fail, not all are reported.
                thread::sleep(Duration::from_millis(20));
            }
        });
    }
    let restarted = Instant::now();
    for platform in [&forks.source, &targets[0], &targets[1]] {
        has_heard_since(platform, restarted);
        is_cut_off(platform, false);
    }
    know_each_other(&forks.source, 3);
    targets.iter().zip(before).for_each(|(target, before)| before.comes_again(target, 0));
    let forked = forks.end();
    forked.agree_with(&targets.map(end_target), &BTreeMap::new());
}
