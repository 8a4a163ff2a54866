//! One VM as a whole: built to boot or from an image, run, stopped, saved.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

mod build;
mod gate;
mod identity;
mod run;

pub use build::{Config, Error, boot, restore};
pub use gate::{End, Gate, GateError, Stopped};
pub use identity::VmIdentity;
pub use run::run;

use crate::{
    devices::{ControlPage, Devices, DevicesState},
    kvm::{Vcpu, VcpuState, Vm, VmState},
    memory::View,
};

/// A VM without its vCPUs, which belong to the threads that run them.
#[derive(Debug)]
pub struct Machine {
    /// What it was built as.
    pub config: Config,
    /// KVM's part.
    pub vm: Arc<Vm>,
    /// The guest's memory.
    pub memory: Mutex<View>,
    /// The page by which the guest and this VMM speak.
    pub control_page: ControlPage,
    /// The devices.
    pub devices: Devices,
    /// What stops the vCPUs, and ends them.
    pub gate: Gate,
    /// Who the VM is; changes when it becomes a parent.
    pub identity: Mutex<VmIdentity>,
}

/// A machine and its vCPUs, lowest first.
pub type Built = (Machine, Vec<Vcpu>);

/// State of a machine but its memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// How to build a machine that takes this state.
    pub config: Config,
    /// What the vCPUs share.
    pub vm: VmState,
    /// The vCPUs, lowest first.
    pub vcpus: Vec<VcpuState>,
    /// The devices.
    pub devices: DevicesState,
}
