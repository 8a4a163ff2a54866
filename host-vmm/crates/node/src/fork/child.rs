//! The other side of a fork: a warm VM becomes a child.

use std::{fs::File, sync::Arc};

use base::threads;
use types::{ForkStep, StepTiming};
use vmm::{
    kvm::Vcpu,
    machine::{self, BlankMachine, Machine},
    memory::Faults,
};

use super::{
    rendezvous::{self, Rendezvous},
    role_signal::{self, RoleSignal},
    standby::CopySource,
    timeline::Timeline,
};
use crate::wire::{CopyOrder, Prefetch, link};

/// Why a warm VM can't become a child.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The order does not come.
    #[error("no order came from the platform")]
    Order(#[from] link::Error),
    /// The parent can't be met, or has called the fork off.
    #[error("can't meet the parent")]
    Rendezvous(#[from] rendezvous::Error),
    /// The state can't be unpacked.
    #[error("can't unpack the state")]
    Capsule(#[from] capsule::Error),
    /// The machine does not take the state.
    #[error("can't restore the machine")]
    Machine(#[from] machine::Error),
    /// The child can't be told who it is.
    #[error("can't signal the child's role")]
    Signal(#[from] role_signal::Error),
}

/// A child that may run.
#[derive(Debug)]
pub struct Child {
    /// The machine.
    pub machine: Machine,
    /// Its vCPUs, lowest first.
    pub vcpus: Vec<Vcpu>,
    /// Number of the request that it comes from.
    pub seq: u64,
    /// What it does about its first writes.
    pub working_set: Prefetch,
    /// Whether its first vCPU runs later than the others.
    pub first_vcpu_late: bool,
    /// Its side of the fork.
    pub steps: Vec<StepTiming>,
    /// Where it met its parent: to be dropped when there is time for it.
    pub rendezvous: Rendezvous,
}

impl Child {
    /// Makes a child of `blank`: meets the parent, takes its state, and waits until it may run. Where its
    /// memory is still being filled, `faults` tells the platform what it lacks. `order` gives the platform's
    /// order, or waits for it; `is_alone` tells that nobody is there any more to wait for.
    ///
    /// # Errors
    /// [`Error`]; the parent has been told then.
    pub fn from_blank(
        blank: BlankMachine,
        copy_source: CopySource,
        console: File,
        faults: Option<Faults>,
        order: impl FnOnce() -> Result<CopyOrder, link::Error>,
        is_alone: impl Fn() -> bool,
    ) -> Result<Self, Error> {
        let CopySource { rendezvous, files } = copy_source;
        let mut timeline = Timeline::new(None);
        match meet(&rendezvous, &files, blank, (console, faults), order, is_alone, &mut timeline) {
            Ok((machine, vcpus, CopyOrder { seq, working_set, first_vcpu_late, .. })) => {
                let steps = timeline.into_steps();
                Ok(Self { machine, vcpus, seq, working_set, first_vcpu_late, steps, rendezvous })
            }
            Err(error) => {
                rendezvous.fail()?;
                Err(error)
            }
        }
    }
}

fn meet(
    rendezvous: &Rendezvous,
    files: &[Arc<File>],
    blank: BlankMachine,
    (console, faults): (File, Option<Faults>),
    order: impl FnOnce() -> Result<CopyOrder, link::Error>,
    is_alone: impl Fn() -> bool,
    timeline: &mut Timeline,
) -> Result<(Machine, Vec<Vcpu>, CopyOrder), Error> {
    let (state, image) = timeline.time(ForkStep::HandOver, || -> Result<_, Error> {
        let state = rendezvous.wait_state(&is_alone)?;
        Ok(match faults {
            Some(_) => capsule::unpack_lazily(&state, files)?,
            None => capsule::unpack(&state, files)?,
        })
    })?;
    let anonymous =
        timeline.time(ForkStep::Restore, || blank.restore(&state, Arc::new(image), console, faults))?;
    let (machine, vcpus, signal, order) = timeline.time(ForkStep::Launch, || -> Result<_, Error> {
        let order = order()?;
        let (machine, vcpus) = anonymous.with_identity(order.identity.clone());
        let signal = RoleSignal::to_child(&machine)?;
        rendezvous.arrive(order.arrivals)?;
        // The platform has kept it off the parent's until now. While the parent takes note, there is time for
        // this.
        threads::use_all_processors();
        rendezvous.wait_commit(&is_alone)?;
        Ok((machine, vcpus, signal, order))
    })?;
    timeline.time(ForkStep::Thaw, || signal.give(&machine))?;
    Ok((machine, vcpus, order))
}
