//! One vCPU: set up for boot, run, saved and restored.

use std::io;

use kvm_bindings::{CpuId, Msrs};
use kvm_ioctls::VcpuFd;

use super::{Error, Exit, HostModel, HostTime, Kicker, VcpuState, calls};
use crate::arch::{
    CpuidEntry, Registers, SystemRegisters, VcpuId, features,
    layout::Gpa,
    leaf,
    msr::{self, Msr},
};

/// Most registers for one KVM_GET_MSRS or KVM_SET_MSRS; the kernel's own limit is 256.
const MSR_CHUNK: usize = 200;

/// A vCPU. It belongs to one thread at a time.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) id: VcpuId,
    pub(super) fd: VcpuFd,
    /// Size of the XSAVE area in bytes where KVM_GET_XSAVE2 is needed for it, or 0.
    pub(super) xsave_bytes: usize,
    /// Whether there are extended control registers: a host without XSAVE has none.
    pub(super) has_xcrs: bool,
    /// What CPUID shows.
    pub(super) cpuid: Vec<CpuidEntry>,
    /// The model-specific registers that are part of the state.
    pub(super) msrs: Vec<u32>,
    /// What it held by itself, until a state is written into it.
    pub(super) fresh: Option<Box<VcpuState>>,
    /// Whether its time-stamp counter can be shifted against the host's.
    tsc_shift: bool,
    /// IA32_MCG_CAP.
    pub(super) mcg_cap: u64,
    kicker: Kicker,
}

impl Vcpu {
    pub(super) fn new(
        id: VcpuId,
        fd: VcpuFd,
        run_bytes: usize,
        xsave_bytes: usize,
        has_xcrs: bool,
    ) -> Result<Self, Error> {
        let kicker = Kicker::new(id, &fd, run_bytes)?;
        let (cpuid, msrs) = (Vec::new(), Vec::new());
        let (tsc_shift, mcg_cap) = (true, msr::MCG_CAP_OF_KVM);
        Ok(Self { id, fd, xsave_bytes, has_xcrs, cpuid, msrs, fresh: None, tsc_shift, mcg_cap, kicker })
    }

    /// Which vCPU this is.
    pub fn id(&self) -> VcpuId {
        self.id
    }

    /// A handle with which other threads can stop this vCPU.
    pub fn kicker(&self) -> &Kicker {
        &self.kicker
    }

    /// Makes this a processor that shows `cpuid`, and whose state includes those of the host's registers that
    /// it has. One that only describes the CPU, and of which a guest can't know, is none of them: KVM lets it
    /// be read nevertheless, but perhaps not be written.
    ///
    /// # Errors
    /// [`Error::VcpuCall`] or [`Error::Unfit`].
    pub fn set_model(&mut self, cpuid: Vec<CpuidEntry>, model: &HostModel) -> Result<(), Error> {
        let leaves = leaf::leaves(&cpuid);
        self.set_cpuid(cpuid)?;
        self.tsc_shift = model.tsc_shift;
        if model.mce_banks {
            self.setup_mce(msr::MCG_CAP_AT_BOOT)?;
        }
        let shown = model.msrs.iter().copied().filter(|index| features::is_msr_shown(*index, &leaves));
        let shown = shown.filter(|index| msr::is_in_banks(*index, self.mcg_cap));
        self.msrs = self.readable_msrs(&shown.collect::<Vec<_>>())?;
        Ok(())
    }

    /// Says what its machine-check registers are, which resets them (KVM_X86_SETUP_MCE).
    pub(super) fn setup_mce(&mut self, mcg_cap: u64) -> Result<(), Error> {
        calls::setup_mce(&self.fd, mcg_cap).map_err(self.call("KVM_X86_SETUP_MCE"))?;
        self.mcg_cap = mcg_cap;
        Ok(())
    }

    /// Sets what CPUID shows (KVM_SET_CPUID2). Comes before everything else: what KVM accepts depends on it.
    pub(super) fn set_cpuid(&mut self, entries: Vec<CpuidEntry>) -> Result<(), Error> {
        let unfit = |_| Error::Unfit { vcpu: self.id, what: "too many CPUID leaves" };
        let cpuid = CpuId::from_entries(&entries).map_err(unfit)?;
        self.fd.set_cpuid2(&cpuid).map_err(self.call("KVM_SET_CPUID2"))?;
        self.cpuid = entries;
        Ok(())
    }

    /// Puts the vCPU at the entry of a kernel.
    ///
    /// # Errors
    /// [`Error::VcpuCall`].
    pub fn set_entry(
        &self,
        registers: &Registers,
        system: impl FnOnce(SystemRegisters) -> SystemRegisters,
    ) -> Result<(), Error> {
        let sregs = self.fd.get_sregs().map_err(self.call("KVM_GET_SREGS"))?;
        self.fd.set_sregs(&system(sregs)).map_err(self.call("KVM_SET_SREGS"))?;
        self.fd.set_regs(registers).map_err(self.call("KVM_SET_REGS"))
    }

