//! One KVM virtual machine: its memory slots, its interrupt controllers, its clock.

use std::sync::{Arc, PoisonError, RwLock};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_enable_cap, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};
use vmfork_abi::doorbell;

use super::{Error, Time, Vcpu, VcpuId, call};
use crate::{
    arch::layout::{Gpa, KVM_IDENTITY_MAP, KVM_TSS},
    clock::monotonic_ns,
    memory::Mapping,
};

/// The interrupt controllers that all vCPUs share.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// A VM. It keeps the memory alive that it was given.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    memory: Vec<Arc<Mapping>>,
    /// What its interrupt controllers held by themselves.
    fresh: Option<[kvm_irqchip; 3]>,
}

/// The VM in which a machine runs at present. It becomes another one when the parent of a fork goes on as its own first child.
#[derive(Debug)]
pub struct CurrentVm(RwLock<Arc<Vm>>);

impl CurrentVm {
    /// It is `vm` at first.
    pub fn new(vm: Vm) -> Self {
        Self(RwLock::new(Arc::new(vm)))
    }

    /// The VM.
    pub fn get(&self) -> Arc<Vm> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Makes it `vm`, and gives back what it was.
    pub fn replace(&self, vm: Vm) -> Arc<Vm> {
        std::mem::replace(&mut self.0.write().unwrap_or_else(PoisonError::into_inner), Arc::new(vm))
    }
}

/// State of a VM that belongs to no single vCPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    /// CLOCK_MONOTONIC of the host when the clock was read, in nanoseconds.
    host_ns: u64,
    /// kvmclock, in nanoseconds since the VM's boot.
    clock_ns: u64,
    /// Both PICs and the I/O APIC, in the order of [`IRQCHIPS`].
    irqchips: [kvm_irqchip; 3],
}

#[cfg(test)]
impl VmState {
    /// A state for tests that look at no part of it.
    pub(crate) fn blank() -> Self {
        Self { host_ns: 0, clock_ns: 0, irqchips: Default::default() }
    }
}

