//! One run: a policy, and how old views may be.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use cluster::{
    member::Member,
    placement::{Allocation, Policy, Rule, Rules, Wish, place},
};
use fastrand::Rng;
use types::{Locality, VmShape};
use uuid::Uuid;

use crate::{
    load::{self, SHAPES},
    report::{Balance, Outcome},
};

/// Platforms whose VMs fork.
const SOURCES: usize = 16;

/// Part of the nodes that are taken, in percent.
const FULL_PERCENT: u32 = 75;

/// How long a copy lives on average, in seconds.
const LIFETIME_S: f64 = 60.0;

/// How many copies forks make: each number is as likely as any other that stands here.
const COUNTS: [u32; 7] = [1, 1, 1, 2, 2, 4, 8];

/// How many copies the forks make with which the cluster is filled.
const FILLING: u32 = 32;

/// How often a place is looked for, when copies bounce.
const TRIES: u32 = 3;

/// How often the cluster is looked at.
const SAMPLES: u32 = 50;

/// What is to be simulated.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) platforms: u32,
    pub(crate) forks: u32,
    pub(crate) seed: u64,
    pub(crate) policy: Policy,
    /// How old the sources' views get before they are refreshed; zero: views are always true.
    pub(crate) view_age: Duration,
}

/// Simulates it, and calls `step` after each fork.
pub(crate) fn simulate(setup: &Setup, mut step: impl FnMut()) -> Result<Outcome> {
    let mut world = World::new(setup)?;
    world.fill()?;
    world.tally = Tally::default();
    world.take_views(setup.view_age);
    let mean = COUNTS.iter().map(|count| f64::from(*count)).sum::<f64>() / COUNTS.len() as f64;
    let between_s = mean * LIFETIME_S / f64::from(world.wanted_vms.max(1));
    let [mut vms, mut nodes, mut memory] = [Balance::default(); 3];
    for fork in 0..setup.forks {
        let pause = exponential(&mut world.rng, between_s);
        world.go_on(pause);
        let (source, count) = (world.rng.usize(..world.sources.len()), world.rng.choice(COUNTS).unwrap_or(1));
        world.refresh(source, setup.view_age);
        world.fork(source, count)?;
        if fork % setup.forks.div_ceil(SAMPLES) == 0 {
            let loads = world.members.iter().map(|member| &member.load);
            vms.add(loads.clone().map(|load| f64::from(load.vms)));
            nodes.add(loads.clone().map(|load| 100.0 * f64::from(load.vms) / f64::from(load.max_vms)));
            memory.add(
                loads.map(|load| {
                    100.0 - 100.0 * load.memory_available_bytes as f64 / load.memory_bytes as f64
                }),
            );
        }
        step();
    }
    let Tally { wished, placed, refused, bounced, lost, decisions, deciding } = world.tally;
    Ok(Outcome {
        policy: setup.policy,
        view_age_ms: u64::try_from(setup.view_age.as_millis())?,
        platforms: setup.platforms,
        wished,
        placed,
        refused,
        bounced,
        lost,
        decisions_per_second: f64::from(decisions) / deciding.as_secs_f64().max(f64::MIN_POSITIVE),
        vms: vms.mean(),
        nodes_percent: nodes.mean(),
        memory_percent: memory.mean(),
    })
}

/// A time that is as long as chance says, and of this length on average.
fn exponential(rng: &mut Rng, mean_s: f64) -> Duration {
    Duration::from_secs_f64(-(1.0 - rng.f64()).ln() * mean_s)
}

/// What became of copies.
#[derive(Debug, Default)]
struct Tally {
    wished: u64,
    placed: u64,
    /// For which no place was found.
    refused: u64,
    /// Which were sent to a platform that was full by then; each time counts.
    bounced: u64,
    /// Which were sent so as often as they are tried.
    lost: u64,
    decisions: u32,
    /// How long the decisions took.
    deciding: Duration,
}

/// A platform whose VMs fork.
#[derive(Debug)]
struct Source {
    /// Which one it is.
    at: usize,
    /// What it knows of all platforms; empty where it knows what is true.
    view: Vec<Member>,
    /// When its view is refreshed.
    refresh_at: Duration,
}

/// Copies of one fork on one platform.
#[derive(Debug)]
struct Group {
    at: usize,
    config: VmShape,
    on_source: bool,
    /// How many are left.
    copies: u32,
}