    /// Runs guest code until an exit (KVM_RUN). The exit is complete, and the state consistent, only after
    /// the next run or [`Vcpu::complete_exit`].
    ///
    /// # Errors
    /// [`Error::VcpuCall`] where KVM refuses to run the vCPU.
    pub fn run(&mut self) -> Result<Exit<'_>, Error> {
        let vcpu = self.id;
        match self.fd.run() {
            Ok(exit) => Ok(exit.into()),
            // EAGAIN: an application processor that still waits to be started was woken.
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => Ok(Exit::Interrupted),
            Err(errno) => Err(Error::VcpuCall { vcpu, call: "KVM_RUN", source: errno.into() }),
        }
    }

    /// Completes a pending exit without running guest code, so that the state can be read (kernel
    /// documentation, virt/kvm/api.rst, KVM_RUN: for port I/O, MMIO and hypercalls the state is only then
    /// consistent).
    ///
    /// # Errors
    /// [`Error::VcpuCall`], also where KVM does anything but return at once.
    pub fn complete_exit(&mut self) -> Result<(), Error> {
        self.kicker.arm();
        let vcpu = self.id;
        match self.run()? {
            Exit::Interrupted => Ok(()),
            other => {
                let source =
                    io::Error::other(format!("unexpected exit while completing the last one: {other:?}"));
                Err(Error::VcpuCall { vcpu, call: "KVM_RUN", source })
            }
        }
    }

    /// Runs one instruction, a port write at `code`, and puts the registers back: what KVM makes on a vCPU's
    /// first run is there then (on Linux 6.18, a kernel task, and where it shadows page tables, 80 pages for
    /// that; measured: 110 us).
    ///
    /// To be called on the thread that runs the vCPU later: up to Linux 6.11 a change of threads waits for an
    /// RCU grace period.
    ///
    /// # Errors
    /// [`Error::VcpuCall`], also where the instruction is anything but a port write.
    pub fn warm_up(&mut self, code: Gpa) -> Result<(), Error> {
        let before = self.fd.get_regs().map_err(self.call("KVM_GET_REGS"))?;
        let before_system = self.fd.get_sregs().map_err(self.call("KVM_GET_SREGS"))?;
        // In real mode, as after a reset, but with a code segment that begins there.
        let mut system = before_system;
        system.cs.base = code.0;
        self.fd.set_sregs(&system).map_err(self.call("KVM_SET_SREGS"))?;
        self.fd.set_regs(&Registers { rip: 0, ..before }).map_err(self.call("KVM_SET_REGS"))?;
        let vcpu = self.id;
        match self.run()? {
            Exit::PortWrite { .. } => {}
            other => {
                let source = io::Error::other(format!("unexpected exit while warming up: {other:?}"));
                return Err(Error::VcpuCall { vcpu, call: "KVM_RUN", source });
            }
        }
        self.complete_exit()?;
        self.kicker.clear();
        self.fd.set_sregs(&before_system).map_err(self.call("KVM_SET_SREGS"))?;
        self.fd.set_regs(&before).map_err(self.call("KVM_SET_REGS"))
    }

    /// Tells the guest that it was stopped, so that its watchdogs don't take the pause for a lockup
    /// (KVM_KVMCLOCK_CTRL).
    ///
    /// # Errors
    /// [`Error::VcpuCall`]; a guest that does not use kvmclock (EINVAL) has nothing to be told and is no
    /// error.
    pub fn tell_paused(&self) -> Result<(), Error> {
        match self.fd.kvmclock_ctrl() {
            Err(errno) if errno.errno() == libc::EINVAL => Ok(()),
            result => result.map_err(self.call("KVM_KVMCLOCK_CTRL")),
        }
    }

    /// Has the time-stamp counter count at `khz` (KVM_SET_TSC_KHZ), which the host's does not: as fast as on
    /// the host where a guest was captured, which has measured it there. Comes before
    /// [`set_counters`](super::set_counters). Within KVM's tolerance (250 ppm) nothing changes but what
    /// kvmclock tells.
    ///
    /// # Errors
    /// [`Error::VcpuCall`], as where this host can't scale the counter
    /// ([`HostModel::tsc_scaling`](super::HostModel::tsc_scaling)) and counts otherwise.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Error> {
        self.fd.set_tsc_khz(khz).map_err(self.call("KVM_SET_TSC_KHZ"))
    }

    /// Guest's time-stamp counter less the host's, in the guest's units; 0 where it can't be anything else.
    pub(super) fn tsc_offset(&self) -> Result<u64, Error> {
        if !self.tsc_shift {
            return Ok(0);
        }
        calls::tsc_offset(&self.fd).map_err(self.call("KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"))
    }

    /// Sets what [`Vcpu::tsc_offset`] gives. Where that can't be anything but 0, nothing happens.
    pub(super) fn set_tsc_offset(&self, offset: u64) -> Result<(), Error> {
        if !self.tsc_shift {
            return Ok(());
        }
        calls::set_tsc_offset(&self.fd, offset).map_err(self.call("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"))
    }

    /// What the guest's time-stamp counter would be with an offset of 0, and the host's at that instant.
    pub(super) fn unshifted_tsc(&self) -> Result<(u64, u64), Error> {
        let before = HostTime::now().tsc;
        let read = self.read_msrs(&[msr::TSC])?;
        let after = HostTime::now().tsc;
        let tsc = read.first().map_or(0, |msr| msr.value);
        Ok((tsc.wrapping_sub(self.tsc_offset()?), midpoint(before, after)))
    }

    /// Those of `indices` that this vCPU has, as it turns out by reading them.
    pub(super) fn readable_msrs(&self, indices: &[u32]) -> Result<Vec<u32>, Error> {
        let mut readable = Vec::with_capacity(indices.len());
        let mut rest = indices;
        while !rest.is_empty() {
            let chunk = &rest[..rest.len().min(MSR_CHUNK)];
            let read = self.try_read_msrs(chunk)?.len();
            readable.extend_from_slice(&chunk[..read]);
            // KVM stops at the first register that it does not have: go on behind it.
            rest = &rest[(read + usize::from(read < chunk.len()))..];
        }
        Ok(readable)
    }

    /// Reads the registers that are part of the state, and the host's time-stamp counter meanwhile.
    pub(super) fn read_own_msrs(&self) -> Result<(Vec<Msr>, u64), Error> {
        let before = HostTime::now().tsc;
        let msrs = self.read_msrs(&self.msrs)?;
        Ok((msrs, midpoint(before, HostTime::now().tsc)))
    }

    /// Reads registers (KVM_GET_MSRS).
    pub(super) fn read_msrs(&self, indices: &[u32]) -> Result<Vec<Msr>, Error> {
        let mut values = Vec::with_capacity(indices.len());
        for chunk in indices.chunks(MSR_CHUNK) {
            let read = self.try_read_msrs(chunk)?;
            if let Some(&index) = chunk.get(read.len()) {
                return Err(Error::Msr { vcpu: self.id, access: "read", index });
            }
            values.extend(read);
        }
        Ok(values)
    }

    fn try_read_msrs(&self, indices: &[u32]) -> Result<Vec<Msr>, Error> {
        let entries: Vec<_> = indices.iter().map(|&index| Msr { index, value: 0 }.into()).collect();
        let mut msrs = self.fam(&entries)?;
        let read = self.fd.get_msrs(&mut msrs).map_err(self.call("KVM_GET_MSRS"))?;
        Ok(msrs.as_slice()[..read]
            .iter()
            .map(|entry| Msr { index: entry.index, value: entry.data })
            .collect())
    }

    /// Writes registers (KVM_SET_MSRS).
    ///
    /// # Errors
    /// [`Error::VcpuCall`] or [`Error::Msr`].
    pub fn write_msrs(&self, msrs: &[Msr]) -> Result<(), Error> {
        for chunk in msrs.chunks(MSR_CHUNK) {
            let entries: Vec<_> = chunk.iter().map(|&msr| msr.into()).collect();
            let written = self.fd.set_msrs(&self.fam(&entries)?).map_err(self.call("KVM_SET_MSRS"))?;
            if let Some(refused) = chunk.get(written) {
                return Err(Error::Msr { vcpu: self.id, access: "write", index: refused.index });
            }
        }
        Ok(())
    }

    fn fam(&self, entries: &[kvm_bindings::kvm_msr_entry]) -> Result<Msrs, Error> {
        Msrs::from_entries(entries).map_err(|_| Error::Unfit { vcpu: self.id, what: "too many MSRs" })
    }

    /// Whether this shows itself as a processor with AMD's virtualisation.
    pub(super) fn is_amd(&self) -> bool {
        let vendor = self.cpuid.iter().find(|entry| entry.function == 0).map(|entry| entry.ebx.to_le_bytes());
        matches!(vendor.as_ref(), Some(b"Auth" | b"Hygo"))
    }

    /// Turns a failed call into an [`Error::VcpuCall`].
    pub(super) fn call(&self, call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        let vcpu = self.id;
        move |errno| Error::VcpuCall { vcpu, call, source: errno.into() }
    }
}

fn midpoint(before: u64, after: u64) -> u64 {
    before.wrapping_add(after.wrapping_sub(before) / 2)
}
