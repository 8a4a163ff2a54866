//! All of a vCPU's state, and the order in which it is read and written.

use std::{arch::x86_64::_rdtsc, borrow::Cow};

use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave, kvm_xsave2,
};
use serde::{Deserialize, Serialize};
use x86::msr::{IA32_TSC_DEADLINE, TSC};

use super::{CpuidEntry, Error, Vcpu};
use crate::arch::paging::Paging;

/// 32-bit words of the XSAVE area that `struct kvm_xsave` holds; more follow behind it.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / size_of::<u32>();

/// Largest XSAVE area in 32-bit words: 64 KiB, several times what AMX needs.
const XSAVE_MAX_WORDS: usize = 16 * 1024;

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Which register.
    pub index: u32,
    /// Its content.
    pub value: u64,
}

impl From<Msr> for kvm_msr_entry {
    fn from(msr: Msr) -> Self {
        Self { index: msr.index, data: msr.value, ..Default::default() }
    }
}

/// How the time of a copy goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Time {
    /// From the instant of the capture, as if none had passed since: a child's.
    FromCapture,
    /// With the time that has passed since the capture, on this host: the parent's own.
    Onward,
}

/// State of one vCPU: with the memory, everything that decides what it does next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// This host's time-stamp counter when the state was read.
    host_tsc: u64,
    cpuid: Vec<CpuidEntry>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// `None` on a host without XSAVE.
    xcrs: Option<kvm_xcrs>,
    /// The XSAVE area in 32-bit words.
    xsave: Vec<u32>,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<Msr>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// What CPUID shows.
    pub fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }

    /// The model-specific registers, in the order in which they are read.
    pub fn msrs(&self) -> &[Msr] {
        &self.msrs
    }

    /// XCR0: the components of the state that the guest has switched on; `None` on a host without XSAVE.
    pub fn xcr0(&self) -> Option<u64> {
        let kvm_xcrs { nr_xcrs, xcrs, .. } = self.xcrs?;
        let count = usize::try_from(nr_xcrs).unwrap_or(usize::MAX);
        xcrs.iter().take(count).find(|register| register.xcr == 0).map(|register| register.value)
    }

    /// The guest-physical addresses that it needs at its next instruction, or where an interrupt or port comes first: those of the code, its
    /// stack, descriptors, gates and task state, and on the way to these, as far as `read` knows what is in memory.
    pub fn next_addresses(&self, read: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
        let kvm_sregs { cr0, cr3, cr4, efer, cs, ss, tr, gdt, idt, .. } = self.sregs;
        let paging = Paging { cr0, cr3, cr4, efer };
        let (code, stack) = (cs.base.wrapping_add(self.regs.rip), ss.base.wrapping_add(self.regs.rsp));
        let linear = [code, stack, gdt.base, idt.base, tr.base].into_iter();
        linear.flat_map(|linear| paging.walk(linear, &read)).collect()
    }

    /// Size of the XSAVE area in bytes.
    pub fn xsave_bytes(&self) -> usize {
        size_of_val(self.xsave.as_slice())
    }
}

#[cfg(test)]
impl VcpuState {
    /// A state that holds nothing but this.
    pub(crate) fn sample(cpuid: Vec<CpuidEntry>, msrs: Vec<Msr>, xcr0: u64, xsave_bytes: usize) -> Self {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = xcr0;
        Self {
            host_tsc: 0,
            cpuid,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xcrs: Some(xcrs),
            xsave: vec![0; xsave_bytes / size_of::<u32>()],
            debugregs: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs,
            events: kvm_vcpu_events::default(),
        }
    }
}