#[derive(Debug)]
struct World {
    rng: Rng,
    now: Duration,
    /// The truth.
    members: Vec<Member>,
    by_name: HashMap<String, usize>,
    rules: Rules,
    sources: Vec<Source>,
    /// How many VMs there are to be, about.
    wanted_vms: u32,
    groups: Vec<Group>,
    /// When copies end, and the group of each.
    ends: BinaryHeap<Reverse<(Duration, usize)>>,
    forks: u128,
    tally: Tally,
}

impl World {
    fn new(setup: &Setup) -> Result<Self> {
        let mut rng = Rng::with_seed(setup.seed);
        let members: Vec<Member> = (0..setup.platforms).map(|at| load::platform(at, &mut rng)).collect();
        let mut order: Vec<usize> = (0..members.len()).collect();
        rng.shuffle(&mut order);
        let sources: Vec<usize> = order.iter().copied().take(SOURCES).collect();
        let pinned: Vec<usize> = order.iter().rev().copied().take(members.len().div_ceil(10)).collect();
        // Those that the policy can use are filled.
        let used = match setup.policy {
            Policy::Local => &sources,
            Policy::Pinned => &pinned,
            _ => &order,
        };
        let nodes: u32 = used.iter().map(|at| members[*at].load.max_vms).sum();
        let name = |at: &usize| members[*at].name.clone();
        let pinned =
            if setup.policy == Policy::Pinned { pinned.iter().map(name).collect() } else { Vec::new() };
        let rule = Rule { policy: setup.policy, pinned, ..Rule::default() };
        Ok(Self {
            rules: Rules::new(BTreeMap::from([("*".to_owned(), rule)]))?,
            by_name: members.iter().map(|member| member.name.clone()).zip(0..).collect(),
            sources: sources
                .iter()
                .map(|&at| Source { at, view: Vec::new(), refresh_at: Duration::ZERO })
                .collect(),
            wanted_vms: nodes * FULL_PERCENT / 100,
            rng,
            now: Duration::ZERO,
            members,
            groups: Vec::new(),
            ends: BinaryHeap::new(),
            forks: 0,
            tally: Tally::default(),
        })
    }

    /// Places copies until there are as many VMs as there are to be, or no source finds a place for one more.
    fn fill(&mut self) -> Result<()> {
        let (mut most, mut in_vain) = (FILLING, 0);
        for source in (0..self.sources.len()).cycle() {
            let missing = self.wanted_vms.saturating_sub(u32::try_from(self.ends.len())?);
            let refused = self.tally.refused;
            self.fork(source, missing.min(most))?;
            let is_placed = self.tally.refused == refused;
            if is_placed && missing <= most || in_vain > 2 * SOURCES {
                break;
            }
            (most, in_vain) = if is_placed { (most, 0) } else { ((most / 2).max(1), in_vain + 1) };
        }
        Ok(())
    }

    /// Lets each source know what is true, and forget it at another time.
    fn take_views(&mut self, age: Duration) {
        if age.is_zero() {
            return;
        }
        let of = u32::try_from(self.sources.len()).unwrap_or(u32::MAX);
        for (source, part) in self.sources.iter_mut().zip(1..) {
            source.view.clone_from(&self.members);
            source.refresh_at = self.now + age * part / of;
        }
    }

    /// Refreshes what a source knows of others where it is too old, and what it knows of itself.
    fn refresh(&mut self, source: usize, age: Duration) {
        let Source { at, view, refresh_at } = &mut self.sources[source];
        if age.is_zero() {
            return;
        }
        if *refresh_at <= self.now {
            for (known, member) in view.iter_mut().zip(&self.members) {
                known.load.clone_from(&member.load);
            }
            // It was refreshed in time, several times perhaps, and the last time is as long ago as it would
            // be.
            while *refresh_at <= self.now {
                *refresh_at += age;
            }
        }
        view[*at].load.clone_from(&self.members[*at].load);
    }

    /// Lets time pass, and copies end.
    fn go_on(&mut self, pause: Duration) {
        self.now += pause;
        while let Some(Reverse((_, group))) =
            self.ends.peek().filter(|Reverse((end, _))| *end <= self.now).copied()
        {
            self.ends.pop();
            let Group { at, config, on_source, copies } = &mut self.groups[group];
            load::leave(&mut self.members[*at].load, *config, *copies, *on_source);
            *copies -= 1;
        }
    }

