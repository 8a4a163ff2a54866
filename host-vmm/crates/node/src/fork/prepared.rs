//! Prepared forks: what each fork uses up, made before it is asked for, since making it takes longer than the
//! rest of the parent's work.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{Arc, Mutex},
};

use base::sync::lock;
use vmm::{
    machine::Machine,
    memory::{Delta, Plan},
};

use super::{
    Error,
    rendezvous::{self, Rendezvous},
    standby::WakeEvent,
};
use crate::wire::{NodeLink, ToPlatform};

/// Descriptors that one fork uses up.
#[derive(Debug)]
pub(super) struct PreparedFork {
    /// Where parent and children meet.
    pub(super) rendezvous: Rendezvous,
    /// For the pages that the parent has written to.
    pub(super) delta: Delta,
    /// Where the platform knows of it.
    announced: Option<Announced>,
}

/// What the platform was told.
#[derive(Debug)]
struct Announced {
    wake_event: WakeEvent,
    files: Vec<Arc<File>>,
}

impl PreparedFork {
    fn make() -> Result<Self, rendezvous::Error> {
        Ok(Self { rendezvous: Rendezvous::new()?, delta: Delta::new()?, announced: None })
    }

    /// Makes one with the pages that most forks need.
    fn make_warm() -> Result<Self, Error> {
        let prepared = Self::make()?;
        prepared.rendezvous.warm_up()?;
        prepared.delta.warm_up()?;
        Ok(prepared)
    }

    /// Tells the platform what the next fork will come with.
    fn announce(&mut self, plan: &Plan, link: &NodeLink) -> Result<(), Error> {
        let wake_event = WakeEvent::new()?;
        let files = plan.files().iter().map(|file| file.as_fd());
        let files = [wake_event.as_fd(), self.rendezvous.file().as_fd()].into_iter().chain(files);
        link.send(&ToPlatform::Announce, &files.collect::<Vec<_>>())?;
        self.announced = Some(Announced { wake_event, files: plan.files().to_vec() });
        Ok(())
    }

    /// Whether what was announced is what `plan` has: the memory may have become an image since.
    fn is_announced(&self, plan: &Plan) -> bool {
        let files = |files: &[Arc<File>]| files.iter().map(Arc::as_ptr).collect::<Vec<_>>();
        self.announced.as_ref().is_some_and(|announced| files(&announced.files) == files(plan.files()))
    }

    /// The wake event of the warm VM that stands by for `plan`, if one may.
    pub(super) fn take_wake_event(&mut self, plan: &Plan) -> Option<WakeEvent> {
        let is_announced = self.is_announced(plan);
        self.announced.take().filter(|_| is_announced).map(|announced| announced.wake_event)
    }
}

/// The prepared next fork of one VM, if it has been prepared.
#[derive(Debug, Default)]
pub(super) struct PreparedForks(Mutex<Option<PreparedFork>>);

impl PreparedForks {
    /// Takes it. One that is not there is made at once.
    pub(super) fn take(&self) -> Result<PreparedFork, rendezvous::Error> {
        let ready = lock(&self.0).take();
        ready.map_or_else(PreparedFork::make, Ok)
    }

    /// Has one there. Where `announces`, a warm VM is to stand by for the fork that takes it.
    pub(super) fn prepare_next(
        &self,
        machine: &Machine,
        link: &NodeLink,
        announces: bool,
    ) -> Result<(), Error> {
        let ready = lock(&self.0).take();
        let mut prepared = match ready {
            Some(prepared) => prepared,
            None => PreparedFork::make_warm()?,
        };
        if announces {
            let plan = lock(&machine.memory).plan(&prepared.delta);
            if !prepared.is_announced(&plan) {
                prepared.announce(&plan, link)?;
            }
        }
        *lock(&self.0) = Some(prepared);
        Ok(())
    }
}
