//! Many forks of one VM while something goes wrong, and what must be true of them all the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::NamedTempFile;
use vmfork_abi::ErrorCode;
use vmfork_tests::{
    user_guest::{self, Order},
    vmm::{Ended, Running, TIMEOUT, Vmm, console_line},
};

use super::{
    super::left_behind::{Taken, at_rest, become_equal, descriptors, taken},
    LONG_LEASE, know_each_other, vms, wait_until,
};

/// Where copies go.
pub(super) const TARGETS: [&str; 2] = ["b", "c"];

/// How each of them is set up. No warm VMs are ready: each process is a VM's.
pub(super) const AS_TARGET: &str = "ready = 0\nlabels = { role = \"target\" }";

/// How a platform is set up that sends its copies there. Of warm VMs that nobody takes, one stays.
pub(super) const TO_TARGETS: &str =
    "ready = 1\n[placement.\"*\"]\npolicy = \"spread\"\nlabels = { role = \"target\" }";

/// The same, and it forgets none of them meanwhile.
pub(super) fn to_targets() -> String {
    format!("{LONG_LEASE}\n{TO_TARGETS}")
}

/// How many copies each fork makes.
const COPIES: u32 = 2;

/// Forks before anything goes wrong: what has its size from the most that was needed grows.
const QUIET: u64 = 8;

/// A VM that forks again and again, and what has come of that.
pub(super) struct Forks {
    pub(super) source: Running,
    node: u32,
    id: String,
    pub(super) order: Order,
    /// What is taken on its platform while nothing happens.
    before: Taken,
    /// How long a fork takes while nothing goes wrong.
    pub(super) usual: Duration,
    told: Vec<Value>,
    /// The number of the last one.
    pub(super) last: u64,
    /// The numbers of those that were not made.
    pub(super) failed: BTreeSet<u64>,
    _kernel: NamedTempFile,
}

impl Forks {
    /// Those of a VM that `start` starts on a platform, which comes to know so many. Of each fork's copies,
    /// each prints its index and ends.
    pub(super) fn start(platforms: usize, start: impl FnOnce(Vmm) -> Running) -> Self {
        let kernel = user_guest::kernel();
        let mut source = start(Vmm::kernel(kernel.path()).option("--mem", "64M"));
        source.wait_for_line("00000001").expect("a guest that takes orders");
        know_each_other(&source, platforms);
        let node = source.node("vm").expect("a node");
        let id = source.wait_for("its ID", |event| (event["name"] == "vm").then(|| event["id"].to_string()));
        let id = id.expect("a VM");
        let order = Order { count: COPIES, dirty_pages: 256, rewrite_pages: 1, ..Order::default() };
        let begun = Instant::now();
        let mut told = Vec::new();
        for _ in 0..QUIET {
            assert_eq!(carry_out(&mut source, order, &mut told, || {})["code"], 0);
        }
        let usual = begun.elapsed() / u32::try_from(QUIET).expect("small");
        let before = at_rest(&source, node, 1);
        Self {
            source,
            node,
            id,
            order,
            before,
            usual,
            told,
            last: QUIET,
            failed: BTreeSet::new(),
            _kernel: kernel,
        }
    }

    /// Has it fork once more, and gives how long it stood still for that.
    pub(super) fn again(&mut self, meanwhile: impl FnOnce()) -> Duration {
        self.last += 1;
        let report = carry_out(&mut self.source, self.order, &mut self.told, meanwhile);
        match report["code"].as_u64().expect("a code") {
            0 => {}
            code if code == u64::from(ErrorCode::Place.number()) => {
                println!("fork {}: {}", self.last, report["why"]);
                assert!(self.failed.insert(self.last));
            }
            _ => panic!("fork {}: {report}", self.last),
        }
        Duration::from_nanos(report["pause_ns"].as_u64().expect("a time"))
    }

    /// Before a fork begins, or else any moment of it, and a while after.
    pub(super) fn moment(&self, chance: &mut Rng) -> Duration {
        if chance.bool() { self.usual.mul_f64(1.5 * chance.f64()) } else { Duration::ZERO }
    }

    /// Has it fork a last time, now that nothing goes wrong, and ends it. Nothing of all of its forks is
    /// left.
    pub(super) fn end(mut self) -> Forked {
        println!("{} of {} forks failed; one takes {:?}", self.failed.len(), self.last - QUIET, self.usual);
        self.again(|| {});
        assert!(!self.failed.contains(&self.last), "all is well again");
        become_equal(|| taken(&self.source, self.node), || self.before.clone());
        self.source.signal(Signal::SIGTERM).expect("a signal");
        self.told.extend(self.source.end().expect("host-vmm ends").events);
        Forked { id: self.id, told: self.told, last: self.last, failed: self.failed }
    }
}

/// All forks of a VM that has ended.
pub(super) struct Forked {
    id: String,
    told: Vec<Value>,
    last: u64,
    failed: BTreeSet<u64>,
}

