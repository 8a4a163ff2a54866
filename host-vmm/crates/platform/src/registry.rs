//! Which VMs there are, and what the next ones are called.

use std::{
    collections::{BTreeMap, VecDeque, btree_map},
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use api::Ended;
use base::sync::lock;
use node::wire::PlatformLink;
use types::{ExitReason, VmIdentity, VmShape};
use uuid::Uuid;

use super::{Error, fork::operator::Ordered, seals::Seal};
use crate::clone::postcopy::PostcopyMemory;

/// Most VMs without copies that are told of after their end: the latest that were ended for their image could
/// be changed.
const MAX_UNSEALED: usize = 64;

/// One VM.
#[derive(Debug)]
pub(super) struct Entry {
    /// Connection to its node.
    pub(super) link: Arc<PlatformLink>,
    /// Who it is.
    pub(super) vm: VmIdentity,
    /// Its shape.
    pub(super) config: VmShape,
    /// Process of its node.
    pub(super) pid: u32,
    /// When it was entered.
    pub(super) since: Instant,
    /// Whether it runs.
    pub(super) runs: bool,
    /// Whether its guest knows of a VM generation ID, once it runs.
    pub(super) generation_id: Option<bool>,
    /// Who fills its memory, where that did not come as a whole before it.
    pub(super) postcopy: Option<Weak<PostcopyMemory>>,
    /// Seals of the images that its memory is a view of: of the one that it was launched from, and of its
    /// forks, until they are sealed. Empty where it was booted and has never forked.
    pub(super) seals: Vec<Arc<Seal>>,
    /// How it was ended from outside, once it was.
    pub(super) forced: Arc<OnceLock<ExitReason>>,
    /// The fork that an operator has ordered.
    pub(super) ordered: Arc<Ordered>,
}

/// The VMs of a platform.
#[derive(Debug, Default)]
pub(super) struct Registry {
    state: Mutex<State>,
    changed: Condvar,
    /// VMs for which room is kept.
    reserved: Arc<AtomicUsize>,
}

/// Room for VMs that are to come. Dropping it gives the room back.
#[derive(Debug)]
#[must_use]
pub struct Reservation {
    reserved: Arc<AtomicUsize>,
    count: usize,
}

impl Reservation {
    /// One of them has come.
    pub(super) fn is_used(&mut self) {
        if self.count > 0 {
            self.count -= 1;
            self.reserved.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.count, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct State {
    /// Each VM that is there, or about to be.
    vms: BTreeMap<Uuid, Entry>,
    /// VMs that have ended, and of which there are copies.
    ended: BTreeMap<Uuid, Ended>,
    /// The latest VMs that were ended for their image could be changed.
    unsealed: VecDeque<Ended>,
    /// How many VMs got a number in their name.
    numbered: u64,
    stopping: bool,
}

impl State {
    /// Forgets a VM that has ended, unless there are copies of it, and those that it was the last copy of.
    fn forget(&mut self, mut id: Uuid) {
        while !self.has_copies(id)
            && let Some(ended) = self.ended.remove(&id)
            && let Some(parent) = ended.parent
        {
            id = parent;
        }
    }

    fn has_copies(&self, id: Uuid) -> bool {
        self.vms.values().any(|entry| entry.vm.parent == id)
            || self.ended.values().any(|ended| ended.parent == Some(id))
    }
}

impl Registry {
    /// Names for `count` new VMs of a type: `web.1`, `web.2`, and so on. No number is ever given twice,
    /// whatever the type.
    pub(super) fn names(&self, vm_type: &str, count: usize) -> Vec<String> {
        let mut state = lock(&self.state);
        let first = state.numbered + 1;
        state.numbered += count as u64;
        (first..=state.numbered).map(|number| format!("{vm_type}.{number}")).collect()
    }

    /// Keeps room for `wanted` more VMs, where there are no more than `max` then with those for which room is
    /// kept already.
    pub(super) fn reserve(&self, wanted: usize, max: usize) -> Result<Reservation, Error> {
        let state = lock(&self.state);
        if state.stopping {
            return Err(Error::Stopping);
        }
        let running = state.vms.len().saturating_add(self.reserved.load(Ordering::Relaxed));
        if running.saturating_add(wanted) > max {
            return Err(Error::Full { wanted, running, max });
        }
        self.reserved.fetch_add(wanted, Ordering::Relaxed);
        Ok(Reservation { reserved: Arc::clone(&self.reserved), count: wanted })
    }

    /// How many children a VM has, and how much guest memory the VMs of a type have, in bytes.
    pub(super) fn usage(&self, parent: Uuid, vm_type: &str) -> (u64, u64) {
        let state = lock(&self.state);
        let children = state.vms.values().filter(|entry| entry.vm.parent == parent).count();
        let of_type = state.vms.values().filter(|entry| entry.vm.vm_type == vm_type);
        (children as u64, of_type.map(|entry| entry.config.ram_bytes).sum())
    }

    /// Enters a VM, under an ID that no other one has.
    pub(super) fn enter(&self, entry: Entry) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if state.stopping {
            return Err(Error::Stopping);
        }
        match state.vms.entry(entry.vm.id) {
            btree_map::Entry::Occupied(_) => Err(Error::Twice(entry.vm.id)),
            btree_map::Entry::Vacant(place) => {
                place.insert(entry);
                Ok(())
            }
        }
    }

    /// Says that a VM runs, and whether its guest knows of a VM generation ID.
    pub(super) fn runs(&self, id: Uuid, generation_id: bool) {
        if let Some(entry) = lock(&self.state).vms.get_mut(&id) {
            entry.runs = true;
            entry.generation_id = Some(generation_id);
        }
    }

    /// Says who fills a VM's memory.
    pub(super) fn depends(&self, id: Uuid, postcopy: &Arc<PostcopyMemory>) {
        if let Some(entry) = lock(&self.state).vms.get_mut(&id) {
            entry.postcopy = Some(Arc::downgrade(postcopy));
        }
    }

    /// Enters one more image of which a VM's memory may be a view.
    pub(super) fn shares(&self, id: Uuid, seal: &Arc<Seal>) {
        if let Some(entry) = lock(&self.state).vms.get_mut(&id) {
            entry.seals.retain(|seal| !seal.is_sealed());
            entry.seals.push(Arc::clone(seal));
        }
    }

    /// Ends the VMs that share an image, and gives their names. Nobody waits for that.
    pub(super) fn end_sharing(&self, seal: &Arc<Seal>, end: &ExitReason) -> Vec<String> {
        let state = lock(&self.state);
        let sharing =
            state.vms.values().filter(|entry| entry.seals.iter().any(|other| Arc::ptr_eq(other, seal)));
        let end = |entry: &Entry| {
            entry.forced.get_or_init(|| end.clone());
            entry.link.shut_down();
            entry.vm.name.clone()
        };
        sharing.map(end).collect()
    }

    /// Ends a VM, if it is there, and says whether nothing is left of it within the limit.
    pub(super) fn end(&self, id: Uuid, limit: Duration) -> bool {
        let state = lock(&self.state);
        if let Some(entry) = state.vms.get(&id) {
            entry.forced.get_or_init(|| ExitReason::Stopped);
            entry.link.shut_down();
        }
        let waited = self.changed.wait_timeout_while(state, limit, |state| state.vms.contains_key(&id));
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Takes a VM out, when nothing is left of it.
    pub(super) fn leave(&self, id: Uuid) {
        let mut state = lock(&self.state);
        if let Some(Entry { vm, forced, .. }) = state.vms.remove(&id) {
            let parent = Some(vm.parent).filter(|parent| *parent != Uuid::nil());
            let why = match forced.get() {
                Some(ExitReason::Unsealed(why)) => Some(why.clone()),
                _ => None,
            };
            let ended = Ended { id, name: vm.name, parent, why };
            if ended.why.is_some() {
                let surplus = (state.unsealed.len() + 1).saturating_sub(MAX_UNSEALED);
                state.unsealed.drain(..surplus);
                state.unsealed.push_back(ended.clone());
            }
            state.ended.insert(id, ended);
            state.forget(id);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Makes something of each VM, parents before their children, and tells which have ended that have
    /// copies, or that were ended for their image could be changed.
    pub(super) fn list<T>(&self, make: impl Fn(&Entry) -> T) -> (Vec<T>, Vec<Ended>) {
        let state = lock(&self.state);
        let mut entries: Vec<&Entry> = state.vms.values().collect();
        entries.sort_by_key(|entry| (entry.vm.generation, entry.since));
        let others = state.unsealed.iter().filter(|ended| !state.ended.contains_key(&ended.id));
        (entries.into_iter().map(make).collect(), state.ended.values().chain(others).cloned().collect())
    }

    /// Makes something of one VM, if it is there.
    pub(super) fn get<T>(&self, id: Uuid, make: impl FnOnce(&Entry) -> T) -> Option<T> {
        lock(&self.state).vms.get(&id).map(make)
    }

    /// IDs and names of all VMs that are there, and of those that have ended that have copies.
    pub(super) fn known(&self) -> Vec<(Uuid, String)> {
        let state = lock(&self.state);
        let ended = state.ended.values().map(|ended| (ended.id, ended.name.clone()));
        state.vms.values().map(|entry| (entry.vm.id, entry.vm.name.clone())).chain(ended).collect()
    }

    /// Lets no new VMs come, and breaks the connections to those that there are: whoever serves one ends it
    /// then.
    pub(super) fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopping = true;
        for entry in state.vms.values() {
            entry.link.shut_down();
        }
    }

    /// How many VMs there are, or are to come, and whether no more may come.
    pub(super) fn count(&self) -> (usize, bool) {
        let state = lock(&self.state);
        (state.vms.len().saturating_add(self.reserved.load(Ordering::Relaxed)), state.stopping)
    }

    /// Whether there is no VM.
    pub(super) fn is_empty(&self) -> bool {
        lock(&self.state).vms.is_empty()
    }

    /// Waits until there is no VM.
    pub(super) fn wait_empty(&self) {
        let mut state = lock(&self.state);
        while !state.vms.is_empty() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_never_given_twice() {
        let registry = Registry::default();
        assert_eq!(registry.names("web", 2), ["web.1", "web.2"]);
        assert_eq!(registry.names("db", 1), ["db.3"]);
        assert_eq!(registry.names("web", 1), ["web.4"]);
    }

    fn entry(id: u128, parent: u128, link: &Arc<PlatformLink>) -> Entry {
        let vm = VmIdentity {
            id: Uuid::from_u128(id),
            parent: Uuid::from_u128(parent),
            name: String::new(),
            vm_type: "web".into(),
            index: 1,
            count: 1,
            generation: 1,
        };
        let config = VmShape { ram_bytes: 5 << 20, vcpus: 1 };
        Entry {
            link: Arc::clone(link),
            vm,
            config,
            pid: 0,
            since: Instant::now(),
            runs: false,
            generation_id: None,
            postcopy: None,
            seals: Vec::new(),
            forced: Arc::default(),
            ordered: Arc::default(),
        }
    }

    #[test]
    fn usage_is_what_is_there() {
        let registry = Registry::default();
        let (link, _theirs) = PlatformLink::pair().unwrap();
        let link = Arc::new(link);
        for (id, parent) in [(1, 0), (2, 1), (3, 1), (4, 2)] {
            registry.enter(entry(id, parent, &link)).unwrap();
        }
        assert_eq!(registry.usage(Uuid::from_u128(1), "web"), (2, 20 << 20));
        registry.leave(Uuid::from_u128(3));
        assert_eq!(registry.usage(Uuid::from_u128(1), "web"), (1, 15 << 20));
        assert_eq!(registry.usage(Uuid::from_u128(4), "db"), (0, 0));
    }

    #[test]
    fn no_vm_takes_the_place_of_another_one() {
        let registry = Registry::default();
        let (link, _theirs) = PlatformLink::pair().unwrap();
        let link = Arc::new(link);
        registry.enter(entry(1, 0, &link)).unwrap();
        assert!(matches!(registry.enter(entry(1, 2, &link)), Err(Error::Twice(id)) if id.as_u128() == 1));
        assert_eq!(registry.usage(Uuid::from_u128(0), "web").0, 1);
        registry.leave(Uuid::from_u128(1));
        registry.enter(entry(1, 2, &link)).unwrap();
    }

    #[test]
    fn the_ended_are_remembered_for_as_long_as_they_have_copies() {
        let registry = Registry::default();
        let (link, _theirs) = PlatformLink::pair().unwrap();
        let link = Arc::new(link);
        for (id, parent) in [(1, 0), (2, 1), (3, 2), (4, 1)] {
            registry.enter(entry(id, parent, &link)).unwrap();
        }
        let ended = || registry.list(|_| ()).1.iter().map(|ended| ended.id.as_u128()).collect::<Vec<_>>();
        registry.leave(Uuid::from_u128(2));
        registry.leave(Uuid::from_u128(4));
        assert_eq!(ended(), [2]);
        registry.leave(Uuid::from_u128(1));
        assert_eq!(ended(), [1, 2]);
        registry.leave(Uuid::from_u128(3));
        assert!(ended().is_empty());
    }

    #[test]
    fn one_vm_is_ended_and_waited_for() {
        let registry = Registry::default();
        let links = [1, 2].map(|id| {
            let (link, theirs) = PlatformLink::pair().unwrap();
            let link = Arc::new(link);
            registry.enter(entry(id, 0, &link)).unwrap();
            (link, theirs)
        });
        let (first, second) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert!(!registry.end(first, Duration::ZERO), "whoever serves it has not ended it yet");
        assert_eq!(registry.get(first, |entry| entry.forced.get().cloned()), Some(Some(ExitReason::Stopped)));
        assert_eq!(registry.get(second, |entry| entry.forced.get().cloned()), Some(None));
        let patience = Duration::from_secs(60);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(matches!(links[0].0.receive(), Err(node::wire::link::Error::Closed)));
                registry.leave(first);
            });
            assert!(registry.end(first, patience));
        });
        assert!(registry.end(first, patience), "it has ended");
        assert_eq!(registry.known(), [(second, String::new())]);
    }

    #[test]
    fn those_that_share_an_image_are_ended_and_it_is_said_why() {
        let registry = Registry::default();
        let (link, _theirs) = PlatformLink::pair().unwrap();
        let link = Arc::new(link);
        let [first, second] = [Arc::default(), Seal::sealed()];
        for (id, parent, seals) in
            [(1, 0, vec![]), (2, 1, vec![Arc::clone(&first)]), (3, 1, vec![Arc::clone(&second)])]
        {
            registry.enter(Entry { seals, ..entry(id, parent, &link) }).unwrap();
        }
        let parent = Uuid::from_u128(1);
        registry.shares(parent, &second);
        registry.shares(parent, &first);
        let count = |id| registry.get(Uuid::from_u128(id), |entry| entry.seals.len());
        assert_eq!((count(1), count(2)), (Some(1), Some(1)), "of those that are sealed, none is remembered");
        let end = ExitReason::Unsealed("a reason".into());
        assert_eq!(registry.end_sharing(&first, &end).len(), 2);
        let forced =
            [1, 2, 3].map(|id| registry.get(Uuid::from_u128(id), |entry| entry.forced.get().cloned()));
        assert_eq!(forced, [Some(Some(end.clone())), Some(Some(end)), Some(None)]);
        for id in [2, 1] {
            registry.leave(Uuid::from_u128(id));
        }
        let told: Vec<_> =
            registry.list(|_| ()).1.into_iter().map(|ended| (ended.id.as_u128(), ended.why)).collect();
        assert_eq!(told, [(1, Some("a reason".into())), (2, Some("a reason".into()))]);
    }

    #[test]
    fn room_is_kept_for_those_that_are_to_come() {
        let registry = Registry::default();
        let (link, _theirs) = PlatformLink::pair().unwrap();
        let link = Arc::new(link);
        let is_full = |wanted, there| matches!(registry.reserve(wanted, 4), Err(Error::Full { running, max: 4, .. }) if running == there);
        let mut others = registry.reserve(3, 4).unwrap();
        assert!(is_full(2, 3) && is_full(usize::MAX, 3));
        assert_eq!(registry.count().0, 3);
        registry.enter(entry(1, 0, &link)).unwrap();
        others.is_used();
        assert_eq!(registry.count().0, 3, "it is counted once");
        let own = registry.reserve(1, 4).unwrap();
        assert!(is_full(1, 4));
        drop(others);
        assert!(is_full(3, 2));
        drop(own);
        assert_eq!(registry.count().0, 1);
        drop(registry.reserve(3, 4).unwrap());
    }

    #[test]
    fn a_platform_that_stops_takes_no_more() {
        let registry = Registry::default();
        drop(registry.reserve(2, 2).unwrap());
        assert!(matches!(registry.reserve(3, 2), Err(Error::Full { wanted: 3, running: 0, max: 2 })));
        let (link, _theirs) = PlatformLink::pair().unwrap();
        let link = Arc::new(link);
        registry.enter(entry(1, 0, &link)).unwrap();
        registry.stop();
        assert!(matches!(link.receive(), Err(node::wire::link::Error::Closed)));
        assert!(matches!(registry.reserve(1, 2), Err(Error::Stopping)));
        assert!(matches!(registry.enter(entry(2, 0, &link)), Err(Error::Stopping)));
        registry.leave(Uuid::from_u128(1));
        registry.wait_empty();
    }
}
