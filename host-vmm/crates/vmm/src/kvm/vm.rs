//! One KVM virtual machine: its memory slots, its interrupt controllers, its clock.

use std::sync::{Arc, PoisonError, RwLock};

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_READONLY,
    kvm_clock_data, kvm_enable_cap, kvm_irqchip, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use serde::{Deserialize, Serialize};
use vmfork_abi::doorbell;

use super::{ClockReading, Error, HostTime, Time, Vcpu, call, time::nanoseconds};
use crate::{
    arch::{
        VcpuId,
        layout::{Gpa, KVM_IDENTITY_MAP, KVM_TSS},
    },
    memory::Mapping,
};

/// The interrupt controllers that all vCPUs share.
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Most readings of a clock of which the one is taken that took the least time.
const READINGS: usize = 4;

/// Cycles of the host's time-stamp counter that a reading may take for no other to be tried: a microsecond or
/// less.
const QUICK_CYCLES: u64 = 2000;

/// Most attempts to set a clock that goes on with the host's.
const SETTINGS: usize = 4;

/// How far off it may be then, in nanoseconds.
const TOLERANCE_NS: u64 = 1000;

/// Most time in nanoseconds that setting a clock is taken to take: more is time in which this thread did not
/// run, and will not be the same again. It is less than any pause of a VM, so that no clock that is set too
/// early goes back when it is set again.
const MAX_LEAD_NS: i64 = 50_000;

/// A VM. It keeps the memory alive that it was given.
#[derive(Debug)]
pub struct Vm {
    fd: VmFd,
    memory: Vec<Arc<Mapping>>,
    /// What its interrupt controllers held by themselves.
    fresh: Option<[kvm_irqchip; 3]>,
}

/// The VM in which a machine runs at present. It becomes another one when the parent of a fork goes on as its
/// own first child.
#[derive(Debug)]
pub struct VmHandle(RwLock<Arc<Vm>>);

impl VmHandle {
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
    /// CLOCK_MONOTONIC_RAW of the host when the clock was read, in nanoseconds: what counts on this host
    /// alone.
    host_ns: u64,
    /// kvmclock, in nanoseconds since the VM's boot.
    clock_ns: u64,
    /// Both PICs and the I/O APIC, in the order of [`IRQCHIPS`].
    irqchips: [kvm_irqchip; 3],
}

impl VmState {
    /// kvmclock in nanoseconds.
    pub fn clock_ns(&self) -> u64 {
        self.clock_ns
    }
}