impl Vcpu {
    /// Reads the state. The last exit must be complete.
    ///
    /// KVM_GET_MP_STATE comes first, since it makes KVM take in pending INIT and SIPI, which changes the local APIC
    /// (kernel source, kvm_arch_vcpu_ioctl_get_mpstate).
    ///
    /// # Errors
    /// [`Error::VcpuCall`] or [`Error::Msr`].
    pub fn save(&self) -> Result<VcpuState, Error> {
        let fd = &self.fd;
        Ok(VcpuState {
            host_tsc: host_tsc(),
            mp_state: fd.get_mp_state().map_err(self.call("KVM_GET_MP_STATE"))?,
            regs: fd.get_regs().map_err(self.call("KVM_GET_REGS"))?,
            sregs: fd.get_sregs().map_err(self.call("KVM_GET_SREGS"))?,
            xcrs: self.has_xcrs.then(|| fd.get_xcrs().map_err(self.call("KVM_GET_XCRS"))).transpose()?,
            xsave: self.save_xsave()?,
            debugregs: fd.get_debug_regs().map_err(self.call("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(self.call("KVM_GET_LAPIC"))?,
            msrs: self.read_msrs(&self.msrs)?,
            events: fd.get_vcpu_events().map_err(self.call("KVM_GET_VCPU_EVENTS"))?,
            cpuid: self.cpuid.clone(),
        })
    }

    /// Gets ready to take a state, where there is time for it: remembers what the vCPU holds by itself, so that [`Vcpu::restore`] need
    /// only write the rest. Each call on a vCPU costs microseconds, whatever it does.
    ///
    /// # Errors
    /// As [`Vcpu::save`].
    pub fn settle(&mut self) -> Result<(), Error> {
        self.fresh = Some(Box::new(self.save()?));
        Ok(())
    }

    /// What a settled vCPU holds by itself.
    pub fn fresh_state(&self) -> Option<&VcpuState> {
        self.fresh.as_deref()
    }

    /// Writes the state into a vCPU that has run no guest code yet, and whose VM's state is restored. What it is known to hold already is
    /// left out.
    ///
    /// CPUID comes first: it decides what else KVM accepts. The segment registers carry the APIC's mode, so they come before
    /// the local APIC; the TSC deadline is armed once TSC and local APIC are right; pending events come last, since
    /// several calls before drop them.
    ///
    /// # Errors
    /// The first call that fails: none is swallowed.
    pub fn restore(&mut self, state: &VcpuState, time: Time) -> Result<(), Error> {
        let mut fresh = self.fresh.take();
        if state.cpuid != self.cpuid {
            self.set_cpuid(state.cpuid.clone())?;
            // What registers hold by themselves depends on it.
            fresh = None;
        }
        let holds = |same: &dyn Fn(&VcpuState) -> bool| fresh.as_deref().is_some_and(same);
        let msrs = self.own_msrs(&state.msrs, fresh.as_deref())?;
        self.msrs = indices(&msrs).collect();
        let fd = &self.fd;
        if !holds(&|fresh| fresh.mp_state == state.mp_state) {
            fd.set_mp_state(state.mp_state).map_err(self.call("KVM_SET_MP_STATE"))?;
        }
        fd.set_sregs(&self.settable(state.sregs)).map_err(self.call("KVM_SET_SREGS"))?;
        fd.set_regs(&state.regs).map_err(self.call("KVM_SET_REGS"))?;
        if !holds(&|fresh| fresh.xsave == state.xsave) {
            self.restore_xsave(&state.xsave)?;
        }
        if let Some(xcrs) = state.xcrs.filter(|_| !holds(&|fresh| fresh.xcrs == state.xcrs)) {
            fd.set_xcrs(&xcrs).map_err(self.call("KVM_SET_XCRS"))?;
        }
        if !holds(&|fresh| fresh.debugregs == state.debugregs) {
            fd.set_debug_regs(&state.debugregs).map_err(self.call("KVM_SET_DEBUGREGS"))?;
        }
        if !holds(&|fresh| fresh.lapic == state.lapic) {
            fd.set_lapic(&state.lapic).map_err(self.call("KVM_SET_LAPIC"))?;
        }
        self.restore_msrs(&msrs, state.host_tsc, fresh.as_deref(), time)?;
        // Writing the registers has dropped what was pending; a vCPU on which nothing is pending has nothing to be told.
        if !holds(&|fresh| fresh.events == state.events) {
            fd.set_vcpu_events(&state.events).map_err(self.call("KVM_SET_VCPU_EVENTS"))?;
        }
        self.tell_paused()
    }

    /// The system registers as they were before KVM read them.
    ///
    /// On AMD, KVM reports the task register's segment as busy, though the processor does not keep that bit (kernel source,
    /// svm_get_segment). It does not take the bit off again when it writes the segment. Processors don't care, but QEMU's
    /// software one refuses all port accesses from user space then.
    fn settable(&self, mut sregs: kvm_sregs) -> kvm_sregs {
        const BUSY: u8 = 1 << 1;
        if self.is_amd() {
            sregs.tr.type_ &= !BUSY;
        }
        sregs
    }

    fn save_xsave(&self) -> Result<Vec<u32>, Error> {
        if self.xsave_bytes <= size_of::<kvm_xsave>() {
            let xsave = self.fd.get_xsave().map_err(self.call("KVM_GET_XSAVE"))?;
            return Ok(xsave.region.to_vec());
        }
        let mut xsave = self.xsave_buffer(self.xsave_bytes.div_ceil(size_of::<u32>()))?;
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says that the kernel may write.
        unsafe { self.fd.get_xsave2(&mut xsave) }.map_err(self.call("KVM_GET_XSAVE2"))?;
        let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
        words.extend_from_slice(xsave.as_slice());
        Ok(words)
    }

    fn restore_xsave(&self, words: &[u32]) -> Result<(), Error> {
        let needed = self.xsave_bytes.div_ceil(size_of::<u32>()).max(XSAVE_WORDS);
        if words.len() != needed {
            return Err(self.unfit("the XSAVE area has another size"));
        }
        let mut xsave = self.xsave_buffer(words.len())?;
        let (head, tail) = words.split_at(XSAVE_WORDS);
        // SAFETY: only the content changes, not the length that the wrapper keeps.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(head);
        xsave.as_mut_slice().copy_from_slice(tail);
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says that the kernel may read (checked above).
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(self.call("KVM_SET_XSAVE"))
    }

    fn xsave_buffer(&self, words: usize) -> Result<Xsave, Error> {
        if !(XSAVE_WORDS..=XSAVE_MAX_WORDS).contains(&words) {
            return Err(self.unfit("the XSAVE area has a size out of range"));
        }
        let empty = kvm_xsave2 { len: words - XSAVE_WORDS, ..Default::default() };
        let entries = vec![0; empty.len];
        Xsave::from_entries(&entries).map_err(|_| self.unfit("the XSAVE area is too large"))
    }

    /// Writes the registers whose value is not a fresh vCPU's. Of those that only describe the CPU, many can't be written, and need
    /// not be.
    fn restore_msrs(&self, saved: &[Msr], saved_tsc: u64, fresh: Option<&VcpuState>, time: Time) -> Result<(), Error> {
        let known = fresh.filter(|fresh| indices(&fresh.msrs).eq(indices(saved)));
        let read = if known.is_none() { self.read_msrs(&self.msrs)? } else { Vec::new() };
        let held = known.map_or(&read, |fresh| &fresh.msrs);
        let changed = saved.iter().zip(held).filter(|(saved, held)| saved != held).map(|(saved, _)| *saved);
        let mut changed: Vec<Msr> = changed.collect();
        changed.sort_by_key(|msr| match msr.index {
            TSC => 0,
            IA32_TSC_DEADLINE => 2,
            _ => 1,
        });
        if let (Time::Onward, Some(tsc)) = (time, changed.iter_mut().find(|msr| msr.index == TSC)) {
            // KVM gives vCPUs whose counters are written within a second one and the same offset (kernel source,
            // kvm_synchronize_tsc), so that they agree, whatever the time between these calls.
            let elapsed = host_tsc().wrapping_sub(saved_tsc);
            tsc.value = tsc.value.wrapping_add(self.tsc_khz.map_or(elapsed, |khz| scaled(elapsed, khz)));
        }
        self.write_msrs(&changed)
    }

    /// Those registers of a state that this vCPU has. One that it lacks, and that is zero in the state, holds nothing: KVM lets registers
    /// be read as zero that a vCPU can't use, by its CPUID, and other hosts have other ones (kernel source, kvm_do_msr_access).
    fn own_msrs<'s>(&self, saved: &'s [Msr], fresh: Option<&VcpuState>) -> Result<Cow<'s, [Msr]>, Error> {
        if fresh.is_some_and(|fresh| indices(&fresh.msrs).eq(indices(saved))) {
            return Ok(Cow::Borrowed(saved));
        }
        let own = self.readable_msrs(&indices(saved).collect::<Vec<_>>())?;
        let (own, lacking): (Vec<Msr>, Vec<Msr>) = saved.iter().partition(|msr| own.contains(&msr.index));
        match lacking.iter().find(|msr| msr.value != 0) {
            Some(msr) => Err(Error::Msr { vcpu: self.id, access: "write", index: msr.index }),
            None => Ok(Cow::Owned(own)),
        }
    }

