//! Warm-up of the restore path: a warm VM does once what it will have to do fast.
//!
//! The first time that a process uses a page of its heap or stack costs it a page fault: 4 to 10 us each, and
//! 80 us in all between a child's order and its run (measured). So a warm VM that has nothing else to do
//! hands a state over to itself.

use std::{slice, sync::Arc, time::Duration};

use vmm::{
    machine::BlankMachine,
    memory::{self, Image, Layer},
};

use crate::fork::rendezvous::{self, Rendezvous};

/// Reasons for which a warm-up fails. A warm VM is as good without it, only slower.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("can't copy a descriptor")]
    Descriptor(#[from] std::io::Error),
    #[error("can't make an image")]
    Memory(#[from] memory::Error),
    #[error("can't meet itself")]
    Rendezvous(#[from] rendezvous::Error),
    #[error("can't pack and unpack a state")]
    Capsule(#[from] capsule::Error),
}

/// Hands the state of a blank machine over to this process itself.
pub(super) fn warm_up_restore(blank: &BlankMachine) -> Result<(), Error> {
    let Some(state) = blank.fresh_state() else { return Ok(()) };
    let file = Arc::new(memory::sealed("vm-warm-up", &[0; 4096])?);
    let image = Image::new(1, vec![Arc::new(Layer::whole(Arc::clone(&file), 1))])?;
    let parent = Rendezvous::new()?;
    parent.publish(&capsule::pack(&state, &image, slice::from_ref(&file))?)?;
    let child = Rendezvous::open(parent.file().try_clone()?)?;
    capsule::unpack(&child.wait_state(|| true)?, &[file])?;
    child.arrive(1)?;
    parent.wait_arrivals(1, Duration::ZERO, || true)?;
    parent.commit()?;
    child.wait_commit(|| true)?;
    Ok(())
}
