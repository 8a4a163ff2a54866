//! Ways on which things go wrong for a while.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use vmfork_abi::flags;
use vmfork_tests::{
    assets,
    cluster::Platforms,
    proxy::{Fault, Proxy},
    rounds,
    user::{self, Order},
    vmm::{PATIENCE, Vmm},
};

use super::{Cloned, FORKED, LONG_LEASE, LOOK, NO_PLACE, fork_again, forks::carry_out, know_each_other, source, vms};

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
    let (mut source, _kernel) = source(&platforms.config_by_way("a", Some(("b", way.address())), LONG_LEASE), 1);
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
    let (mut source, _kernel) = source(&platforms.config_by_way("a", Some(("b", way.address())), LONG_LEASE), 2);
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

/// Does something on a way that stalls once more than so many bytes have passed, and goes on after a while.
fn on_a_way_that_stalls<T>(way: &Proxy, after: u64, pause: Duration, work: impl FnOnce() -> T) -> T {
    way.set(Fault::StallAfter(after));
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while way.passed() <= after && !is_over.load(Ordering::SeqCst) {
                thread::sleep(LOOK);
            }
            if !is_over.load(Ordering::SeqCst) {
                thread::sleep(pause);
            }
            way.set(Fault::None);
        });
        let done = work();
        is_over.store(true, Ordering::SeqCst);
        done
    })
}

#[test]
fn wherever_the_way_stalls_and_comes_back_there_is_one_clone() {
    let mut chance = rounds::chance();
    let cloned = Cloned::start("", "");
    for round in 1..=rounds::rounds(100, 10) {
        cloned.forget();
        let at = cloned.part(&mut chance);
        let again = on_a_way_that_stalls(&cloned.way, at, Duration::ZERO, || cloned.again());
        again.unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        vms(&cloned.target, usize::try_from(round).expect("small") + 1);
    }
}

/// Where a way stalls, in thousandths of what passes for a clone: most of that is memory, and the last of it is what lets the clone run.
const STALLS: [u64; 6] = [0, 300, 600, 900, 970, 990];

#[test]
fn where_answers_come_later_than_anybody_waits_for_them_there_is_one_clone() {
    let stalls = if assets::in_lab() { &STALLS[..2] } else { &STALLS };
    // All of them wait at the same time.
    let stalled: usize = thread::scope(|scope| {
        let rounds: Vec<_> = stalls.iter().map(|at| scope.spawn(|| has_one_clone_stalled(*at))).collect();
        rounds.into_iter().map(|round| usize::from(round.join().expect("one clone"))).sum()
    });
    println!("{stalled} of {} clones have waited", stalls.len());
    // What passes beside a clone is not always the same: those behind may not have come so far.
    assert!(stalled >= stalls.len().div_ceil(2));
}

/// Makes a clone on a way that stalls for a long time, and says whether that was so.
fn has_one_clone_stalled(at_permille: u64) -> bool {
    /// Longer than a source waits for an answer, which is 10 s, and shorter than its target waits for it, which is 20 s.
    const STALL: Duration = Duration::from_secs(11);
    let cloned = Cloned::start(LONG_LEASE, "");
    cloned.forget();
    let (begun, at) = (Instant::now(), cloned.bytes * at_permille / 1000);
    on_a_way_that_stalls(&cloned.way, at, STALL, || cloned.again()).expect("a clone after all");
    vms(&cloned.target, 2);
    begun.elapsed() >= STALL
}

#[test]
fn after_a_cut_only_what_is_missing_comes_again() {
    const MIB: u64 = 1 << 20;
    const MEMORY: u64 = 128 * MIB;
    let platforms = Platforms::new(&["a", "b"]);
    let way = Proxy::start(platforms.address("b")).expect("a proxy");
    let _target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let kernel = user::kernel();
    let config = platforms.config_by_way("a", Some(("b", way.address())), LONG_LEASE);
    let source = Vmm::kernel(kernel.path()).option("--mem", "256M").config(&config);
    let mut source = source.start().expect("host-vmm starts");
    source.wait_for_line("00000001").expect("a guest that takes orders");
    know_each_other(&source, 2);
    way.set(Fault::CutAfter(MEMORY / 4 * 3));
    let dirty_pages = u32::try_from(MEMORY / 4096).expect("small");
    let order = Order { count: 1, dirty_pages, flags: flags::REMOTE, ..Order::default() };
    assert_eq!(carry_out(&mut source, order, &mut Vec::new(), || {})["code"], 0);
    // What was on its way, and in nobody's hands, comes twice; all of it would be 7/4.
    let passed = way.passed();
    assert!((MEMORY..MEMORY / 2 * 3).contains(&passed), "{} MiB have passed", passed / MIB);
}
