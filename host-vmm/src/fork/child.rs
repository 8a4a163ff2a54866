//! The other side of a fork: a shell becomes a child.

use std::{fs::File, sync::Arc};

use super::{
    rendezvous::{self, Rendezvous},
    signal::{self, Signal},
    timeline::Timeline,
};
use crate::{
    capsule,
    kvm::Vcpu,
    machine::{self, Machine, Shell, VmIdentity},
    wire::{Step, Timing},
};

/// Why a shell can't become a child.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The order came without the file to meet the parent in.
    #[error("the order to become a copy came without a rendezvous")]
    NoRendezvous,
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
    Signal(#[from] signal::Error),
}

/// A child that may run.
#[derive(Debug)]
pub struct Child {
    /// The machine.
    pub machine: Machine,
    /// Its vCPUs, lowest first.
    pub vcpus: Vec<Vcpu>,
    /// Its side of the fork.
    pub steps: Vec<Timing>,
    /// Where it met its parent: to be dropped when there is time for it.
    pub rendezvous: Rendezvous,
}

impl Child {
    /// Makes a child of `shell`: meets the parent, takes its state, and waits until it may run. `files` are the rendezvous, then those of
    /// the image; `is_alone` tells that nobody is there any more to wait for.
    ///
    /// # Errors
    /// [`Error`]; the parent has been told then.
    pub fn from_shell(
        shell: Shell,
        identity: VmIdentity,
        seq: u64,
        files: Vec<File>,
        console: File,
        is_alone: impl Fn() -> bool,
    ) -> Result<Self, Error> {
        let mut files = files.into_iter();
        let rendezvous = Rendezvous::open(files.next().ok_or(Error::NoRendezvous)?)?.with_children(identity.count);
        let files = files.map(Arc::new).collect();
        match Self::meet(&rendezvous, shell, identity, seq, files, console, is_alone) {
            Ok((machine, vcpus, steps)) => Ok(Self { machine, vcpus, steps, rendezvous }),
            Err(error) => {
                rendezvous.fail()?;
                Err(error)
            }
        }
    }

    fn meet(
        rendezvous: &Rendezvous,
        shell: Shell,
        identity: VmIdentity,
        seq: u64,
        files: Vec<Arc<File>>,
        console: File,
        is_alone: impl Fn() -> bool,
    ) -> Result<(Machine, Vec<Vcpu>, Vec<Timing>), Error> {
        let mut timeline = Timeline::new(None);
        let siblings = identity.count;
        let (state, image) = timeline.time(Step::HandOver, || -> Result<_, Error> {
            let state = rendezvous.wait_state(&is_alone)?;
            Ok(capsule::unpack(&state, &files)?)
        })?;
        let (machine, vcpus) =
            timeline.time(Step::Restore, || shell.restore(&state, Arc::new(image), identity, console))?;
        let signal = Signal::to_child(&machine, seq)?;
        timeline.time(Step::Launch, || {
            rendezvous.arrive(siblings)?;
            rendezvous.wait_commit(&is_alone)
        })?;
        timeline.time(Step::Thaw, || signal.give(&machine))?;
        Ok((machine, vcpus, timeline.into_steps()))
    }
}
