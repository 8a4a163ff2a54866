//! Platforms on hosts of their own, over mutual TLS, whose cables are pulled.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use vmfork_abi::{ErrorCode, flags};
use vmfork_tests::{
    cluster::Platforms,
    etcd::Etcd,
    fault_rounds,
    network::Network,
    user_guest::{self, Order},
    vmm::{Running, TIMEOUT, Vmm},
};

use super::{
    super::left_behind::{become_equal, descriptors},
    FORKED, LOOK, NO_PLACE,
    etcd::{is_cut_off, names},
    fork_again,
    forks::{AS_TARGET, Forks, Rest, TARGETS, TO_TARGETS, carry_out, end_target, launched, next_fork},
    forks_when_told, know_each_other, numbers, then_fork_when_told, vms, wait_until,
};

/// The platforms; each has a host of the same name.
const PLATFORMS: [&str; 3] = ["a", "b", "c"];

/// The hosts of their etcd.
const ETCD: [&str; 3] = ["etcd-1", "etcd-2", "etcd-3"];

/// How a platform is set up that sends copies to all.
const SPREAD: &str = "[placement.\"*\"]\npolicy = \"spread\"";

/// How soon all others have forgotten a platform whose lease is 3 s: etcd looks for leases that have ended
/// now and then.
const FORGOTTEN: Duration = Duration::from_secs(8);

/// Platforms, and an etcd, that share nothing but a network.
struct Site {
    network: Network,
    etcd: Etcd,
    platforms: Platforms,
}

impl Site {
    /// None where there can't be any here.
    fn start(platforms: &[&'static str], etcd: &[&'static str]) -> Option<Self> {
        let network = Network::start(&[platforms, etcd].concat())?;
        let etcd = Etcd::start_on(etcd.iter().map(|name| network.host(name)))?;
        Some(Self { platforms: Platforms::on(&network, platforms), network, etcd })
    }

    /// Starts a platform on its host.
    fn run(&self, name: &str, vmm: Vmm, more: &str) -> Running {
        let config = self.platforms.config_by_etcd(name, self.etcd.addresses(), more);
        vmm.config(&config).on(self.network.host(name)).start().expect("host-vmm starts")
    }

    /// Starts one that boots nothing.
    fn serve(&self, name: &str, more: &str) -> Running {
        self.run(name, Vmm::default(), more)
    }
}

/// The IDs of VMs, once there are so many and all of them run.
fn ids(running: &Running, count: usize) -> BTreeSet<String> {
    vms(running, count).iter().map(|vm| vm["id"].to_string()).collect()
}

#[test]
fn a_platform_whose_cable_is_pulled_keeps_its_vms_gets_no_new_ones_and_comes_back() {
    let Some(site) = Site::start(&PLATFORMS, &ETCD[..1]) else { return };
    let kernel = then_fork_when_told(forks_when_told(1, 3, 0), 2, 2, flags::REMOTE);
    let kernel =
        (3..=4).fold(kernel, |script, seq| then_fork_when_told(script, seq, 2, flags::REMOTE)).to_kernel();
    let mut a = site.run("a", Vmm::kernel(kernel.path()).option("--mem", "64M"), SPREAD);
    // A VM that has nothing to do with the others.
    let kernel = forks_when_told(1, 1, flags::LOCAL).to_kernel();
    let mut b = site.run("b", Vmm::kernel(kernel.path()).option("--mem", "64M"), "");
    let mut c = site.serve("c", "");
    for platform in [&a, &b, &c] {
        know_each_other(platform, 3);
    }
    assert_eq!(fork_again(&mut a, 1), [FORKED]);
    assert_eq!(fork_again(&mut a, 2), [FORKED; 2]);
    vms(&a, 2);
    let (of_b, of_c) = (ids(&b, 3), ids(&c, 2));
    // They run: each says who it is.
    for there in [&mut b, &mut c] {
        let lines = there.wait_for_lines("", 6).expect("the clones run");
        for name in ["web.1", "web.2"] {
            assert!(
                matches!(numbers(&lines, name)[..], [forked, error, 1..=3] if (forked, error) == FORKED),
                "{lines:?}"
            );
        }
    }

    let pulled = Instant::now();
    site.network.pull("b");
    for other in [&a, &c] {
        wait_until(other, &["platforms", "--json"], |known| !names(known).contains(&"b"));
    }
    assert!(
        pulled.elapsed() < FORGOTTEN,
        "a platform with a lease of 3 s was there for {:?}",
        pulled.elapsed()
    );
    is_cut_off(&b, true);
    assert_eq!(fork_again(&mut a, 3), [FORKED; 3]);
    assert!(ids(&c, 4).is_superset(&of_c));
    assert_eq!(ids(&b, 3), of_b);
    assert_eq!(fork_again(&mut b, 1), [FORKED]);
    assert!(ids(&b, 4).is_superset(&of_b));

    site.network.plug("b");
    is_cut_off(&b, false);
    for platform in [&a, &b, &c] {
        know_each_other(platform, 3);
    }
    assert_eq!(fork_again(&mut a, 4), [FORKED; 4]);
    assert!(ids(&b, 5).is_superset(&of_b));
    vms(&c, 5);
}

