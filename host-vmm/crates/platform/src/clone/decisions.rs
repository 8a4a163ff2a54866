//! What became of clones, and for how long a target remembers it.
//!
//! An answer to a commit may be lost: the source asks again then, for [`COMMIT_LIMIT`] at most. It must get
//! the same answer, whatever others ask for meanwhile: to a source that is told that a clone is not known,
//! nobody can say whether its copies run.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::{COMMIT_LIMIT, LEASE};

/// For how long it is remembered what became of a clone, where its source has no more than
/// [`MAX_REMEMBERED`].
const REMEMBERED: Duration = Duration::from_secs(600);

/// Most clones of one source of which it is remembered what became of them; those that it may still ask for
/// are not counted against it.
pub(super) const MAX_REMEMBERED: usize = 1024;

/// Most clones, of all sources together, of which it is remembered what became of them: where there are so
/// many, no more clones come. From half of that on, those are forgotten for which nobody asks any more, the
/// oldest first.
pub(super) const MAX_IN_ALL: usize = 65_536;

/// How long a commit is never forgotten: as long as its source asks again, and twice the time of a lease for
/// a last question that takes its time to be sent, over a connection that has to be made first. To remember
/// these takes little: each has launched its copies.
const ASKED_AGAIN: Duration = COMMIT_LIMIT.saturating_add(LEASE.saturating_mul(2));

/// What became of one clone.
#[derive(Debug, Clone)]
pub(super) struct Decision {
    /// The clone's ID.
    pub(super) id: Uuid,
    /// Name of the platform that has sent it.
    pub(super) source: String,
    /// When that was decided, or last asked for.
    pub(super) since: Instant,
    /// Whether its copies run, or have run.
    pub(super) is_committed: bool,
}

impl Decision {
    fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }

    fn is_asked_for(&self, now: Instant) -> bool {
        self.is_committed && self.age(now) < ASKED_AGAIN
    }
}

/// IDs of the clones that may be forgotten: of each source the oldest, and of all sources those that are too
/// old, or for which nobody asks any more where there are too many.
pub(super) fn evictable(decisions: Vec<Decision>, now: Instant) -> Vec<Uuid> {
    let all = decisions.len();
    let mut by_source: BTreeMap<String, Vec<(Duration, Uuid)>> = BTreeMap::new();
    for decision in decisions.into_iter().filter(|decision| !decision.is_asked_for(now)) {
        let age = decision.age(now);
        by_source.entry(decision.source).or_default().push((age, decision.id));
    }
    let (mut evicted, mut unasked) = (Vec::new(), Vec::new());
    for mut decisions in by_source.into_values() {
        decisions.sort_unstable();
        for (number, (age, id)) in decisions.into_iter().enumerate() {
            if number >= MAX_REMEMBERED || age >= REMEMBERED {
                evicted.push(id);
            } else if age >= ASKED_AGAIN {
                unasked.push((age, id));
            }
        }
    }
    unasked.sort_unstable();
    let surplus = (all - evicted.len()).saturating_sub(MAX_IN_ALL / 2);
    evicted.extend(unasked.into_iter().rev().take(surplus).map(|(_, id)| id));
    evicted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(id: u128, source: &str, since: Instant, is_committed: bool) -> Decision {
        Decision { id: Uuid::from_u128(id), source: source.into(), since, is_committed }
    }

    #[test]
    fn a_commit_is_remembered_for_as_long_as_its_source_may_ask_again() {
        let start = Instant::now();
        for other in ["north", "south"] {
            let mut all = vec![decision(1, "north", start, true)];
            all.extend((2..6000).map(|id| decision(id, other, start + Duration::from_secs(1), false)));
            let last = start + ASKED_AGAIN;
            let evicted = evictable(all.clone(), last - Duration::from_millis(1));
            assert_eq!(evicted.len(), 5998 - MAX_REMEMBERED, "of its own, {other} has no more than others");
            assert!(!evicted.contains(&Uuid::from_u128(1)), "{other} has pushed a commit out");
            let is_out = evictable(all, last).contains(&Uuid::from_u128(1));
            assert_eq!(
                is_out,
                other == "north",
                "where it is as any other, a source has only its own to lose"
            );
        }
        assert!(ASKED_AGAIN > COMMIT_LIMIT);
    }

    #[test]
    fn whatever_sources_are_named_there_are_not_too_many_decisions_and_the_oldest_go() {
        let (start, count) = (Instant::now(), MAX_IN_ALL as u64);
        let since = |id: u64| start + Duration::from_micros(id);
        let all = (0..count)
            .map(|id| decision(id.into(), &format!("source-{id}"), since(id), id.is_multiple_of(2)));
        let all: Vec<_> = all.collect();
        let forgotten_at = |now| evictable(all.clone(), now);
        assert!(
            forgotten_at(start + ASKED_AGAIN - Duration::from_micros(1)).is_empty(),
            "sources may still ask"
        );
        assert_eq!(forgotten_at(since(9) + ASKED_AGAIN).len(), 10);
        let mut evicted = forgotten_at(since(count) + ASKED_AGAIN);
        evicted.sort_unstable();
        assert!(evicted.into_iter().eq((0..count / 2).map(|id| Uuid::from_u128(id.into()))));
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let start = Instant::now();
        let all = vec![decision(1, "north", start, true), decision(2, "south", start, false)];
        assert!(evictable(all.clone(), start + REMEMBERED - Duration::from_millis(1)).is_empty());
        assert_eq!(evictable(all, start + REMEMBERED).len(), 2);
    }
}
