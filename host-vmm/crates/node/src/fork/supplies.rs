//! What each fork uses up, made before it is asked for: making it takes longer than the rest of the parent's work.

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
    standby::Bell,
};
use crate::wire::{NodeLink, ToPlatform};

/// What one fork needs.
#[derive(Debug)]
pub(super) struct Supply {
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
    bell: Bell,
    files: Vec<Arc<File>>,
}

impl Supply {
    fn make() -> Result<Self, rendezvous::Error> {
        Ok(Self { rendezvous: Rendezvous::new()?, delta: Delta::new()?, announced: None })
    }

    /// Makes one with the pages that most forks need.
    fn make_warm() -> Result<Self, Error> {
        let supply = Self::make()?;
        supply.rendezvous.warm_up()?;
        supply.delta.warm_up()?;
        Ok(supply)
    }

    /// Tells the platform what the next fork will come with.
    fn announce(&mut self, plan: &Plan, link: &NodeLink) -> Result<(), Error> {
        let bell = Bell::new()?;
        let files = plan.files().iter().map(|file| file.as_fd());
        let files = [bell.as_fd(), self.rendezvous.file().as_fd()].into_iter().chain(files);
        link.send(&ToPlatform::Announce, &files.collect::<Vec<_>>())?;
        self.announced = Some(Announced { bell, files: plan.files().to_vec() });
        Ok(())
    }

    /// Whether what was announced is what `plan` has: the memory may have become an image since.
    fn is_announced(&self, plan: &Plan) -> bool {
        let files = |files: &[Arc<File>]| files.iter().map(Arc::as_ptr).collect::<Vec<_>>();
        self.announced.as_ref().is_some_and(|announced| files(&announced.files) == files(plan.files()))
    }

    /// The bell of the warm VM that stands by for `plan`, if one may.
    pub(super) fn take_bell(&mut self, plan: &Plan) -> Option<Bell> {
        let is_announced = self.is_announced(plan);
        self.announced.take().filter(|_| is_announced).map(|announced| announced.bell)
    }
}

/// A supply for the next fork of one VM.
#[derive(Debug, Default)]
pub(super) struct Supplies(Mutex<Option<Supply>>);

impl Supplies {
    /// Takes it. One that is not there is made at once.
    pub(super) fn take(&self) -> Result<Supply, rendezvous::Error> {
        let ready = lock(&self.0).take();
        ready.map_or_else(Supply::make, Ok)
    }

    /// Has one there. Where `announces`, a warm VM is to stand by for the fork that takes it.
    pub(super) fn restock(&self, machine: &Machine, link: &NodeLink, announces: bool) -> Result<(), Error> {
        let stocked = lock(&self.0).take();
        let mut supply = match stocked {
            Some(supply) => supply,
            None => Supply::make_warm()?,
        };
        if announces {
            let plan = lock(&machine.memory).plan(&supply.delta);
            if !supply.is_announced(&plan) {
                supply.announce(&plan, link)?;
            }
        }
        *lock(&self.0) = Some(supply);
        Ok(())
    }
}
