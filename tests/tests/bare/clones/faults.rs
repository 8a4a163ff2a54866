//! Ways on which things go wrong for a while.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use capsule::header::VERSION;
use fastrand::Rng;
use vmfork_abi::flags;
use vmfork_tests::{
    assets,
    cluster::Platforms,
    fault_rounds,
    proxy::{Fault, Proxy},
    user_guest::{self, Order},
    vmm::Vmm,
};

use super::{
    Cloned, LONG_LEASE, LOOK,
    forks::{Forks, Rest, carry_out, end_target, to_targets},
    killed::start,
    know_each_other, vms,
};

/// What goes wrong on a way, and a name for it.
type Faults<'f> = [(&'f str, &'f dyn Fn(&mut Rng) -> Fault)];

/// Has a VM fork into copies on two platforms, and each of these faults be there for a while on the way to
/// the first of them, from before a fork or at any moment of it. The second has room for its share alone:
/// where the first takes none, there is no fork.
fn on_a_way_with(platforms: &Platforms, faults: &Faults<'_>) {
    /// How long it goes wrong at most.
    const LONGEST: Duration = Duration::from_millis(50);
    let (rounds, mut chance) = (fault_rounds::rounds(100, 3), fault_rounds::chance());
    let way = Proxy::start(platforms.address("b")).expect("a proxy");
    let targets = [start(platforms, "b", ""), start(platforms, "c", "max_vms = 1")];
    let source = platforms.config_by_way("a", Some(("b", way.address())), &to_targets());
    let mut forks = Forks::start(3, |vmm| vmm.config(&source).start().expect("host-vmm starts"));
    let before = targets.each_ref().map(Rest::of);
    for (name, fault) in faults {
        let failed = forks.failed.len();
        for _ in 0..rounds {
            let (moment, pause) = (forks.moment(&mut chance), LONGEST.mul_f64(chance.f64()));
            let fault = fault(&mut chance);
            forks.again(|| {
                thread::sleep(moment);
                way.set(fault);
                thread::sleep(pause);
                way.set(Fault::None);
            });
            vms(&targets[1], 0);
        }
        println!("{name}: {} of {rounds} forks failed", forks.failed.len() - failed);
    }
    // What the first has not heard of any more is undone after a lease.
    targets.iter().zip(before).for_each(|(target, before)| before.comes_again(target, 0));
    let forked = forks.end();
    forked.agree_with(&targets.map(end_target), &BTreeMap::new());
}

fn garbage(chance: &mut Rng) -> Fault {
    Fault::Garbage(chance.u64(..))
}

#[test]
fn whatever_garbage_is_spoken_for_a_while_or_version_is_not_known_all_copies_of_a_fork_run_or_none() {
    // The present one would be right: instead of it, the next.
    let version = |chance: &mut Rng| match chance.u32(..=VERSION) {
        VERSION => Fault::Version(VERSION + 1),
        older => Fault::Version(older),
    };
    on_a_way_with(&Platforms::new(&["a", "b", "c"]), &[("garbage", &garbage), ("version", &version)]);
}

#[test]
fn whoever_shows_no_certificate_or_a_wrong_one_gets_no_copies_and_all_others_run_or_none() {
    let platforms = Platforms::with_certificates(&["a", "b", "c"]);
    let others = Platforms::new(&["b"]).with_own_ca();
    let impostor = start(&others, "b", "");
    // One is of another CA, and the other of another name.
    let wrong = [others.address("b"), platforms.address("c")];
    let wrong = |chance: &mut Rng| Fault::Elsewhere(wrong[chance.usize(..wrong.len())]);
    on_a_way_with(&platforms, &[("garbage", &garbage), ("wrong certificates", &wrong)]);
    assert!(end_target(impostor).events.is_empty());
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
    let mut chance = fault_rounds::chance();
    let cloned = Cloned::start("", "");
    for round in 1..=fault_rounds::rounds(100, 10) {
        cloned.forget();
        let at = cloned.part(&mut chance);
        let again = on_a_way_that_stalls(&cloned.way, at, Duration::ZERO, || cloned.again());
        again.unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        vms(&cloned.target, usize::try_from(round).expect("small") + 1);
    }
}

/// Where a way stalls, in thousandths of what passes for a clone: most of that is memory, and the last of it
/// is what lets the clone run.
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
    /// Longer than a source waits for an answer, which is 10 s, and shorter than its target waits for it,
    /// which is 20 s.
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
    let kernel = user_guest::kernel();
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
