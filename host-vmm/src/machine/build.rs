//! Building a machine: to boot, or as a copy.

use std::{
    fs::File,
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};

use super::{Built, Gate, Machine, MachineState, VmIdentity};
use crate::{
    arch::{
        cpuid,
        layout::{CONTROL_PAGE, PAGE_BYTES, ram_pieces},
        regs,
    },
    boot::{self, Payload},
    devices::{self, ControlPage, Devices},
    kvm::{self, Hypervisor, Vcpu, VcpuId, Vm},
    memory::{self, Image, View},
};

/// What a machine is built as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Guest memory in bytes, a multiple of the page size.
    pub ram_bytes: u64,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
}

/// Why a machine can't be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error("can't build the VM")]
    Kvm(#[from] kvm::Error),
    /// The memory could not be made or mapped.
    #[error("can't build the VM's memory")]
    Memory(#[from] memory::Error),
    /// The kernel can't be booted.
    #[error("can't boot the kernel")]
    Boot(#[from] boot::Error),
    /// A device can't take its state.
    #[error("can't restore a device")]
    Device(#[from] devices::Error),
    /// State and image don't fit together.
    #[error("the state is not one of this image: {0}")]
    Mismatch(&'static str),
}

/// Builds a machine at the entry of a kernel. Its console writes to `console`.
///
/// # Errors
/// [`Error`]: whatever could not be made.
pub fn boot(config: Config, payload: &mut Payload, identity: VmIdentity, console: File) -> Result<Built, Error> {
    let hypervisor = Hypervisor::open()?;
    let memory = View::fresh(config.ram_bytes)?;
    let file = memory.own_file().ok_or(Error::Mismatch("a booted VM's memory is its own"))?;
    let entry = boot::load(payload, file, config.ram_bytes, config.vcpus)?;
    let (vm, control_page, mut vcpus) = assemble(&hypervisor, config, &memory)?;

    let supported = hypervisor.supported_cpuid()?;
    let shape = cpuid::Shape { vcpus: config.vcpus, tsc_deadline_timer: hypervisor.has_tsc_deadline_timer() };
    let msrs = hypervisor.msr_indices()?;
    for vcpu in &mut vcpus {
        vcpu.set_model(cpuid::for_vcpu(&supported, shape, vcpu.id()), &msrs)?;
    }
    // The others wait to be started by the first one.
    if let Some(first) = vcpus.first() {
        first.set_entry(&regs::entry(entry), regs::entry_system, &regs::entry_msrs())?;
    }
    let devices = Devices::new(&vm, console);
    Ok(finish(config, vm, memory, control_page, devices, identity, vcpus))
}

/// Builds a machine that goes on where `state` and `image` were captured.
///
/// # Errors
/// [`Error`]: whatever could not be made or does not take its state.
pub fn restore(state: &MachineState, image: Arc<Image>, identity: VmIdentity, console: File) -> Result<Built, Error> {
    let config = state.config;
    if image.pages().checked_mul(PAGE_BYTES) != Some(config.ram_bytes) {
        return Err(Error::Mismatch("the memory has another size"));
    }
    if state.vcpus.len() != usize::from(config.vcpus) {
        return Err(Error::Mismatch("the number of vCPUs differs"));
    }
    let hypervisor = Hypervisor::open()?;
    let memory = View::of_image(image)?;
    let (vm, control_page, mut vcpus) = assemble(&hypervisor, config, &memory)?;
    vm.restore(&state.vm)?;
    for (vcpu, state) in vcpus.iter_mut().zip(&state.vcpus) {
        vcpu.restore(state)?;
    }
    let devices = Devices::restore(&state.devices, &vm, console)?;
    Ok(finish(config, vm, memory, control_page, devices, identity, vcpus))
}

/// Makes the VM, its memory slots, its interrupt controllers and its vCPUs, in the order that costs no waiting (see [`Vm::map`]).
fn assemble(
    hypervisor: &Hypervisor,
    config: Config,
    memory: &View,
) -> Result<(Arc<Vm>, ControlPage, Vec<Vcpu>), Error> {
    let mut vm = hypervisor.create_vm()?;
    let control_page = ControlPage::new()?;
    vm.map(0, CONTROL_PAGE, control_page.mapping(), 0, PAGE_BYTES)?;
    for (slot, piece) in (1..).zip(ram_pieces(config.ram_bytes)) {
        vm.map(slot, piece.gpa, memory.mapping(), piece.offset, piece.bytes)?;
    }
    vm.create_irqchip()?;
    vm.enable_hypercall()?;
    let vcpus = (0..config.vcpus).map(|id| vm.create_vcpu(VcpuId(id))).collect::<Result<_, _>>()?;
    Ok((Arc::new(vm), control_page, vcpus))
}

fn finish(
    config: Config,
    vm: Arc<Vm>,
    memory: View,
    control_page: ControlPage,
    devices: Devices,
    identity: VmIdentity,
    vcpus: Vec<Vcpu>,
) -> Built {
    let gate = Gate::new(&vcpus);
    let memory = Mutex::new(memory);
    (Machine { config, vm, memory, control_page, devices, gate, identity: Mutex::new(identity) }, vcpus)
}