#[cfg(any(test, feature = "samples"))]
impl VmState {
    /// A state for tests that look at no part of it.
    pub fn blank() -> Self {
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
    /// Call it before [`Vm::create_irqchip`]: that registers I/O buses with a plain `call_srcu`, and a change
    /// of the memory slots then waits for its grace period (measured: 5 to 12 ms instead of 0.1 ms).
    ///
    /// # Errors
    /// [`Error::Slot`] or [`Error::Call`].
    pub fn map(
        &mut self,
        slot: u32,
        gpa: Gpa,
        mapping: &Arc<Mapping>,
        offset: u64,
        bytes: u64,
    ) -> Result<(), Error> {
        self.map_with(0, (slot, gpa), mapping, offset, bytes)
    }

    /// As [`Vm::map`], for the guest to read alone (KVM_MEM_READONLY): its writes are exits.
    ///
    /// # Errors
    /// As there.
    pub fn map_read_only(
        &mut self,
        slot: u32,
        gpa: Gpa,
        mapping: &Arc<Mapping>,
        offset: u64,
        bytes: u64,
    ) -> Result<(), Error> {
        self.map_with(KVM_MEM_READONLY, (slot, gpa), mapping, offset, bytes)
    }

    fn map_with(
        &mut self,
        flags: u32,
        (slot, gpa): (u32, Gpa),
        mapping: &Arc<Mapping>,
        offset: u64,
        bytes: u64,
    ) -> Result<(), Error> {
        if offset.checked_add(bytes).is_none_or(|end| end > mapping.bytes() as u64) {
            return Err(Error::Slot { slot });
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa.0,
            memory_size: bytes,
            userspace_addr: mapping.start().as_ptr() as u64 + offset,
        };
        // SAFETY: the range lies in the mapping (checked above), which stays reserved while `self.memory`
        // holds it; `fd` is dropped before that, and Rust code has no reference into it.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        self.memory.push(Arc::clone(mapping));
        Ok(())
    }

    /// Makes both PICs, the I/O APIC, and a local APIC for each vCPU to come (KVM_CREATE_IRQCHIP). There is
    /// no PIT: guests use the local APIC's timer, and a PIT costs 15 ms when the VM ends (measured).
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

    /// Lets the one hypercall through to [`Exit::Hypercall`](super::Exit::Hypercall) that KVM can hand on,
    /// where this kernel can (KVM_CAP_EXIT_HYPERCALL, Linux 5.14). Without it guests have the port only.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn enable_hypercall(&self) -> Result<(), Error> {
        if !self.can_exit_on_hypercall() {
            tracing::info!(
                "this kernel's KVM lacks KVM_CAP_EXIT_HYPERCALL: guests can fork by the port only"
            );
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
        // KVM_CAP_XSAVE2 is the size of the XSAVE area in bytes where that can be more than the 4 KiB of
        // KVM_GET_XSAVE.
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

    /// Reads the state, and says when the clock in it was read. All vCPUs must be stopped.
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn save(&self) -> Result<(VmState, HostTime), Error> {
        let ClockReading { clock_ns, host } = self.read_clock()?;
        Ok((VmState { host_ns: host.raw_ns, clock_ns, irqchips: self.save_irqchips()? }, host))
    }

    /// Reads kvmclock (KVM_GET_CLOCK) together with the host's clocks. Where KVM does not say to which count
    /// of the host's time-stamp counter the time belongs, as where the host's own clock is not based on that,
    /// the counter is read before and after.
    fn read_clock(&self) -> Result<ClockReading, Error> {
        let mut best = self.read_clock_once()?;
        for _ in 1..READINGS {
            if best.0 <= QUICK_CYCLES {
                break;
            }
            let next = self.read_clock_once()?;
            if next.0 < best.0 {
                best = next;
            }
        }
        Ok(best.1)
    }

    /// A reading, and by how many cycles of the host's time-stamp counter it is uncertain.
    fn read_clock_once(&self) -> Result<(u64, ClockReading), Error> {
        let before = HostTime::now();
        let clock = self.fd.get_clock().map_err(call("KVM_GET_CLOCK"))?;
        let after = HostTime::now();
        let took = after.tsc.saturating_sub(before.tsc);
        let is_exact = clock.flags & KVM_CLOCK_HOST_TSC != 0;
        let (uncertain, tsc) =
            if is_exact { (0, clock.host_tsc) } else { (took, before.tsc.wrapping_add(took / 2)) };
        Ok((uncertain, ClockReading { clock_ns: clock.clock, host: HostTime::between(before, after, tsc) }))
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
    /// kvmclock is set too, and read again: the time-stamp counters of the vCPUs have to be set by that
    /// ([`set_counters`](super::set_counters)).
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn restore(&self, state: &VmState, time: Time) -> Result<ClockReading, Error> {
        for (index, (irqchip, chip_id)) in state.irqchips.iter().zip(IRQCHIPS).enumerate() {
            let irqchip = kvm_irqchip { chip_id, ..*irqchip };
            if self.fresh.as_ref().is_some_and(|fresh| content(&fresh[index]) == content(&irqchip)) {
                continue;
            }
            self.fd.set_irqchip(&irqchip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        let after_ns = |passed_ns: u64| state.clock_ns.saturating_add(passed_ns);
        match time {
            Time::FromCapture => {
                self.set_clock(state.clock_ns)?;
                self.read_clock()
            }
            Time::Continuous => {
                self.have_clock_follow(|host| after_ns(host.raw_ns.saturating_sub(state.host_ns)))
            }
            Time::WithTsc { captured, khz } => {
                self.have_clock_follow(|host| after_ns(nanoseconds(host.tsc.saturating_sub(captured), khz)))
            }
        }
    }

    /// Sets kvmclock to what it should be by the host's clocks. The time takes effect at some instant within
    /// the call, which comes later than the one that it was worked out for: how much, the reading behind it
    /// tells, and the next attempt makes up for it.
    fn have_clock_follow(&self, expected: impl Fn(HostTime) -> u64) -> Result<ClockReading, Error> {
        let mut lead_ns = 0_i64;
        let mut left = SETTINGS;
        loop {
            self.set_clock(expected(HostTime::now()).saturating_add_signed(lead_ns))?;
            let reading = self.read_clock()?;
            let behind_ns = expected(reading.host).wrapping_sub(reading.clock_ns).cast_signed();
            left -= 1;
            if behind_ns.unsigned_abs() <= TOLERANCE_NS || left == 0 {
                return Ok(reading);
            }
            if behind_ns.unsigned_abs() <= MAX_LEAD_NS.unsigned_abs() {
                lead_ns = (lead_ns + behind_ns).clamp(0, MAX_LEAD_NS);
            }
        }
    }

    fn set_clock(&self, clock_ns: u64) -> Result<(), Error> {
        let clock = kvm_clock_data { clock: clock_ns, ..Default::default() };
        self.fd.set_clock(&clock).map_err(call("KVM_SET_CLOCK"))
    }
}

/// All that KVM tells of an interrupt controller.
fn content(irqchip: &kvm_irqchip) -> &[i8] {
    // SAFETY: every variant of the union is plain bytes, and `dummy` is as long as the union.
    let bytes = unsafe { &irqchip.chip.dummy };
    bytes.as_slice()
}
