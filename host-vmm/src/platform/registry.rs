//! Which VMs there are, and what the next ones are called.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use uuid::Uuid;

use super::Error;
use crate::{sync::lock, wire::PlatformLink};

/// The VMs of a platform.
#[derive(Debug, Default)]
pub(super) struct Registry {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Connection to the node of each VM that is there, or about to be.
    vms: BTreeMap<Uuid, Arc<PlatformLink>>,
    /// How many VMs got a number in their name.
    numbered: u64,
    stopping: bool,
}

impl Registry {
    /// Names for `count` new VMs of a type: `web.1`, `web.2`, and so on. No number is ever given twice, whatever the type.
    pub(super) fn names(&self, vm_type: &str, count: u32) -> Vec<String> {
        let mut state = lock(&self.state);
        let first = state.numbered + 1;
        state.numbered += u64::from(count);
        (first..=state.numbered).map(|number| format!("{vm_type}.{number}")).collect()
    }

    /// Whether `wanted` more VMs may come.
    pub(super) fn check_room(&self, wanted: usize, max: usize) -> Result<(), Error> {
        let state = lock(&self.state);
        let running = state.vms.len();
        if state.stopping {
            return Err(Error::Stopping);
        }
        if running + wanted > max { Err(Error::Full { wanted, running, max }) } else { Ok(()) }
    }

    /// Enters a VM.
    pub(super) fn enter(&self, id: Uuid, link: &Arc<PlatformLink>) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if state.stopping {
            return Err(Error::Stopping);
        }
        state.vms.insert(id, Arc::clone(link));
        Ok(())
    }

    /// Takes a VM out, when nothing is left of it.
    pub(super) fn leave(&self, id: Uuid) {
        lock(&self.state).vms.remove(&id);
        self.changed.notify_all();
    }

    /// Lets no new VMs come, and breaks the connections to those that there are: whoever serves one ends it then.
    pub(super) fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopping = true;
        for link in state.vms.values() {
            link.shut_down();
        }
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

    #[test]
    fn a_platform_that_stops_takes_no_more() {
        let registry = Registry::default();
        assert!(registry.check_room(2, 2).is_ok());
        assert!(matches!(registry.check_room(3, 2), Err(Error::Full { wanted: 3, running: 0, max: 2 })));
        let (link, _theirs) = PlatformLink::pair().unwrap();
        let link = Arc::new(link);
        registry.enter(Uuid::from_u128(1), &link).unwrap();
        registry.stop();
        assert!(matches!(link.receive(), Err(crate::wire::link::Error::Closed)));
        assert!(matches!(registry.check_room(1, 2), Err(Error::Stopping)));
        assert!(matches!(registry.enter(Uuid::nil(), &link), Err(Error::Stopping)));
        registry.leave(Uuid::from_u128(1));
        registry.wait_empty();
    }
}