    /// A fork on a source: its copies are placed by what that knows; those that bounce are placed again, by
    /// what it knows then.
    fn fork(&mut self, source: usize, count: u32) -> Result<()> {
        self.forks += 1;
        let kind = self.rng.usize(..SHAPES.len());
        let mut wish = Wish {
            vm_type: format!("type-{kind}"),
            count,
            config: SHAPES[kind],
            location: Locality::Any,
            images: vec![Uuid::from_u128(u128::MAX - self.forks), Uuid::from_u128(kind as u128)],
            source: self.members[self.sources[source].at].name.clone(),
        };
        self.tally.wished += u64::from(count);
        for _ in 0..TRIES {
            let Some(shares) = self.decide(source, &wish) else {
                self.tally.refused += u64::from(wish.count);
                return Ok(());
            };
            let bounced =
                shares.iter().map(|share| self.launch(source, &wish, share)).collect::<Result<Vec<u32>>>()?;
            wish.count = bounced.iter().sum();
            self.tally.bounced += u64::from(wish.count);
            if wish.count == 0 {
                return Ok(());
            }
        }
        self.tally.lost += u64::from(wish.count);
        Ok(())
    }

    /// A decision, whose time is taken.
    fn decide(&mut self, source: usize, wish: &Wish) -> Option<Vec<Allocation>> {
        let view = &self.sources[source].view;
        let members = if view.is_empty() { &self.members } else { view };
        let begun = Instant::now();
        let decision = place(&self.rules, wish, members);
        self.tally.deciding += begun.elapsed();
        self.tally.decisions += 1;
        decision.ok().map(|decision| decision.shares)
    }

    /// Launches one platform's share as far as it has room, and gives how many copies bounce. The source
    /// counts on all of it, unless it is told otherwise: a platform that has not enough room says what it
    /// has.
    fn launch(&mut self, source: usize, wish: &Wish, share: &Allocation) -> Result<u32> {
        let at = *self.by_name.get(&share.platform).context("a platform was chosen that there is not")?;
        let Source { at: source_at, view, .. } = &mut self.sources[source];
        let on_source = at == *source_at;
        let load = &mut self.members[at].load;
        let copies = load::room(load, wish.config, share.count, on_source);
        self.tally.placed += u64::from(copies);
        if copies > 0 {
            load::enter(load, wish.config, copies, on_source, &wish.images);
        }
        match view.get_mut(at) {
            Some(known) if copies == share.count => {
                load::enter(&mut known.load, wish.config, copies, on_source, &wish.images);
            }
            Some(known) => known.load.clone_from(load),
            None => (),
        }
        for _ in 0..copies {
            let end = self.now + exponential(&mut self.rng, LIFETIME_S);
            self.ends.push(Reverse((end, self.groups.len())));
        }
        self.groups.push(Group { at, config: wish.config, on_source, copies });
        Ok(share.count - copies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(policy: Policy, age_s: u64) -> Outcome {
        let view_age = Duration::from_secs(age_s);
        simulate(&Setup { platforms: 60, forks: 1500, seed: 7, policy, view_age }, || ()).unwrap()
    }

    #[test]
    fn true_views_never_bounce_and_staler_ones_bounce_no_less() {
        for (_, policy) in Policy::ALL {
            let bounced = [0, 1, 5].map(|age_s| outcome(policy, age_s).bounced);
            assert_eq!(bounced[0], 0, "{policy}");
            assert!(bounced.is_sorted(), "{policy}: {bounced:?}");
        }
        assert!(outcome(Policy::Pack, 5).bounced > 0);
    }

    #[test]
    fn all_copies_are_accounted_for() {
        for (_, policy) in Policy::ALL {
            let Outcome { wished, placed, refused, bounced, lost, .. } = outcome(policy, 5);
            assert_eq!(placed + refused + lost, wished, "{policy}");
            assert!(u64::from(TRIES) * lost <= bounced, "{policy}");
            assert!(placed > 0, "{policy}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_forks() {
        let unmeasured = || Outcome { decisions_per_second: 0.0, ..outcome(Policy::LeastLoaded, 1) };
        assert_eq!(
            serde_json::to_string(&unmeasured()).unwrap(),
            serde_json::to_string(&unmeasured()).unwrap()
        );
    }

    #[test]
    fn policies_do_what_they_are_called_by() {
        let [least, spread, pack] =
            [Policy::LeastLoaded, Policy::Spread, Policy::Pack].map(|policy| outcome(policy, 0));
        let nodes = [&spread, &least, &pack].map(|outcome| outcome.nodes_percent.deviation);
        assert!(nodes[0] < nodes[1] && nodes[1] < nodes[2], "{nodes:?}");
        assert!(least.memory_percent.deviation < pack.memory_percent.deviation);
        assert_eq!((least.refused, pack.refused), (0, 0));
    }
}
