//! Ways on which things go wrong for a while.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use vmfork_abi::{ErrorCode, Status, flags};
use vmfork_tests::{
    assets,
    cluster::Platforms,
    proxy::{Fault, Proxy},
    vmm::{PATIENCE, Vmm},
};

use super::{fork_again, forks_when_told, know_each_other, source_with_image, vms};

/// How often it is looked how far something is.
const LOOK: Duration = Duration::from_millis(1);

/// A target is not forgotten while nothing sensible is heard of it.
const LONG_LEASE: &str = "lease_seconds = 60";

const FORKED: (u32, u32) = (Status::Forked.number(), 0);
const NO_PLACE: (u32, u32) = (Status::Failed.number(), ErrorCode::Place.number());

/// Waits until more than so many bytes have passed since the fault was set.
fn wait_passed(way: &Proxy, bytes: u64) {
    let deadline = Instant::now() + PATIENCE;
    while way.passed() <= bytes {
        assert!(Instant::now() < deadline, "nothing passes");
        thread::sleep(LOOK);
    }
}

#[test]
fn a_target_that_speaks_garbage_for_a_while_is_tried_again() {
    let platforms = Platforms::new(&["a", "b"]);
    let way = Proxy::start(platforms.address("b")).expect("a proxy");
    let target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let kernel = forks_when_told(1, 1, flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
    let source = source.config(&platforms.config_by_way("a", Some(("b", way.address())), LONG_LEASE));
    let mut source = source.start().expect("host-vmm starts");
    know_each_other(&source, 2);
    way.set(Fault::Garbage);
    thread::scope(|scope| {
        scope.spawn(|| {
            // A few answers.
            wait_passed(&way, 150);
            way.set(Fault::None);
        });
        assert_eq!(fork_again(&mut source, 1), [FORKED]);
    });
    assert_eq!(vms(&target, 1)[0]["parent"], vms(&source, 1)[0]["id"]);
}

#[test]
fn what_should_be_a_certificate_and_is_garbage_makes_the_fork_fail() {
    let platforms = Platforms::with_certificates(&["a", "b"]);
    let way = Proxy::start(platforms.address("b")).expect("a proxy");
    let target = Vmm::serve(&platforms.config("b", "ready = 0")).start().expect("a platform");
    let kernel = forks_when_told(2, 1, flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
    let source = source.config(&platforms.config_by_way("a", Some(("b", way.address())), LONG_LEASE));
    let mut source = source.start().expect("host-vmm starts");
    know_each_other(&source, 2);
    way.set(Fault::Garbage);
    assert_eq!(fork_again(&mut source, 1), [NO_PLACE]);
    assert!(way.passed() > 0, "nobody has come by this way");
    vms(&target, 0);
    assert!(target.nodes().expect("processes").is_empty());
    way.set(Fault::None);
    assert_eq!(fork_again(&mut source, 2), [NO_PLACE, FORKED]);
    vms(&target, 1);
}

#[test]
fn wherever_the_way_stalls_and_comes_back_there_is_one_clone() {
    let rounds: u64 = if assets::in_lab() { 10 } else { 100 };
    let platforms = Platforms::new(&["a", "b"]);
    let way = Proxy::start(platforms.address("b")).expect("a proxy");
    let config = platforms.config_by_way("a", Some(("b", way.address())), "keep = [\"web\"]");
    let target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let (source, image, _kernel) = source_with_image(&config);
    know_each_other(&source, 2);
    let clone = || source.ask(&["clone", "--image", &image, "--to", "b"]);
    way.set(Fault::None);
    clone().expect("a clone");
    let bytes = way.passed();
    for round in 1..=rounds {
        target.ask(&["image", "rm", &image]).expect("an image that has come");
        let at = bytes * (round * 617 % 1009) / 1009;
        way.set(Fault::StallAfter(at));
        let is_over = AtomicBool::new(false);
        let cloned = thread::scope(|scope| {
            scope.spawn(|| {
                while way.passed() <= at && !is_over.load(Ordering::SeqCst) {
                    thread::sleep(LOOK);
                }
                way.set(Fault::None);
            });
            let cloned = clone();
            is_over.store(true, Ordering::SeqCst);
            cloned
        });
        cloned.unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        assert_eq!(vms(&target, usize::try_from(round).expect("small") + 1).len() as u64, round + 1);
    }
}
