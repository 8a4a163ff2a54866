//! One VM as a whole: built to boot or from an image, run, stopped, saved.

use std::sync::{Arc, Mutex};

use base::sync::lock;
use serde::{Deserialize, Serialize};
use types::{VmIdentity, VmShape};

mod blank;
mod exits;
mod run;
mod vcpu_barrier;
mod vm_switch;

pub use blank::{AnonymousMachine, BlankMachine, Error, HostHandles};
pub use exits::{Exits, FirstExit};
pub use run::{ServiceRequest, run};
pub use vcpu_barrier::{BarrierError, StoppedVcpus, VcpuBarrier};
pub use vm_switch::{RetiredVm, SpareVm, VmSwitch};

use crate::{
    devices::{ControlPage, ControlPageState, Devices, DevicesState},
    kvm::{Vcpu, VcpuState, VmHandle, VmState},
    memory::{self, Faults, GuestMemory},
};

/// A VM without its vCPUs, which belong to the threads that run them.
#[derive(Debug)]
pub struct Machine {
    /// Host descriptors that it was built with.
    pub handles: Arc<HostHandles>,
    /// What it was built as.
    pub config: VmShape,
    /// KVM's part.
    pub vm: Arc<VmHandle>,
    /// The guest's memory.
    pub memory: Mutex<GuestMemory>,
    /// The page by which the guest and this VMM speak.
    pub control_page: ControlPage,
    /// The devices.
    pub devices: Devices,
    /// The barrier that stops the vCPUs, and ends them.
    pub vcpu_barrier: VcpuBarrier,
    /// The VM in which it goes on once its memory is its own image.
    pub spare_vm: SpareVm,
    /// When it shows a sign of life.
    pub exits: Exits,
    /// How fast its time-stamp counters run, in kHz; `None` where nobody can tell.
    pub tsc_khz: Option<u32>,
    /// CLOCK_MONOTONIC_RAW of the host, in nanoseconds, when a copy's clocks began to go on from the capture;
    /// `None` in a booted VM.
    pub clock_began_ns: Option<u64>,
    /// Faults on pages that its memory lacks, for as long as that is being filled.
    pub faults: Mutex<Option<Faults>>,
    /// Who the VM is; changes when it becomes a parent.
    pub identity: Mutex<VmIdentity>,
}

impl Machine {
    /// Whether all of its memory is there.
    pub fn is_whole(&self) -> bool {
        lock(&self.faults).is_none()
    }

    /// Says that all of its memory is there: nobody has to deal with its faults any more.
    ///
    /// # Errors
    /// [`memory::Error::Faults`].
    pub fn become_whole(&self) -> Result<(), memory::Error> {
        // A fork that looks meanwhile waits: what it does with the memory comes after this.
        let mut faults = lock(&self.faults);
        if let Some(watched) = faults.take() {
            watched.unwatch(lock(&self.memory).mapping())?;
        }
        Ok(())
    }
}

/// A machine and its vCPUs, lowest first.
pub type Built = (Machine, Vec<Vcpu>);

/// State of a machine but its memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// How to build a machine that takes this state.
    pub config: VmShape,
    /// What the vCPUs share.
    pub vm: VmState,
    /// The vCPUs, lowest first.
    pub vcpus: Vec<VcpuState>,
    /// The devices.
    pub devices: DevicesState,
    /// What guest and VMM have said to each other.
    pub control_page: ControlPageState,
    /// How fast its time-stamp counters run, in kHz; `None` where nobody could tell.
    pub tsc_khz: Option<u32>,
    /// Names of the capabilities of KVM that its guest, or its state, may use, of those that not every host
    /// has.
    pub capabilities: Vec<String>,
}

#[cfg(any(test, feature = "samples"))]
impl MachineState {
    /// A state for tests that look at no part of it.
    pub fn blank() -> Self {
        Self {
            config: VmShape { ram_bytes: 40 * 4096, vcpus: 1 },
            vm: VmState::blank(),
            vcpus: vec![VcpuState::sample(Vec::new(), Vec::new(), 0, 0)],
            devices: DevicesState::power_on(),
            control_page: ControlPageState::default(),
            tsc_khz: None,
            capabilities: Vec::new(),
        }
    }
}