#[test]
fn whenever_a_cable_is_pulled_for_a_moment_all_copies_of_a_fork_run_or_none() {
    /// A cable is never out for longer than this.
    const LONGEST: Duration = Duration::from_millis(300);
    let Some(site) = Site::start(&PLATFORMS, &ETCD[..1]) else { return };
    let (rounds, mut chance) = (fault_rounds::rounds(10, 10), fault_rounds::chance());
    let targets = TARGETS.map(|name| site.serve(name, AS_TARGET));
    let mut forks = Forks::start(3, |vmm| site.run("a", vmm, TO_TARGETS));
    let before = targets.each_ref().map(Rest::of);
    let mut interrupted = 0;
    for _ in 0..rounds {
        let (name, moment) = (TARGETS[chance.usize(0..TARGETS.len())], forks.moment(&mut chance));
        let pause = forks.again(|| {
            thread::sleep(moment);
            site.network.pull(name);
            thread::sleep(LONGEST.mul_f64(chance.f64()));
            site.network.plug(name);
        });
        interrupted += u32::from(pause > 2 * forks.usual);
    }
    println!("{interrupted} of {rounds} forks were interrupted");
    assert!(interrupted > 0, "no fork was interrupted");
    targets.iter().for_each(|target| is_cut_off(target, false));
    know_each_other(&forks.source, 3);
    targets.iter().zip(before).for_each(|(target, before)| before.comes_again(target, 0));
    let forked = forks.end();
    forked.agree_with(&targets.map(end_target), &BTreeMap::new());
}

#[test]
fn copies_that_can_not_be_sent_where_they_should_go_are_sent_elsewhere_and_nothing_is_left_there() {
    /// How a platform is set up that takes a second to send 4 MiB, to the first of these that takes it.
    const SLOWLY_TO_B: &str =
        "[clone]\nbandwidth = 4194304\n[placement.\"*\"]\npolicy = \"pinned\"\npinned = [\"b\", \"c\"]";
    /// A parent does not stand still for as long as targets wait for their sources.
    const PAUSE: Duration = Duration::from_secs(20);
    let Some(site) = Site::start(&["a", "b", "c", "d", "e"], &ETCD[..1]) else { return };
    let [b, c] = TARGETS.map(|name| site.serve(name, "ready = 0"));
    let kernel = user_guest::kernel();
    let mut sources = ["a", "d", "e"].map(|name| {
        let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M");
        let mut source = site.run(name, vmm, SLOWLY_TO_B);
        source.wait_for_line("00000001").expect("a guest that takes orders");
        source
    });
    sources.iter().for_each(|source| know_each_other(source, 5));
    let memory_files =
        || descriptors(b.pid()).into_iter().filter(|(name, _)| name.contains("memfd")).collect();
    let before: Vec<_> = memory_files();
    let order = Order { count: 1, dirty_pages: 1024, rewrite_pages: 1, ..Order::default() };
    for source in &mut sources {
        let earlier = memory_files();
        source.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
        let deadline = Instant::now() + TIMEOUT;
        while memory_files() == earlier {
            assert!(Instant::now() < deadline, "nothing is sent");
            thread::sleep(LOOK);
        }
    }
    site.network.pull("b");
    let pulled = Instant::now();
    for source in &mut sources {
        assert_eq!(next_fork(source, &mut Vec::new())["code"], 0);
    }
    assert!(pulled.elapsed() < PAUSE, "the parents stood still for {:?}", pulled.elapsed());
    site.network.plug("b");

    // One that is cut off itself knows that it need not wait.
    let [a, ..] = &mut sources;
    site.network.pull("a");
    is_cut_off(a, true);
    let begun = Instant::now();
    assert_eq!(carry_out(a, order, &mut Vec::new(), || {})["code"], ErrorCode::Place.number());
    assert!(begun.elapsed() < PAUSE, "the parent stood still for {:?}", begun.elapsed());
    vms(a, 1);
    site.network.plug("a");

    become_equal(memory_files, || before.clone());
    sources.iter().for_each(|source| know_each_other(source, 5));
    let copies = launched(&[b, c].map(end_target));
    assert_eq!(copies.values().map(|copy| copy.seq).collect::<Vec<_>>(), [1; 3]);
}

#[test]
fn no_vm_is_lost_while_an_etcd_is_cut_off_or_has_another_leader() {
    let Some(site) = Site::start(&["a", "b", "c", "guest"], &ETCD) else { return };
    let kernel = forks_when_told(6, 2, flags::REMOTE).to_kernel();
    let mut a = site.run("a", Vmm::kernel(kernel.path()).option("--mem", "64M"), SPREAD);
    let [b, c] = TARGETS.map(|name| site.serve(name, ""));
    let mut forks = Vec::new();
    let mut fork = |a: &mut Running, outcome| {
        forks.push(outcome);
        assert_eq!(fork_again(a, forks.len()), forks);
    };
    know_each_other(&a, 3);
    fork(&mut a, FORKED);
    let mut before = [&b, &c].map(|target| ids(target, 1));

    ETCD.iter().for_each(|server| site.network.pull(server));
    [&a, &b, &c].into_iter().for_each(|platform| is_cut_off(platform, true));
    fork(&mut a, NO_PLACE);
    assert_eq!([&b, &c].map(|target| ids(target, 1)), before);
    ETCD.iter().for_each(|server| site.network.plug(server));
    [&a, &b, &c].into_iter().for_each(|platform| is_cut_off(platform, false));
    know_each_other(&a, 3);
    fork(&mut a, FORKED);

    // One of them leads.
    for (server, copies) in ETCD.into_iter().zip(3..) {
        site.network.pull(server);
        let guest = site.serve("guest", "");
        [&a, &b, &c].into_iter().for_each(|platform| know_each_other(platform, 4));
        guest.signal(Signal::SIGTERM).expect("a signal");
        assert_eq!(guest.end().expect("a platform that leaves").code, Some(0));
        [&a, &b, &c].into_iter().for_each(|platform| know_each_other(platform, 3));
        [&a, &b, &c].into_iter().for_each(|platform| is_cut_off(platform, false));
        fork(&mut a, FORKED);
        let now = [&b, &c].map(|target| ids(target, copies));
        assert!(before.iter().zip(&now).all(|(before, now)| now.is_superset(before)));
        before = now;
        site.network.plug(server);
    }
}