impl Vm {
    pub(super) fn new(fd: VmFd) -> Result<Self, Error> {
        let address = usize::try_from(KVM_TSS.0).map_err(|_| Error::Missing("a 64-bit address space"))?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP.0).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(address).map_err(call("KVM_SET_TSS_ADDR"))?;
        Ok(Self { fd, memory: Vec::new(), fresh: None })
    }

    /// Shows `bytes` bytes from `offset` of a mapping to the guest at `gpa` (KVM_SET_USER_MEMORY_REGION).
    ///
    /// Call it before [`Vm::create_irqchip`]: that registers I/O buses with a plain `call_srcu`, and a change of the memory
    /// slots then waits for its grace period (measured: 5 to 12 ms instead of 0.1 ms).
    ///
    /// # Errors
    /// [`Error::Slot`] or [`Error::Call`].
    pub fn map(&mut self, slot: u32, gpa: Gpa, mapping: &Arc<Mapping>, offset: u64, bytes: u64) -> Result<(), Error> {
        if offset.checked_add(bytes).is_none_or(|end| end > mapping.bytes() as u64) {
            return Err(Error::Slot { slot });
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: gpa.0,
            memory_size: bytes,
            userspace_addr: mapping.start().as_ptr() as u64 + offset,
        };
        // SAFETY: the range lies in the mapping (checked above), which stays reserved while `self.memory` holds it; `fd` is
        // dropped before that, and Rust code has no reference into it.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        self.memory.push(Arc::clone(mapping));
        Ok(())
    }

    /// Makes both PICs, the I/O APIC, and a local APIC for each vCPU to come (KVM_CREATE_IRQCHIP). There is no PIT: guests use
    /// the local APIC's timer, and a PIT costs 15 ms when the VM ends (measured).
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn create_irqchip(&self) -> Result<(), Error> {
        self.fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))
    }

    /// Whether this kernel says that it can hand a hypercall on.
    pub(super) fn can_exit_on_hypercall(&self) -> bool {
        self.fd.check_extension(Cap::ExitHypercall)
    }

    /// Lets the one hypercall through to [`Exit::Hypercall`](super::Exit::Hypercall) that KVM can hand on, where this kernel can (KVM_CAP_EXIT_HYPERCALL, Linux
    /// 5.14). Without it guests have the port only.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn enable_hypercall(&self) -> Result<(), Error> {
        if !self.can_exit_on_hypercall() {
            tracing::info!("this kernel's KVM lacks KVM_CAP_EXIT_HYPERCALL: guests can fork by the port only");
            return Ok(());
        }
        let cap = kvm_enable_cap {
            cap: Cap::ExitHypercall as u32,
            args: [1 << doorbell::HYPERCALL, 0, 0, 0],
            ..Default::default()
        };
        self.fd.enable_cap(&cap).map_err(call("KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL)"))
    }

    /// Makes a vCPU (KVM_CREATE_VCPU).
    ///
    /// # Errors
    /// [`Error::Call`] or [`Error::VcpuCall`].
    pub fn create_vcpu(&self, id: VcpuId) -> Result<Vcpu, Error> {
        let fd = self.fd.create_vcpu(u64::from(id.0)).map_err(call("KVM_CREATE_VCPU"))?;
        // KVM_CAP_XSAVE2 is the size of the XSAVE area in bytes where that can be more than the 4 KiB of KVM_GET_XSAVE.
        let xsave_bytes = usize::try_from(self.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let has_xcrs = self.fd.check_extension(Cap::Xcrs);
        Vcpu::new(id, fd, self.fd.run_size(), xsave_bytes, has_xcrs)
    }

    /// Raises and lowers an interrupt line: one edge (KVM_IRQ_LINE).
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn pulse(&self, gsi: u32) -> Result<(), Error> {
        self.fd.set_irq_line(gsi, true).map_err(call("KVM_IRQ_LINE"))?;
        self.fd.set_irq_line(gsi, false).map_err(call("KVM_IRQ_LINE"))
    }

    /// Reads the state. All vCPUs must be stopped.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn save(&self) -> Result<VmState, Error> {
        let host_ns = monotonic_ns();
        let clock = self.fd.get_clock().map_err(call("KVM_GET_CLOCK"))?;
        Ok(VmState { host_ns, clock_ns: clock.clock, irqchips: self.save_irqchips()? })
    }

    fn save_irqchips(&self) -> Result<[kvm_irqchip; 3], Error> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (irqchip, chip_id) in irqchips.iter_mut().zip(IRQCHIPS) {
            irqchip.chip_id = chip_id;
            self.fd.get_irqchip(irqchip).map_err(call("KVM_GET_IRQCHIP"))?;
        }
        Ok(irqchips)
    }

    /// Gets ready to take a state: remembers what the VM holds by itself.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn settle(&mut self) -> Result<(), Error> {
        self.fresh = Some(self.save_irqchips()?);
        Ok(())
    }

    /// Writes the state into a VM whose vCPUs have run no guest code yet. What it holds already is left out.
    ///
    /// A child's clock goes on from the instant of the capture, as if no time had passed, since the TSC and the local APIC timers
    /// do the same; what the guest's wall clock missed, the control page tells it.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn restore(&self, state: &VmState, time: Time) -> Result<(), Error> {
        for (index, (irqchip, chip_id)) in state.irqchips.iter().zip(IRQCHIPS).enumerate() {
            let irqchip = kvm_irqchip { chip_id, ..*irqchip };
            if self.fresh.as_ref().is_some_and(|fresh| content(&fresh[index]) == content(&irqchip)) {
                continue;
            }
            self.fd.set_irqchip(&irqchip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        let passed_ns = match time {
            Time::FromCapture => 0,
            Time::Onward => monotonic_ns().saturating_sub(state.host_ns),
        };
        let clock = kvm_clock_data { clock: state.clock_ns.saturating_add(passed_ns), ..Default::default() };
        self.fd.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
    }
}

/// All that KVM tells of an interrupt controller.
fn content(irqchip: &kvm_irqchip) -> &[i8] {
    // SAFETY: every variant of the union is plain bytes, and `dummy` is as long as the union.
    let bytes = unsafe { &irqchip.chip.dummy };
    bytes.as_slice()
}
