//! What each fork uses up, made before it is asked for: making it takes longer than the rest of the parent's work.

use std::{fs::File, sync::Mutex};

use super::rendezvous::{self, Rendezvous};
use crate::{
    memory::{self, PageMap},
    sync::lock,
};

/// What one fork needs.
#[derive(Debug)]
pub(super) struct Supply {
    /// Where parent and children meet.
    pub(super) rendezvous: Rendezvous,
    /// An empty file for the pages that the parent has written to.
    pub(super) delta: File,
    /// The page map in which they are found.
    pub(super) page_map: PageMap,
}

impl Supply {
    fn make() -> Result<Self, rendezvous::Error> {
        Ok(Self { rendezvous: Rendezvous::new()?, delta: memory::delta_file()?, page_map: PageMap::open()? })
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

    /// Makes one, unless there is one.
    pub(super) fn restock(&self) -> Result<(), rendezvous::Error> {
        if lock(&self.0).is_none() {
            let supply = Supply::make()?;
            supply.rendezvous.warm_up()?;
            *lock(&self.0) = Some(supply);
        }
        Ok(())
    }
}