    fn unfit(&self, what: &'static str) -> Error {
        Error::Unfit { vcpu: self.id, what }
    }
}

fn indices(msrs: &[Msr]) -> impl Iterator<Item = u32> {
    msrs.iter().map(|msr| msr.index)
}

/// So many units of the host's time-stamp counter in those of a guest's, by how fast the guest's runs and the host's.
fn scaled(elapsed: u64, (khz, host_khz): (u32, u32)) -> u64 {
    let scaled = u128::from(elapsed) * u128::from(khz) / u128::from(host_khz.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

/// This host's time-stamp counter.
fn host_tsc() -> u64 {
    // SAFETY: every processor with 64-bit mode has the instruction, and it has no effect but its result.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_vcpu_needs_next_is_its_code_its_stack_and_its_tables() {
        let mut state = VcpuState::sample(Vec::new(), Vec::new(), 0, 4096);
        (state.regs.rip, state.regs.rsp, state.sregs.cs.base) = (0x10, 0x20, 0x1000);
        (state.sregs.gdt.base, state.sregs.idt.base, state.sregs.tr.base) = (0x2000, 0x3000, 0x4000);
        // Without paging, nothing has to be looked up.
        assert_eq!(state.next_addresses(|_| None), [0x1010, 0x20, 0x2000, 0x3000, 0x4000]);
        // With it: the first table's entry, which says that nothing is there.
        (state.sregs.cr0, state.sregs.cr3, state.sregs.efer) = (1 << 31, 0x9000, 1 << 10);
        assert_eq!(state.next_addresses(|_| Some(0)), [0x9000; 5]);
    }

    #[test]
    fn elapsed_time_is_counted_as_the_guest_counts_it() {
        assert_eq!(scaled(3_000_000, (2_500_000, 3_000_000)), 2_500_000);
        assert_eq!(scaled(2_500_000, (3_000_000, 2_500_000)), 3_000_000);
        assert_eq!(scaled(7, (1, 1)), 7);
        assert_eq!(scaled(u64::MAX, (u32::MAX, 0)), u64::MAX);
    }
}
