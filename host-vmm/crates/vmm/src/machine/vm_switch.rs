//! The switch of a running machine to another KVM VM: the parent becomes its own first child.
//!
//! A booted VM's memory is a file that it writes to. To make that file an image, the VM has to become a
//! private view of it; and a VM that has had much memory copied to an image is better off as a view of that.
//! Changing what is mapped at its addresses would make KVM take down every page that the guest has touched,
//! one by one, while the guest waits (measured: 3.6 ms for 500 MiB). So the machine goes on in a spare VM
//! that stands ready, as its children do in theirs, and the old VM is taken down when the guest runs again.

use std::{
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
};

use base::sync::lock;

use super::{
    Error, Machine, MachineState, StoppedVcpus,
    blank::{BlankMachine, RestoredVm},
};
use crate::{
    kvm::{Time, Vcpu, Vm},
    memory::{GuestMemory, Image},
};

/// The spare VM of a machine, which is being built or ready.
#[derive(Debug, Default)]
pub struct SpareVm(Mutex<Option<JoinHandle<Result<BlankMachine, Error>>>>);

impl SpareVm {
    /// Begins to build one, unless there is one.
    pub fn prepare(&self, machine: &Arc<Machine>) {
        let mut spare = lock(&self.0);
        if spare.is_none() {
            let machine = Arc::clone(machine);
            let built = thread::Builder::new()
                .name("spare".into())
                .spawn(move || BlankMachine::build_spare(&machine));
            // Without it, the first fork builds its own.
            *spare =
                built.inspect_err(|error| tracing::warn!(%error, "can't start a thread for a spare VM")).ok();
        }
    }

    fn take(&self, machine: &Machine) -> Result<BlankMachine, Error> {
        let ready = lock(&self.0).take().and_then(|spare| spare.join().ok());
        ready.unwrap_or_else(|| BlankMachine::build_spare(machine))
    }
}

/// A switch of a machine to its spare VM, prepared. Dropping it leaves the machine where it is.
#[derive(Debug)]
#[must_use]
pub struct VmSwitch(RestoredVm);

impl VmSwitch {
    /// Brings the machine's spare VM to where `state` and `image` were captured.
    ///
    /// # Errors
    /// [`Error`]: whatever does not take its state.
    pub fn prepare(machine: &Machine, state: &MachineState, image: &Arc<Image>) -> Result<Self, Error> {
        let blank = machine.spare_vm.take(machine)?;
        Ok(Self(blank.take_state(state, Arc::clone(image), Time::Continuous, None)?))
    }

    /// Makes the machine go on there, when `stopped` is dropped. `memory` is its memory, and `vcpu` the
    /// caller's own vCPU.
    pub fn take_over(
        self,
        machine: &Machine,
        memory: &mut GuestMemory,
        vcpu: &mut Vcpu,
        stopped: &StoppedVcpus<'_>,
    ) -> RetiredVm {
        let RestoredVm { vm, vcpus, memory: restored, .. } = self.0;
        stopped.replace_vcpus(vcpus, vcpu);
        RetiredVm { vm: machine.vm.replace(vm), memory: std::mem::replace(memory, restored) }
    }
}

/// The KVM VM that a machine has left, and its writable mapping of what is an image now.
#[derive(Debug)]
#[must_use]
pub struct RetiredVm {
    vm: Arc<Vm>,
    memory: GuestMemory,
}

impl RetiredVm {
    /// Takes it down: then nobody can write to the image any more. It takes a while for a large memory.
    pub fn take_down(self, machine: &Machine) {
        let Self { vm, memory } = self;
        drop(machine.vcpu_barrier.take_retired());
        drop(vm);
        memory.take_down();
    }
}
