//! What is measured, one group after another.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use kvm_ioctls::Kvm;
use vmfork_tests::user_guest::{ANSWER, Order, REWRITE};

use crate::{
    Progress,
    clones::{self, Moved, Pair},
    doorbell, firecracker,
    floor::{self, Addresses},
    floor_many, rest,
    session::{Outcome, Session, Shape},
    stats::{Figure, Samples},
    switch::{Way, switch},
};

/// Pages in a MiB.
const MIB: u32 = 256;

/// The dirty set of the figures that compare generations: 1 MiB.
const SMALL_SET: u32 = MIB;

/// Children of the largest fork.
const THOUSAND: u32 = 1000;

/// Figures that are measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Group {
    /// One child, by memory size.
    Memory,
    /// Ways in which a booted VM goes on after its first fork.
    Switch,
    /// Forks of forks.
    Generations,
    /// Parents that have written to much.
    Dirty,
    /// A child that writes to much.
    WorkingSet,
    /// Several children of one fork.
    Children,
    /// More than one vCPU.
    Vcpus,
    /// A thousand children, with no warm VM ready.
    Thousand,
    /// Clones on another platform of this host.
    Clones,
    /// Round trips from a guest to its VMM, of each kind that there is.
    Doorbell,
}

/// A run of the bench.
#[derive(Debug)]
pub(crate) struct Bench {
    quick: bool,
    firecracker: Option<PathBuf>,
    progress: Progress,
    kvm: Kvm,
    samples: Samples,
}

impl Bench {
    pub(crate) fn new(quick: bool, firecracker: Option<PathBuf>, progress: Progress) -> Result<Self> {
        let kvm = Kvm::new().context("can't open /dev/kvm, on which the bench runs")?;
        Ok(Self { quick, firecracker, progress, kvm, samples: Samples::default() })
    }

    /// Measures one group, or everything; what takes long and is no main figure, only where it need not be
    /// quick.
    pub(crate) fn run(&mut self, only: Option<Group>) -> Result<()> {
        for group in Group::value_variants() {
            if only
                .map_or(!self.quick || !matches!(group, Group::Vcpus | Group::Clones), |only| only == *group)
            {
                self.measure(*group)?;
            }
        }
        self.progress.done();
        Ok(())
    }

    fn measure(&mut self, group: Group) -> Result<()> {
        match group {
            Group::Memory => self.memory_sizes(),
            Group::Switch => self.switches(),
            Group::Generations => self.generations(),
            Group::Dirty => self.dirty_sets(),
            Group::WorkingSet => self.working_set(),
            Group::Children => self.children(),
            Group::Vcpus => self.vcpus(),
            Group::Thousand => self.thousand(),
            Group::Clones => self.clones(),
            Group::Doorbell => {
                let repeats = self.repeats(200, 100);
                doorbell::measure(&self.kvm, repeats, &mut self.samples, &self.progress)
            }
        }
    }

    /// All figures.
    pub(crate) fn figures(&self) -> Vec<Figure> {
        self.samples.figures()
    }

    fn repeats(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }

    /// One child from memories of several sizes, all resident, in turn with the floor.
    fn memory_sizes(&mut self) -> Result<()> {
        const SIZES: [(&str, &str); 4] = [("128M", "128m"), ("512M", "512m"), ("2G", "2g"), ("8G", "8g")];
        let image = floor::Image::new(512 << 20)?;
        let sizes = SIZES.iter().filter(|(mem, _)| !self.quick || *mem != "2G");
        let sessions = sizes.map(|&(mem, name)| Ok((name, Session::start(&Shape::new(mem, 1))?)));
        let mut sessions: Vec<(&str, Session)> = sessions.collect::<Result<_>>()?;
        let repeats = self.repeats(200, 40);
        self.progress.begin("one child, by memory size", repeats);
        // The first fork is the one in which a booted VM's memory becomes an image: once in a VM's life.
        for (name, session) in &mut sessions {
            let first = session.carry_out(Order { count: 1, ..Order::default() })?;
            self.samples.add_ns(&format!("fork.first.pause.{name}"), first.forks[0].pause_ns);
        }
        for _ in 0..repeats {
            for (name, addresses) in
                [("floor.child.512m", Addresses::Empty), ("floor.child.over.512m", Addresses::Reserved)]
            {
                let (made, launched) = floor::child(&self.kvm, &image, addresses)?;
                self.samples.add("vm.new", "us", made.as_secs_f64() * 1e6);
                self.samples.add(name, "us", launched.as_secs_f64() * 1e6);
            }
            for (name, session) in &mut sessions {
                let outcome = session.carry_out(Order { count: 1, ..Order::default() })?;
                self.samples.add_ns(&format!("fork.child.{name}"), outcome.children[0].latency_ns());
                self.samples.add_ns(&format!("fork.pause.{name}"), outcome.forks[0].pause_ns);
                if *name == "512m" {
                    self.steps(&outcome);
                }
            }
            self.progress.step();
        }
        end_all(sessions.into_iter().map(|(_, session)| session))
    }