impl Forked {
    /// Looks at all copies on platforms that have ended. Of each fork all run or none, as its parent was
    /// told; but for those that were killed with a platform, by the fork's number.
    pub(super) fn agree_with(&self, ended: &[Ended], killed: &BTreeMap<u64, &str>) {
        let copies = launched(ended);
        let mut by_fork: BTreeMap<u64, usize> = BTreeMap::new();
        for copy in copies.values().filter(|copy| copy.parent == self.id) {
            assert!(copy.has_said || killed.contains_key(&copy.seq), "a copy of fork {} is lost", copy.seq);
            *by_fork.entry(copy.seq).or_default() += 1;
        }
        let all = usize::try_from(COPIES).expect("small");
        for seq in 1..=self.last {
            let run = by_fork.get(&seq).copied().unwrap_or(0);
            let right = match killed.contains_key(&seq) {
                _ if self.failed.contains(&seq) => 0..=0,
                // The target that was not killed has one of them at least.
                true => 1..=all,
                false => all..=all,
            };
            assert!(right.contains(&run), "{run} copies of fork {seq} have run");
        }
        let sent: Vec<&Value> = self.told.iter().filter(|event| event["event"] == "sent").collect();
        for event in &sent {
            let seq = event["seq"].as_u64().expect("a number");
            let is_killed = killed.get(&seq).is_some_and(|platform| event["platform"] == *platform);
            assert!(is_killed || copies.contains_key(&event["id"].to_string()), "{event}");
        }
        for seq in (1..=self.last).filter(|seq| !killed.contains_key(seq) && !self.failed.contains(seq)) {
            let known = sent.iter().filter(|event| event["seq"] == seq).count();
            assert_eq!(known, all, "copies of fork {seq} of which its platform knows");
        }
    }
}

/// Has a VM fork, and gives the report of that. What else was told meanwhile is added to `told`.
pub(super) fn carry_out(
    source: &mut Running,
    order: Order,
    told: &mut Vec<Value>,
    meanwhile: impl FnOnce(),
) -> Value {
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

/// A copy that has run.
pub(super) struct Copy {
    /// Its fork: the ID of the parent, and the number.
    pub(super) parent: String,
    pub(super) seq: u64,
    /// Whether it has printed its index. One that was killed has not, or not as a whole.
    pub(super) has_said: bool,
}

/// The copies that have run on platforms which have ended, by their IDs. None has run twice, or said so.
pub(super) fn launched(ended: &[Ended]) -> BTreeMap<String, Copy> {
    let mut copies = BTreeMap::new();
    for platform in ended {
        let mut lines: Vec<_> = platform.events.iter().filter_map(|event| console_line(event, "")).collect();
        lines.sort_unstable();
        assert!(lines.is_sorted_by(|one, next| one.0 < next.0), "a copy has run twice: {lines:?}");
        for event in platform.events.iter().filter(|event| event["event"] == "launched") {
            let name = event["name"].as_str().expect("a name");
            let index = format!("{:08x}", event["index"].as_u64().expect("a number"));
            let line = lines.iter().find(|(of, _)| of == name).map(|(_, line)| line.as_str());
            assert!(line.is_none_or(|line| index.starts_with(line)), "{event} has said {line:?}");
            let (parent, seq) = (event["parent"].to_string(), event["seq"].as_u64().expect("a number"));
            let copy = Copy { parent, seq, has_said: line == Some(&index) };
            assert!(copies.insert(event["id"].to_string(), copy).is_none(), "a copy has run twice: {event}");
        }
    }
    copies
}

/// The numbers of forks of which a copy has ended otherwise than by itself.
pub(super) fn broken(ended: &[Ended]) -> impl Iterator<Item = u64> {
    ended.iter().flat_map(|platform| {
        let how = |name| platform.how(name).filter(|how| **how != "PoweredOff");
        let launched = platform.events.iter().filter(|event| event["event"] == "launched");
        let broken = launched.filter(move |event| event["name"].as_str().and_then(how).is_some());
        broken.filter_map(|event| event["seq"].as_u64())
    })
}

/// Ends a target whose copies have all ended by themselves, and of which nothing is left.
pub(super) fn end_target(target: Running) -> Ended {
    vms(&target, 0);
    become_equal(|| target.nodes().expect("processes"), Vec::new);
    target.signal(Signal::SIGTERM).expect("a signal");
    target.end().expect("a platform that ends")
}

/// What a platform has taken of its host, once it keeps no image that has come.
fn taken_without_images(target: &Running) -> (usize, BTreeMap<String, usize>) {
    let images = wait_until(target, &["image", "ls", "--json"], Value::is_array);
    for image in images.as_array().expect("an array") {
        target.ask(&["image", "rm", image["id"].as_str().expect("an ID")]).expect("an image");
    }
    (target.nodes().expect("processes").len(), descriptors(target.pid()))
}

/// What a target has taken of its host while nothing happens.
pub(super) struct Rest(usize, BTreeMap<String, usize>);

impl Rest {
    /// That of a target which has had something to do, once it has been so for a second.
    pub(super) fn of(target: &Running) -> Self {
        let deadline = Instant::now() + TIMEOUT;
        let (mut last, mut since) = (taken_without_images(target), Instant::now());
        while since.elapsed() < Duration::from_secs(1) {
            assert!(Instant::now() < deadline, "no rest: {last:?}");
            thread::sleep(Duration::from_millis(100));
            let now = taken_without_images(target);
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        Self(last.0, last.1)
    }

    /// Waits until so many VMs are there, and nothing more is taken than then. What its connections took may
    /// be gone.
    pub(super) fn comes_again(&self, target: &Running, count: usize) {
        vms(target, count);
        let surplus = || {
            let (now, mut taken) = taken_without_images(target);
            taken.retain(|name, count| self.1.get(name).is_none_or(|before| *count > *before));
            (now.saturating_sub(self.0), taken)
        };
        become_equal(surplus, Default::default);
    }
}
