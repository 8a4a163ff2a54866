//! Copies of a VM: which they are, and how they are launched from its image, without their parent.

use std::{collections::BTreeSet, fs::File, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;
use vmfork_abi::{ListedCopy, Location, PLATFORM_BYTES, pad_text};

use super::{Error, Platform, fork::Fork, node::Node, prefetch::Learned, registry::Reservation, seals::Seal};
use crate::{
    api::Copied,
    capsule::About,
    cluster::clone::filling::Filling,
    fork::rendezvous::{self, Rendezvous},
    machine::{Config, VmIdentity, new_id},
    wire::Step,
};

/// How long copies of an image may take until they are ready to run.
pub(crate) const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);

/// One copy of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Slot {
    /// ID of the VM to be.
    pub id: Uuid,
    /// Which of the fork's copies it is, from 1.
    pub index: u32,
}

/// All copies of a fork, from the first to the last.
pub(super) fn slots(count: u32) -> Result<Vec<Slot>, Error> {
    (1..=count).map(|index| Ok(Slot { id: new_id().map_err(Error::Id)?, index })).collect()
}

/// Writes down for their parent's guest that copies are launched on `platform`. To be called before any of them can arrive.
///
/// # Errors
/// [`rendezvous::Error::NoCopy`].
pub(super) fn list(
    rendezvous: &Rendezvous,
    slots: &[Slot],
    platform: &str,
    location: Location,
) -> Result<(), rendezvous::Error> {
    // Names are checked where they come from.
    let platform = pad_text(platform).unwrap_or([0; PLATFORM_BYTES]);
    slots.iter().try_for_each(|&Slot { id, index }| {
        let (vm_id, location) = (id.into_bytes(), location.number());
        rendezvous.list(&ListedCopy { vm_id, index, location, platform, ..Default::default() })
    })
}

/// Whether these may be some of the copies of a fork that makes `total`: it comes from another platform.
pub(crate) fn is_slots(slots: &[Slot], total: u32) -> bool {
    let ids: BTreeSet<Uuid> = slots.iter().map(|slot| slot.id).collect();
    let are_sorted = slots.is_sorted_by(|one, next| one.index < next.index);
    let are_within = slots.iter().all(|slot| (1..=total).contains(&slot.index) && !slot.id.is_nil());
    !slots.is_empty() && ids.len() == slots.len() && are_sorted && are_within
}

/// Those that were ordered of the copies that another platform says run, each once: it may name any number of others.
pub(super) fn ordered(slots: &[Slot], mut named: Vec<Copied>) -> Vec<Copied> {
    let mut missing: BTreeSet<Uuid> = slots.iter().map(|slot| slot.id).collect();
    named.retain(|vm| missing.remove(&vm.id));
    named
}

/// Copies that are to be launched on this platform.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch<'a> {
    /// Their shape.
    pub(super) config: Config,
    /// What they are copies of.
    pub(super) original: &'a VmIdentity,
    /// Their type.
    pub(super) vm_type: &'a str,
    /// Which they are.
    pub(super) slots: &'a [Slot],
    /// How many copies their fork makes, here and elsewhere.
    pub(super) total: u32,
    /// How many have to be ready until all of them run.
    pub(super) arrivals: u32,
    /// Number of the guest's request that they come from.
    pub(super) seq: u64,
    /// Where this is to fail.
    pub(super) fault: Option<Step>,
    /// What is known of such copies.
    pub(super) learned: &'a Arc<Learned>,
    /// Whether they were shown another CPU than this platform's guests are.
    pub(super) is_foreign: bool,
    /// Who fills their memory, where it is not there as a whole yet.
    pub(super) filling: Option<&'a Arc<Filling>>,
}

impl<'a> Launch<'a> {
    /// Some of the `total` copies of an image, all of whose memory is there. They wait for each other alone.
    pub(super) fn of_image(about: &'a About, learned: &'a Arc<Learned>, slots: &'a [Slot], total: u32) -> Self {
        Self {
            config: about.config,
            original: &about.original,
            vm_type: &about.vm_type,
            slots,
            total,
            arrivals: u32::try_from(slots.len()).unwrap_or(u32::MAX),
            seq: about.seq,
            fault: None,
            learned,
            is_foreign: false,
            filling: None,
        }
    }
}