    /// The straight ways for a VM of 512 MiB of which it has written to a part.
    fn switches(&mut self) -> Result<()> {
        let written: &[usize] = if self.quick { &[64] } else { &[16, 64, 500] };
        let image = floor::Image::new(512 << 20)?;
        // The guest takes seconds to write to most of its memory.
        let repeats = self.repeats(20, 5);
        self.progress.begin("ways to switch a parent", repeats);
        for _ in 0..repeats {
            for &mib in written {
                for way in Way::ALL {
                    let took = switch(&self.kvm, way, &image, mib << 20)?;
                    self.samples.add(
                        &format!("switch.{}.{mib}m", way.name()),
                        "us",
                        took.as_secs_f64() * 1e6,
                    );
                }
            }
            self.progress.step();
        }
        Ok(())
    }

    /// Where the time of a fork goes, on both sides.
    fn steps(&mut self, outcome: &Outcome) {
        let sides = [("parent", &outcome.forks[0].steps), ("child", &outcome.children[0].steps)];
        for (side, steps) in sides {
            for (step, began_ns, ended_ns) in steps {
                self.samples.add_ns(&format!("step.{side}.{step}"), ended_ns.saturating_sub(*began_ns));
            }
        }
    }

    /// Forks of forks, each of which has written to as much memory as the others.
    fn generations(&mut self) -> Result<()> {
        let generations: &[u64] = if self.quick { &[2, 16] } else { &[2, 4, 8, 16, 32] };
        let last = generations.last().copied().unwrap_or(2);
        let order = Order {
            count: 1,
            dirty_pages: SMALL_SET,
            depth: u32::try_from(last)? - 1,
            // Long enough for the next warm VM to be ready.
            pace_tsc: 60_000_000,
            ..Order::default()
        };
        let mut session = Session::start(&Shape::new("512M", 4))?;
        let repeats = self.repeats(200, 8);
        self.progress.begin("generations", repeats);
        for _ in 0..repeats {
            let outcome = session.carry_out(order)?;
            for child in outcome.children.iter().filter(|child| generations.contains(&child.generation)) {
                self.samples.add_ns(&format!("fork.gen{}", child.generation), child.latency_ns());
            }
            self.progress.step();
        }
        end_all([session])
    }

    /// A parent that has written to more and more memory since it is a private view; in turn with a plain
    /// copy of as much.
    fn dirty_sets(&mut self) -> Result<()> {
        let sets: &[u32] = if self.quick { &[0, 64] } else { &[0, 1, 16, 64, 256, 512] };
        for &mib in sets {
            let repeats = self.repeats(200, if mib > 64 { 5 } else { 8 });
            let mut session = Session::start(&Shape::new("1G", 1))?;
            let order = Order { count: 1, dirty_pages: mib * MIB, ..Order::default() };
            // The first fork makes it a private view, and after the second one all of the set is its own.
            for _ in 0..2 {
                session.carry_out(order)?;
            }
            self.progress.begin(&format!("{mib} MiB dirty"), repeats);
            for _ in 0..repeats {
                if mib > 0 {
                    let (copied, again) = floor::copy(usize::try_from(mib)? << 20)?;
                    self.samples.add(&format!("floor.copy.{mib}m"), "us", copied.as_secs_f64() * 1e6);
                    self.samples.add(&format!("floor.memcpy.{mib}m"), "us", again.as_secs_f64() * 1e6);
                }
                let outcome = session.carry_out(order)?;
                self.samples.add_ns(&format!("fork.dirty.{mib}m"), outcome.children[0].latency_ns());
                self.progress.step();
            }
            end_all([session])?;
        }
        Ok(())
    }

