//! The history of working sets: the pages that a VM's copies have written to first.

use std::sync::Mutex;

use base::sync::lock;
use node::wire::Prefetch;
use vmm::memory::WorkingSet;

/// One in so many forks has its first child record again: what copies do changes.
const RECORD_EVERY: u64 = 64;

/// Working-set history of the copies of one VM, or of one image.
#[derive(Debug, Default)]
pub(crate) struct WorkingSetHistory(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    working_set: Option<WorkingSet>,
    forks: u64,
}

impl WorkingSetHistory {
    /// What the children of the next fork do: the first one, and the others.
    pub(crate) fn next_fork(&self) -> (Prefetch, Prefetch) {
        let mut known = lock(&self.0);
        let again = known.forks.is_multiple_of(RECORD_EVERY);
        known.forks += 1;
        match known.working_set.as_ref().filter(|working_set| working_set.is_worthwhile()) {
            None if again || known.working_set.is_none() => (Prefetch::Record, Prefetch::None),
            None => (Prefetch::None, Prefetch::None),
            Some(working_set) if again => (Prefetch::Record, Prefetch::Fill(working_set.clone())),
            Some(working_set) => (Prefetch::Fill(working_set.clone()), Prefetch::Fill(working_set.clone())),
        }
    }

    /// What the first child of the next fork will write to, where it is not to tell that itself.
    pub(crate) fn of_next_fork(&self) -> Option<WorkingSet> {
        let known = lock(&self.0);
        let is_recorded = known.forks.is_multiple_of(RECORD_EVERY);
        known.working_set.clone().filter(|working_set| !is_recorded && working_set.is_worthwhile())
    }

    /// Records the working set that a child has told.
    pub(crate) fn record(&self, working_set: WorkingSet) {
        lock(&self.0).working_set = Some(working_set);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::memory::Run;

    #[test]
    fn what_one_copy_tells_the_next_ones_fill() {
        let history = WorkingSetHistory::default();
        for _ in 0..3 {
            assert!(matches!(history.next_fork(), (Prefetch::Record, Prefetch::None)));
        }
        let set = |pages| WorkingSet::new(&[Run { page: 3, pages, file_page: 0 }]);
        history.record(set(4));
        let forks: Vec<_> = (0..2 * RECORD_EVERY).map(|_| history.next_fork()).collect();
        assert_eq!(forks.iter().filter(|(first, _)| matches!(first, Prefetch::Record)).count(), 2);
        assert!(forks.iter().all(|(_, others)| matches!(others, Prefetch::None)));
        let working_set = set(400);
        history.record(working_set.clone());
        let forks: Vec<_> =
            (0..2 * RECORD_EVERY).map(|_| (history.of_next_fork(), history.next_fork())).collect();
        // Nothing is made ready for a child that is to tell what it writes to.
        assert!(forks.iter().all(|(ready, (first, _))| ready.is_none() == matches!(first, Prefetch::Record)));
        let forks: Vec<_> = forks.into_iter().map(|(_, fork)| fork).collect();
        let recording = forks.iter().filter(|(first, _)| matches!(first, Prefetch::Record)).count();
        assert_eq!(recording, 2);
        assert!(forks.iter().all(|(_, others)| matches!(others, Prefetch::Fill(set) if *set == working_set)));
    }
}
