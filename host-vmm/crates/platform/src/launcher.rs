//! Copies of a VM: which they are, and how they are launched from its image, without their parent.

use std::{collections::BTreeSet, fs::File, sync::Arc, time::Duration};

use api::Copied;
use capsule::ImageMetadata;
use node::fork::rendezvous::{self, Rendezvous};
use types::{CopySpec, ForkStep, VmIdentity, VmShape, new_id};
use uuid::Uuid;
use vmfork_abi::{ListedCopy, Location, PLATFORM_BYTES, pad_text};

use super::{
    Error, Platform, fork::Fork, node_server::Node, registry::Reservation, seals::Seal,
    working_sets::WorkingSetHistory,
};
use crate::clone::postcopy::PostcopyMemory;

/// How long copies of an image may take until they are ready to run.
pub(crate) const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);

/// All copies of a fork, from the first to the last.
pub(crate) fn slots(count: u32) -> Result<Vec<CopySpec>, Error> {
    (1..=count).map(|index| Ok(CopySpec { id: new_id().map_err(Error::Id)?, index })).collect()
}

/// Writes down for their parent's guest that copies are launched on `platform`. To be called before any of
/// them can arrive.
///
/// # Errors
/// [`rendezvous::Error::NoCopy`].
pub(crate) fn list(
    rendezvous: &Rendezvous,
    slots: &[CopySpec],
    platform: &str,
    location: Location,
) -> Result<(), rendezvous::Error> {
    // Names are checked where they come from.
    let platform = pad_text(platform).unwrap_or([0; PLATFORM_BYTES]);
    slots.iter().try_for_each(|&CopySpec { id, index }| {
        let (vm_id, location) = (id.into_bytes(), location.number());
        rendezvous.list(&ListedCopy { vm_id, index, location, platform, ..Default::default() })
    })
}

/// Those that were ordered of the copies that another platform says run, each once: it may name any number of
/// others.
pub(crate) fn ordered(slots: &[CopySpec], mut named: Vec<Copied>) -> Vec<Copied> {
    let mut missing: BTreeSet<Uuid> = slots.iter().map(|slot| slot.id).collect();
    named.retain(|vm| missing.remove(&vm.id));
    named
}

/// Copies that are to be launched on this platform.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch<'a> {
    /// Their shape.
    pub(crate) config: VmShape,
    /// What they are copies of.
    pub(crate) original: &'a VmIdentity,
    /// Their type.
    pub(crate) vm_type: &'a str,
    /// Which they are.
    pub(crate) slots: &'a [CopySpec],
    /// How many copies their fork makes, here and elsewhere.
    pub(crate) total: u32,
    /// How many have to be ready until all of them run.
    pub(crate) arrivals: u32,
    /// Number of the guest's request that they come from.
    pub(crate) seq: u64,
    /// Where this is to fail.
    pub(crate) fault: Option<ForkStep>,
    /// What is known of such copies.
    pub(crate) history: &'a Arc<WorkingSetHistory>,
    /// Whether they were shown another CPU than this platform's guests are.
    pub(crate) has_foreign_cpu: bool,
    /// Who fills their memory, where it is not there as a whole yet.
    pub(crate) postcopy: Option<&'a Arc<PostcopyMemory>>,
}

impl<'a> Launch<'a> {
    /// Some of the `total` copies of an image, all of whose memory is there. They wait for each other alone.
    pub(crate) fn of_image(
        metadata: &'a ImageMetadata,
        history: &'a Arc<WorkingSetHistory>,
        slots: &'a [CopySpec],
        total: u32,
    ) -> Self {
        Self {
            config: metadata.config,
            original: &metadata.original,
            vm_type: &metadata.vm_type,
            slots,
            total,
            arrivals: u32::try_from(slots.len()).unwrap_or(u32::MAX),
            seq: metadata.seq,
            fault: None,
            history,
            has_foreign_cpu: false,
            postcopy: None,
        }
    }
}

impl Fork {
    /// Launches copies without their parent, from its image: `state`, and `files` with its memory, which are
    /// sealed, or filled by this platform alone. They wait until they may run.
    ///
    /// # Errors
    /// [`Error`]: none of them is there then.
    pub(crate) fn of_image(
        platform: &Arc<Platform>,
        launch: Launch<'_>,
        state: &[u8],
        files: &[Arc<File>],
        room: Reservation,
    ) -> Result<Copies, Error> {
        let rendezvous = Arc::new(Rendezvous::new()?);
        let fork = Self::meeting_in(Arc::clone(&rendezvous), Seal::sealed());
        rendezvous.publish(state)?;
        let files: Vec<&File> =
            std::iter::once(rendezvous.file()).chain(files.iter().map(AsRef::as_ref)).collect();
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

    /// Ends them, and gives the reason why it had to come to that: a copy's own says more than that there is
    /// one.
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
        for (CopySpec { id, index }, (platform, location)) in all.into_iter().zip(expected) {
            let copy = rendezvous.listed(index).unwrap();
            assert_eq!((copy.vm_id, copy.index, copy.location), (id.into_bytes(), index, location.number()));
            assert_eq!(vmfork_abi::padded_text(&copy.platform), Some(platform));
        }
    }

    #[test]
    fn only_what_was_ordered_is_taken_for_there_and_once() {
        let copy = |id: u128, name: &str| Copied { id: Uuid::from_u128(id), name: name.into() };
        let slots = [(1, 7), (2, 8)].map(|(index, id)| CopySpec { id: Uuid::from_u128(id), index });
        let named = vec![copy(9, "x"), copy(8, "web.2"), copy(8, "y"), copy(0, "z")];
        assert_eq!(ordered(&slots, named), [copy(8, "web.2")]);
    }
}