    /// A child that writes to 16 MiB of its image: with the pages made ready for it, and without.
    fn working_set(&mut self) -> Result<()> {
        let order = Order { count: 1, rewrite_pages: 16 * MIB, ..Order::default() };
        let sessions = [("fork.ws16m", true), ("fork.ws16m.cold", false)].map(|(name, prefetch)| {
            let mut session = Session::start(&Shape { prefetch, yields: true, ..Shape::new("512M", 1) })?;
            // The first child is the one from which the platform learns.
            session.carry_out(order)?;
            Ok((name, session))
        });
        let mut sessions: Vec<(&str, Session)> = sessions.into_iter().collect::<Result<_>>()?;
        let repeats = self.repeats(200, 8);
        self.progress.begin("16 MiB rewritten by a child", repeats);
        let firecracker = self
            .firecracker
            .clone()
            .map(|program| firecracker::Snapshot::new(&program, order))
            .transpose()?;
        for _ in 0..repeats {
            for (name, session) in &mut sessions {
                let outcome = session.carry_out(order)?;
                let child = &outcome.children[0];
                let line_ns = child.line_ns.context("a child that printed no line")?;
                self.samples.add_ns(name, line_ns.saturating_sub(child.rung_ns));
            }
            if let Some(snapshot) = &firecracker {
                for (name, told) in [("firecracker.spawn", ANSWER), ("firecracker.ws16m", REWRITE)] {
                    self.samples.add(name, "us", snapshot.restore(told)?.as_secs_f64() * 1e6);
                }
            }
            self.progress.step();
        }
        end_all(sessions.into_iter().map(|(_, session)| session))
    }

    /// Several children of one fork, with a warm VM for each.
    fn children(&mut self) -> Result<()> {
        let counts: &[u32] = if self.quick { &[1, 4] } else { &[1, 2, 4, 16, 64, 256] };
        for &count in counts {
            let mut session = Session::start(&Shape::new("512M", usize::try_from(count)?))?;
            let order = Order { count, ..Order::default() };
            session.carry_out(order)?;
            let repeats = self.repeats(200, if count > 16 { 5 } else { 8 });
            self.progress.begin(&format!("{count} children"), repeats);
            for _ in 0..repeats {
                let outcome = session.carry_out(order)?;
                let last = outcome.children.iter().map(|child| child.latency_ns()).max();
                self.samples.add_ns(&format!("fork.last.of{count}"), last.context("no children")?);
                if count > 4 {
                    rest();
                }
                self.progress.step();
            }
            end_all([session])?;
        }
        Ok(())
    }

    /// More than one vCPU.
    fn vcpus(&mut self) -> Result<()> {
        let sessions =
            [1, 2, 4].map(|cpus| Ok((cpus, Session::start(&Shape { cpus, ..Shape::new("512M", 1) })?)));
        let mut sessions: Vec<(u8, Session)> = sessions.into_iter().collect::<Result<_>>()?;
        let repeats = self.repeats(200, 20);
        self.progress.begin("one child, by vCPUs", repeats);
        for round in 0..=repeats {
            for (cpus, session) in &mut sessions {
                let outcome = session.carry_out(Order { count: 1, ..Order::default() })?;
                if round > 0 {
                    self.samples.add_ns(&format!("fork.child.{cpus}vcpu"), outcome.children[0].latency_ns());
                }
            }
            self.progress.step();
        }
        end_all(sessions.into_iter().map(|(_, session)| session))
    }

