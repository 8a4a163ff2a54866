//! Targets that have no more room: for what they write to files, to disks as to memory, and for what they
//! allocate.

use std::{collections::BTreeMap, thread, time::Duration};

use fastrand::Rng;
use vmfork_tests::{
    cluster::Platforms,
    fault_rounds,
    process::{self, Resource},
};

use super::{
    forks::{Forks, Rest, TARGETS, broken, end_target, to_targets},
    killed::{start, start_again},
    vms,
};

/// What a platform's processes have too little of.
#[derive(Debug, Clone, Copy)]
enum Lack {
    /// No file of theirs becomes longer than so many bytes: logs, and the files that are VMs' memory.
    Files(u64),
    /// They get so many bytes of address space more than they have.
    Memory(u64),
}

impl Lack {
    /// Anything from nothing at all to what is more than enough, the smaller the more often.
    fn any(chance: &mut Rng) -> Self {
        let power = chance.u32(12..28);
        let bytes = chance.u64(..1 << power);
        if chance.bool() { Self::Files(bytes) } else { Self::Memory(bytes) }
    }

    /// Has a process get no more, and those that it starts meanwhile; with all that have come from it, or
    /// without.
    fn begin(self, pid: u32, with_others: bool) {
        // It may have ended.
        drop(match self {
            Self::Files(bytes) => process::limit(pid, Resource::Fsize, Some(bytes)),
            Self::Memory(bytes) => process::address_space(pid)
                .and_then(|taken| process::limit(pid, Resource::As, Some(taken + bytes))),
        });
        if with_others {
            others(pid).for_each(|other| self.begin(other, true));
        }
    }
}

/// Gives a process, and all that have come from it, as much as there is.
fn end_lack(pid: u32) {
    for resource in [Resource::Fsize, Resource::As] {
        drop(process::limit(pid, resource, None));
    }
    others(pid).for_each(end_lack);
}

/// What a process has started: a platform its zygote, and that the nodes.
fn others(pid: u32) -> impl Iterator<Item = u32> {
    process::children(pid).unwrap_or_default().into_iter()
}

#[test]
fn whatever_a_target_has_no_more_of_all_copies_run_or_none_and_the_parent_goes_on() {
    /// How long it has no more of it, at most.
    const LONGEST: Duration = Duration::from_millis(50);
    /// What copies need that come before others have ended: what is kept of it for nobody is missed soon.
    const ROOM: &str = "max_vms = 8";
    let mut chance = fault_rounds::chance();
    let platforms = Platforms::new(&["a", "b", "c"]);
    let mut targets: Vec<_> = TARGETS.iter().map(|name| start(&platforms, name, ROOM)).collect();
    let source = platforms.config("a", &to_targets());
    let mut forks = Forks::start(3, |vmm| vmm.config(&source).start().expect("host-vmm starts"));
    let before: Vec<_> = targets.iter().map(Rest::of).collect();
    let (mut ended, mut killed) = (Vec::new(), BTreeMap::new());
    for _ in 0..fault_rounds::rounds(100, 5) {
        let (at, lack, with_others) = (chance.usize(0..TARGETS.len()), Lack::any(&mut chance), chance.bool());
        let (moment, pause) = (forks.moment(&mut chance), LONGEST.mul_f64(chance.f64()));
        let number = forks.last + 1;
        forks.again(|| {
            thread::sleep(moment);
            lack.begin(targets[at].pid(), with_others);
            thread::sleep(pause);
            end_lack(targets[at].pid());
            // A program that can't allocate what it needs has ended, or is about to.
            if targets[at].ask(&["ps"]).is_err() {
                assert!(matches!(lack, Lack::Memory(_)), "{lack:?}");
                ended.push(start_again(&platforms, &mut targets, at, ROOM));
                killed.insert(number, TARGETS[at]);
            }
        });
        targets.iter().for_each(|target| drop(vms(target, 0)));
    }
    println!("{} targets were killed", killed.len());
    targets.iter().zip(before).for_each(|(target, before)| before.comes_again(target, 0));
    let forked = forks.end();
    ended.extend(targets.into_iter().map(end_target));
    // As a target may end, so may a copy that can't have what it needs.
    killed.extend(broken(&ended).map(|seq| (seq, "its own host")));
    forked.agree_with(&ended, &killed);
}
