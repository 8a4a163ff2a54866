//! The policies: which of the platforms with room get how many copies.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BinaryHeap, binary_heap::PeekMut},
    net::SocketAddr,
};

use super::{
    Policy,
    room::{Candidate, Evaluation},
    score::MOST_LOCALITY,
};
use crate::member::{Load, Member};

/// Pick of a policy: a platform, and how many copies it gets; not 0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pick<'m> {
    pub(super) candidate: Candidate<'m>,
    pub(super) copies: u32,
}

/// What platforms are sorted by where nothing else tells them apart.
pub(super) fn name_of(member: &Member) -> (&str, &str, SocketAddr) {
    (&member.name, &member.cluster, member.address)
}

/// Places all copies, by the rule's policy. None where there is not enough room.
pub(super) fn choose<'m>(
    evaluation: &Evaluation<'_>,
    members: impl Iterator<Item = &'m Member>,
) -> Option<Vec<Pick<'m>>> {
    let candidates =
        members.map(|member| evaluation.judge(member).candidate).filter(|candidate| candidate.room > 0);
    let mut chosen = match evaluation.rule.policy {
        Policy::Local | Policy::LeastLoaded | Policy::Spread => best(evaluation, candidates),
        Policy::Pack => pack(candidates.collect(), evaluation.wish.count),
        Policy::Pinned => in_order(evaluation, candidates.collect()),
    }?;
    chosen.sort_unstable_by_key(|chosen| name_of(chosen.candidate.member));
    Some(chosen)
}

/// What platforms are compared by; more is better, and the first number that differs decides.
type Key = [u32; 4];

/// A platform with what it is compared by for its next copy.
#[derive(Debug)]
struct Ranked<'m> {
    key: Key,
    candidate: Candidate<'m>,
    copies: u32,
}

impl Ord for Ranked<'_> {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_name = || name_of(other.candidate.member).cmp(&name_of(self.candidate.member));
        self.key.cmp(&other.key).then_with(by_name)
    }
}

impl PartialOrd for Ranked<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked<'_> {}

impl Evaluation<'_> {
    fn key(&self, candidate: &Candidate<'_>, copies: u32, load: u32, locality: u32) -> Key {
        match self.rule.policy {
            Policy::Spread => [u32::MAX - copies, u32::MAX - taken(&candidate.member.load), load, locality],
            _ => [load + locality, 0, 0, 0],
        }
    }

    fn next_key(&self, candidate: &Candidate<'_>, copies: u32) -> Key {
        let score = self.score(candidate, copies);
        self.key(candidate, copies, score.load(), score.locality())
    }
}

/// The part of its nodes that a platform's VMs take, of 2^32.
fn taken(load: &Load) -> u32 {
    let taken = (u64::from(load.vms) << 32).checked_div(load.max_vms.into());
    taken.and_then(|taken| u32::try_from(taken).ok()).unwrap_or(u32::MAX)
}

/// Each copy goes to the platform that is best for it, with the ones before it in place.
fn best<'m>(
    evaluation: &Evaluation<'_>,
    candidates: impl Iterator<Item = Candidate<'m>>,
) -> Option<Vec<Pick<'m>>> {
    let mut best = the_best(evaluation, candidates);
    let room: u64 = best.iter().map(|ranked| u64::from(ranked.candidate.room)).sum();
    if room < evaluation.wish.count.into() {
        return None;
    }
    let mut full = Vec::new();
    for _ in 0..evaluation.wish.count {
        let mut next = best.peek_mut()?;
        next.copies += 1;
        if next.copies == next.candidate.room {
            full.push(PeekMut::pop(next));
        } else {
            next.key = evaluation.next_key(&next.candidate, next.copies);
        }
    }
    let ranked = full.into_iter().chain(best).filter(|ranked| ranked.copies > 0);
    Some(ranked.map(|Ranked { candidate, copies, .. }| Pick { candidate, copies }).collect())
}

/// The platforms that are best for their first copy, as many as there are copies. No other gets one: while
/// one of these has none, it is better, and has room.
fn the_best<'m>(
    evaluation: &Evaluation<'_>,
    candidates: impl Iterator<Item = Candidate<'m>>,
) -> BinaryHeap<Ranked<'m>> {
    let most = usize::try_from(evaluation.wish.count).unwrap_or(usize::MAX);
    let mut best: BinaryHeap<Reverse<Ranked<'m>>> = BinaryHeap::new();
    for candidate in candidates {
        let worst = best.peek().filter(|_| best.len() >= most);
        let is_worse = |key: &Key| worst.is_some_and(|Reverse(worst)| *key < worst.key);
        let load = evaluation.load_score(&candidate, 0).load();
        if is_worse(&evaluation.key(&candidate, 0, load, MOST_LOCALITY)) {
            continue;
        }
        let key = evaluation.key(&candidate, 0, load, evaluation.locality_score(&candidate, 0).locality());
        if is_worse(&key) {
            continue;
        }
        best.push(Reverse(Ranked { key, candidate, copies: 0 }));
        if best.len() > most {
            best.pop();
        }
    }
    best.into_iter().map(|Reverse(ranked)| ranked).collect()
}

/// As few platforms as possible are used that have no VMs yet, and as few as possible at all then: whatever
/// fits on one goes there, and otherwise the one with most room is filled. Of several that do, it is the one
/// with most VMs.
fn pack(candidates: Vec<Candidate<'_>>, mut left: u32) -> Option<Vec<Pick<'_>>> {
    if room_of(&candidates) < left.into() {
        return None;
    }
    let (mut in_use, mut empty): (Vec<_>, Vec<_>) =
        candidates.into_iter().partition(|candidate| candidate.member.load.vms > 0);
    let (mut chosen, mut is_sorted) = (Vec::new(), false);
    while left > 0 {
        let group = if room_of(&in_use) >= left.into() { &mut in_use } else { &mut empty };
        if let Some(candidate) = fullest(group, left) {
            chosen.push(Pick { candidate, copies: left });
            break;
        }
        if !is_sorted {
            for group in [&mut in_use, &mut empty] {
                group.sort_unstable_by_key(|Candidate { member, room, .. }| {
                    (*room, member.load.vms, Reverse(name_of(member)))
                });
            }
            is_sorted = true;
            continue;
        }
        let candidate = group.pop()?;
        left -= candidate.room;
        chosen.push(Pick { candidate, copies: candidate.room });
    }
    Some(chosen)
}

fn room_of(candidates: &[Candidate<'_>]) -> u64 {
    candidates.iter().map(|candidate| u64::from(candidate.room)).sum()
}

/// Of those that have room for all copies, the one with most VMs, and then the one with least room.
fn fullest<'m>(candidates: &[Candidate<'m>], copies: u32) -> Option<Candidate<'m>> {
    let fitting = candidates.iter().copied().filter(|candidate| candidate.room >= copies);
    fitting.max_by_key(|Candidate { member, room, .. }| {
        (member.load.vms, Reverse(*room), Reverse(name_of(member)))
    })
}

/// One platform is filled after another.
fn in_order<'m>(evaluation: &Evaluation<'_>, mut candidates: Vec<Candidate<'m>>) -> Option<Vec<Pick<'m>>> {
    candidates.sort_unstable_by_key(|candidate| {
        (evaluation.pinned_at(candidate.member), name_of(candidate.member))
    });
    let mut left = evaluation.wish.count;
    let mut chosen = Vec::new();
    for candidate in candidates {
        let copies = candidate.room.min(left);
        left -= copies;
        chosen.extend((copies > 0).then_some(Pick { candidate, copies }));
    }
    (left == 0).then_some(chosen)
}