    /// Clones between two platforms, over TLS; in turn with TLS alone.
    fn clones(&mut self) -> Result<()> {
        const FULL_MIB: u32 = 512;
        let repeats = self.repeats(200, 8);
        for (mem, name) in [("256M", "clone.lazy.256m"), ("4G", "clone.lazy.4g")] {
            let mut pair = Pair::start(mem, true, false)?;
            self.progress.begin(&format!("a lazy clone of {mem}"), repeats);
            // The first fork is the one in which a booted VM's memory becomes an image.
            pair.fork_away()?;
            for _ in 0..repeats {
                self.samples.add_ns(name, pair.fork_away()?);
                self.progress.step();
            }
            pair.end()?;
        }
        let repeats = self.repeats(20, 3);
        let bytes = u64::from(FULL_MIB) << 20;
        let mut pair = Pair::start("1G", false, false)?;
        self.progress.begin(&format!("a full clone of {FULL_MIB} MiB"), repeats);
        let image = pair.make_image(FULL_MIB * MIB)?;
        // Before this one, nobody has looked at the chunks.
        self.samples.add("clone.full.first", "B/s", pair.clone_anew(&image, bytes)?.per_second);
        let memory = clones::filled(bytes)?;
        for _ in 0..repeats {
            self.samples.add("floor.tls.cached", "B/s", clones::tls(&memory, true)?.per_second);
            for (name, Moved { per_second, cpu_per_gib }) in
                [("floor.tls", clones::tls(&memory, false)?), ("clone.full", pair.clone_anew(&image, bytes)?)]
            {
                self.samples.add(name, "B/s", per_second);
                self.samples.add(&format!("{name}.cpu"), "s/GiB", cpu_per_gib);
            }
            self.progress.step();
        }
        pair.end()?;
        let mut pair = Pair::start("1G", false, true)?;
        self.progress.begin(&format!("a clone where {FULL_MIB} MiB are known"), repeats);
        let image = pair.make_image(FULL_MIB * MIB)?;
        let (_, first_bytes) = pair.clone_image(&image)?;
        ensure!(first_bytes >= bytes, "the first clone took only {first_bytes} bytes");
        for _ in 0..repeats {
            // The parent forks again, and its image goes where the last one is.
            let image = pair.make_image(MIB)?;
            let (took, bytes) = pair.clone_image(&image)?;
            let percent = 100.0 * f64::from(u32::try_from(bytes)?) / f64::from(u32::try_from(first_bytes)?);
            self.samples.add("clone.second", "%", percent);
            self.samples.add_ns("clone.second.time", u64::try_from(took.as_nanos())?);
            self.progress.step();
        }
        pair.end()
    }

    /// A thousand children of one fork with no warm VM ready, in turn with a thousand VMs that nobody
    /// manages.
    fn thousand(&mut self) -> Result<()> {
        let repeats = self.repeats(200, 2);
        self.progress.begin("a thousand children", repeats);
        for _ in 0..repeats {
            rest();
            let (all_ran, all_ended) = floor_many(usize::try_from(THOUSAND)?)?;
            self.samples.add("floor.thousand", "s", all_ran.as_secs_f64());
            self.samples.add("floor.thousand.end", "s", all_ended.as_secs_f64());
            rest();
            let mut session = Session::start(&Shape::new("512M", 0))?;
            let before_mib = available_mib()?;
            let outcome = session.carry_out(Order { count: THOUSAND, stay: true, ..Order::default() })?;
            rest();
            let used_mib = before_mib - available_mib()?;
            let count = session.count()?;
            ensure!(count == usize::try_from(THOUSAND)? + 1, "only {count} VMs are left");
            let last_ns =
                outcome.children.iter().map(|child| child.latency_ns()).max().context("no children")?;
            self.samples.add("fork.thousand", "s", std::time::Duration::from_nanos(last_ns).as_secs_f64());
            self.samples.add("fork.thousand.mib", "MiB", used_mib / f64::from(THOUSAND));
            self.samples.add("fork.thousand.end", "s", session.end()?.as_secs_f64());
            self.progress.step();
        }
        Ok(())
    }
}

fn end_all(sessions: impl IntoIterator<Item = Session>) -> Result<()> {
    sessions.into_iter().try_for_each(|session| session.end().map(drop))
}

/// MemAvailable in MiB, with the kernel's caches dropped where that is allowed: they come and go.
fn available_mib() -> Result<f64> {
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", "3") {
        eprintln!("bench: caches can't be dropped ({error}), which blurs fork.thousand.mib");
    }
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).context("no MemAvailable")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
