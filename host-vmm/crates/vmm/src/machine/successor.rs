//! The parent as its own first child.
//!
//! A booted VM's memory is a file that it writes to. To make that file an image, the VM has to become a private view of it; and a VM
//! that has had much memory copied to an image is better off as a view of that. Changing
//! what is mapped at its addresses would make KVM take down every page that the guest has touched, one by one, while the guest
//! waits (measured: 3.6 ms for 500 MiB). So the machine goes on in a spare VM that stands ready, as its children do in theirs, and the
//! old VM is taken down when the guest runs again.

use std::{
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use base::sync::lock;

use super::{
    Error, Machine, MachineState, Stopped,
    shell::{Restored, Shell},
};
use crate::{
    kvm::{Time, Vcpu, Vm},
    memory::{Image, View},
};

/// The spare VM of a machine, which is being built or ready.
#[derive(Debug, Default)]
pub struct Spare(Mutex<Option<JoinHandle<Result<Shell, Error>>>>);

impl Spare {
    /// Begins to build one, unless there is one.
    pub fn prepare(&self, machine: &Arc<Machine>) {
        let mut spare = lock(&self.0);
        if spare.is_none() {
            let machine = Arc::clone(machine);
            let built = thread::Builder::new().name("spare".into()).spawn(move || Shell::build_spare(&machine));
            // Without it, the first fork builds its own.
            *spare = built.inspect_err(|error| tracing::warn!(%error, "can't start a thread for a spare VM")).ok();
        }
    }

    fn take(&self, machine: &Machine) -> Result<Shell, Error> {
        let ready = lock(&self.0).take().and_then(|spare| spare.join().ok());
        ready.unwrap_or_else(|| Shell::build_spare(machine))
    }
}

/// Where a machine is to go on. Dropping it leaves the machine where it is.
#[derive(Debug)]
#[must_use]
pub struct Successor(Restored);

impl Successor {
    /// Brings the machine's spare VM to where `state` and `image` were captured.
    ///
    /// # Errors
    /// [`Error`]: whatever does not take its state.
    pub fn prepare(machine: &Machine, state: &MachineState, image: &Arc<Image>) -> Result<Self, Error> {
        let shell = machine.spare.take(machine)?;
        Ok(Self(shell.take_state(state, Arc::clone(image), Time::Onward, None)?))
    }

    /// Makes the machine go on there, when `stopped` is dropped. `view` is its memory, and `vcpu` the caller's own vCPU.
    pub fn take_over(self, machine: &Machine, view: &mut View, vcpu: &mut Vcpu, stopped: &Stopped<'_>) -> LeftBehind {
        let Restored { vm, vcpus, memory, .. } = self.0;
        stopped.hand_on(vcpus, vcpu);
        LeftBehind { vm: machine.vm.replace(vm), view: std::mem::replace(view, memory) }
    }
}

/// The VM that a machine has left, and its writable mapping of what is an image now.
#[derive(Debug)]
#[must_use]
pub struct LeftBehind {
    vm: Arc<Vm>,
    view: View,
}

impl LeftBehind {
    /// Takes it down: then nobody can write to the image any more. It takes a while for a large memory.
    pub fn clear_away(self, machine: &Machine) {
        let Self { vm, view } = self;
        drop(machine.gate.take_left_behind());
        drop(vm);
        view.take_down();
    }
}