impl Fork {
    /// Launches copies without their parent, from its image: `state`, and `files` with its memory, which are sealed, or
    /// filled by this platform alone. They wait until they may run.
    ///
    /// # Errors
    /// [`Error`]: none of them is there then.
    pub(super) fn of_image(
        platform: &Arc<Platform>,
        launch: Launch<'_>,
        state: &[u8],
        files: &[Arc<File>],
        room: Reservation,
    ) -> Result<Copies, Error> {
        let rendezvous = Arc::new(Rendezvous::new()?);
        let fork = Self::meeting_in(Arc::clone(&rendezvous), Seal::sealed());
        rendezvous.publish(state)?;
        let files: Vec<&File> = std::iter::once(rendezvous.file()).chain(files.iter().map(AsRef::as_ref)).collect();
        let launched = fork.launch(platform, launch, &files, None, room);
        let mut copies = Copies { fork, rendezvous, vms: Vec::new(), is_decided: false };
        let ready = launched.and_then(|nodes| {
            copies.vms = nodes.iter().map(|node| node.identity().clone()).collect();
            nodes.into_iter().try_for_each(Node::serve)?;
            Ok(copies.rendezvous.wait_arrivals(launch.arrivals, LAUNCH_TIMEOUT, || false)?)
        });
        match ready {
            Ok(()) => Ok(copies),
            Err(error) => Err(copies.call_off(error)),
        }
    }
}

/// Copies of an image that are ready to run. Dropping them ends them, unless they run.
#[derive(Debug)]
#[must_use]
pub struct Copies {
    fork: Arc<Fork>,
    rendezvous: Arc<Rendezvous>,
    vms: Vec<VmIdentity>,
    /// Whether it is decided what becomes of them.
    is_decided: bool,
}

impl Copies {
    /// Lets them run, and says who they are.
    ///
    /// # Errors
    /// [`Error`]: none of them runs, or is there.
    pub fn commit(mut self) -> Result<Vec<VmIdentity>, Error> {
        // One may have died while they waited.
        let whole = if self.fork.has_failed() { Err(rendezvous::Error::ChildFailed) } else { Ok(()) };
        match whole.and_then(|()| self.rendezvous.commit()) {
            Ok(()) => {
                self.is_decided = true;
                Ok(std::mem::take(&mut self.vms))
            }
            Err(error) => Err(self.call_off(error.into())),
        }
    }

    /// Ends them, and gives the reason why it had to come to that: a copy's own says more than that there is one.
    fn call_off(mut self, error: Error) -> Error {
        self.is_decided = true;
        match self.fork.abort() {
            (_, why) if matches!(error, Error::Rendezvous(_)) => Error::Spawn(why),
            _ => error,
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        if !self.is_decided {
            self.fork.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_listed_where_they_are_launched_in_the_end() {
        let (rendezvous, all) = (Rendezvous::new().unwrap(), slots(3).unwrap());
        list(&rendezvous, &all[..1], "", Location::Local).unwrap();
        list(&rendezvous, &all[1..], "north", Location::Remote).unwrap();
        list(&rendezvous, &all[1..2], "here", Location::Local).unwrap();
        let expected = [("", Location::Local), ("here", Location::Local), ("north", Location::Remote)];
        for (Slot { id, index }, (platform, location)) in all.into_iter().zip(expected) {
            let copy = rendezvous.listed(index).unwrap();
            assert_eq!((copy.vm_id, copy.index, copy.location), (id.into_bytes(), index, location.number()));
            assert_eq!(vmfork_abi::padded_text(&copy.platform), Some(platform));
        }
    }

    #[test]
    fn only_what_was_ordered_is_taken_for_there_and_once() {
        let copy = |id: u128, name: &str| Copied { id: Uuid::from_u128(id), name: name.into() };
        let slots = [(1, 7), (2, 8)].map(|(index, id)| Slot { id: Uuid::from_u128(id), index });
        let named = vec![copy(9, "x"), copy(8, "web.2"), copy(8, "y"), copy(0, "z")];
        assert_eq!(ordered(&slots, named), [copy(8, "web.2")]);
    }

    #[test]
    fn copies_are_told_apart() {
        let all = slots(4).unwrap();
        assert!(is_slots(&all, 4) && is_slots(&all[2..], 4) && is_slots(&all, 9));
        let other = |index, id| Slot { id: Uuid::from_u128(id), index };
        for (slots, why) in [
            (vec![], "none"),
            (vec![other(0, 1)], "from 1"),
            (vec![other(5, 1)], "more than there are"),
            (vec![other(2, 1), other(1, 2)], "not in order"),
            (vec![other(1, 1), other(1, 2)], "one twice"),
            (vec![other(1, 1), other(2, 1)], "two with one ID"),
            (vec![other(1, 0)], "no ID"),
        ] {
            assert!(!is_slots(&slots, 4), "{why}");
        }
    }
}
