//! All of a vCPU's state, and the order in which it is read and written.

use std::borrow::Cow;

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs,
    kvm_segment, kvm_sregs, kvm_sregs2, kvm_vcpu_events, kvm_xcrs, kvm_xsave, kvm_xsave2,
};
use serde::{Deserialize, Serialize};

use super::{Error, Vcpu, calls};
use crate::arch::{
    CpuidEntry,
    msr::{self, Msr},
    paging::Paging,
};

/// CR4: control-flow enforcement is on.
const CR4_CET: u64 = 1 << 23;

/// 32-bit words of the XSAVE area that `struct kvm_xsave` holds; more follow behind it.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / size_of::<u32>();

/// Largest XSAVE area in 32-bit words: 64 KiB, several times what AMX needs.
const XSAVE_MAX_WORDS: usize = 16 * 1024;

/// State of one vCPU: with the memory, everything that decides what it does next.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    /// This host's time-stamp counter at the instant for which `msrs` has the guest's.
    pub(super) host_tsc: u64,
    /// Guest's time-stamp counter less the host's, in the guest's units: what counts on this host alone.
    pub(super) tsc_offset: u64,
    pub(super) cpuid: Vec<CpuidEntry>,
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    /// The page-directory pointers, where the processor goes by them: with PAE, outside of long mode. They
    /// are those in memory when CR3 was loaded.
    pub(super) pdptrs: Option<[u64; 4]>,
    /// `None` on a host without XSAVE.
    pub(super) xcrs: Option<kvm_xcrs>,
    /// The XSAVE area in 32-bit words.
    pub(super) xsave: Vec<u32>,
    pub(super) debugregs: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    pub(super) msrs: Vec<Msr>,
    pub(super) events: kvm_vcpu_events,
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

    /// The guest's time-stamp counter; `None` where its registers were left out.
    pub fn tsc(&self) -> Option<u64> {
        self.msr(msr::TSC)
    }

    pub(super) fn set_tsc(&mut self, tsc: u64) {
        self.msrs.iter_mut().filter(|msr| msr.index == msr::TSC).for_each(|msr| msr.value = tsc);
    }

    fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.value)
    }

    /// XCR0: the components of the state that the guest has switched on; `None` on a host without XSAVE.
    pub fn xcr0(&self) -> Option<u64> {
        let kvm_xcrs { nr_xcrs, xcrs, .. } = self.xcrs?;
        let count = usize::try_from(nr_xcrs).unwrap_or(usize::MAX);
        xcrs.iter().take(count).find(|register| register.xcr == 0).map(|register| register.value)
    }

    /// The guest-physical addresses that it needs at its next instruction, or where an interrupt or port
    /// comes first: those of the code, its stack, descriptors, gates and task state, and on the way to these,
    /// as far as `read` knows what is in memory.
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

#[cfg(any(test, feature = "samples"))]
impl VcpuState {
    /// A state that holds nothing but this.
    pub fn sample(cpuid: Vec<CpuidEntry>, msrs: Vec<Msr>, xcr0: u64, xsave_bytes: usize) -> Self {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = xcr0;
        Self {
            host_tsc: 0,
            tsc_offset: 0,
            cpuid,
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            pdptrs: None,
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
    /// KVM_GET_MP_STATE comes first, since it makes KVM take in pending INIT and SIPI, which changes the
    /// local APIC (kernel source, kvm_arch_vcpu_ioctl_get_mpstate). The registers, with the timer's deadline,
    /// come before the local APIC: a timer that fires between the two is in the state twice, as the deadline
    /// and as its interrupt, and not never; a guest finds that nothing is due at the second one. (KVM clears
    /// a deadline when it has raised the interrupt, on some hosts also while the vCPU does not run; kernel
    /// source, apic_timer_expired.)
    ///
    /// # Errors
    /// [`Error::VcpuCall`], [`Error::Msr`], or [`Error::Unfit`] for what can't be saved.
    pub fn save(&self) -> Result<VcpuState, Error> {
        let fd = &self.fd;
        let mp_state = fd.get_mp_state().map_err(self.call("KVM_GET_MP_STATE"))?;
        let (msrs, host_tsc) = self.read_own_msrs()?;
        let sregs = fd.get_sregs().map_err(self.call("KVM_GET_SREGS"))?;
        self.check_enforcement(&sregs)?;
        Ok(VcpuState {
            host_tsc,
            tsc_offset: self.tsc_offset()?,
            mp_state,
            regs: fd.get_regs().map_err(self.call("KVM_GET_REGS"))?,
            pdptrs: self.save_pdptrs(&sregs)?,
            sregs,
            xcrs: self.has_xcrs.then(|| fd.get_xcrs().map_err(self.call("KVM_GET_XCRS"))).transpose()?,
            xsave: self.save_xsave()?,
            debugregs: fd.get_debug_regs().map_err(self.call("KVM_GET_DEBUGREGS"))?,
            lapic: fd.get_lapic().map_err(self.call("KVM_GET_LAPIC"))?,
            msrs,
            events: fd.get_vcpu_events().map_err(self.call("KVM_GET_VCPU_EVENTS"))?,
            cpuid: self.cpuid.clone(),
        })
    }

    /// Gets ready to take a state, where there is time for it: remembers what the vCPU holds by itself, so
    /// that [`Vcpu::restore`] need only write the rest. Each call on a vCPU costs microseconds, whatever it
    /// does.
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

    /// Writes the state into a vCPU that has run no guest code yet, and whose VM's state is restored. What it
    /// is known to hold already is left out.
    ///
    /// CPUID comes first: it decides what else KVM accepts. The segment registers carry the APIC's mode, so
    /// they come before the local APIC; the TSC deadline is armed once the local APIC is right, and the
    /// time-stamp counter, which [`set_counters`](super::set_counters) has set; pending events come last,
    /// since several calls before drop them.
    ///
    /// # Errors
    /// The first call that fails: none is swallowed.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), Error> {
        // Programs of before this was checked have saved such states.
        self.check_enforcement(&state.sregs)?;
        let mut fresh = self.fresh.take();
        if state.cpuid != self.cpuid {
            self.set_cpuid(state.cpuid.clone())?;
            // What registers hold by themselves depends on it.
            fresh = None;
        }
        if let Some(mcg_cap) = state.msr(msr::MCG_CAP).filter(|cap| *cap != self.mcg_cap) {
            self.setup_mce(mcg_cap)?;
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
        state.pdptrs.map_or(Ok(()), |pdptrs| self.restore_pdptrs(pdptrs))?;
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
        self.restore_msrs(&msrs, fresh.as_deref())?;
        // Writing the registers has dropped what was pending; a vCPU on which nothing is pending has nothing
        // to be told.
        if !holds(&|fresh| fresh.events == state.events) {
            fd.set_vcpu_events(&state.events).map_err(self.call("KVM_SET_VCPU_EVENTS"))?;
        }
        self.tell_paused()
    }

    /// Checks that a state uses no control-flow enforcement: its shadow stack pointer is in no register that
    /// KVM lists.
    fn check_enforcement(&self, sregs: &kvm_sregs) -> Result<(), Error> {
        match sregs.cr4 & CR4_CET {
            0 => Ok(()),
            _ => {
                Err(self.unfit("it uses control-flow enforcement (CET), whose stack pointer can't be saved"))
            }
        }
    }

    /// The page-directory pointers, where the processor goes by them.
    fn save_pdptrs(&self, sregs: &kvm_sregs) -> Result<Option<[u64; 4]>, Error> {
        let paging = Paging { cr0: sregs.cr0, cr3: sregs.cr3, cr4: sregs.cr4, efer: sregs.efer };
        if !paging.has_directory_pointers() {
            return Ok(None);
        }
        let kvm_sregs2 { flags, pdptrs, .. } = self.sregs2()?;
        Ok((flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0).then_some(pdptrs))
    }

    /// Sets them, behind the system registers, which makes KVM load those that are in memory.
    fn restore_pdptrs(&self, pdptrs: [u64; 4]) -> Result<(), Error> {
        let flags = u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
        let mut sregs = kvm_sregs2 { pdptrs, flags, ..self.sregs2()? };
        sregs.tr = self.settable_task(sregs.tr);
        calls::set_sregs2(&self.fd, &sregs).map_err(self.call("KVM_SET_SREGS2"))
    }

    fn sregs2(&self) -> Result<kvm_sregs2, Error> {
        calls::sregs2(&self.fd).map_err(self.call("KVM_GET_SREGS2"))
    }

    /// The system registers as they were before KVM read them.
    ///
    /// On AMD, KVM reports the task register's segment as busy, though the processor does not keep that bit
    /// (kernel source, svm_get_segment). It does not take the bit off again when it writes the segment.
    /// Processors don't care, but QEMU's software one refuses all port accesses from user space then.
    fn settable(&self, sregs: kvm_sregs) -> kvm_sregs {
        kvm_sregs { tr: self.settable_task(sregs.tr), ..sregs }
    }

    /// The task register of the same.
    fn settable_task(&self, mut task: kvm_segment) -> kvm_segment {
        const BUSY: u8 = 1 << 1;
        if self.is_amd() {
            task.type_ &= !BUSY;
        }
        task
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

    /// Writes the registers whose value is not a fresh vCPU's. Of those that only describe the CPU, many
    /// can't be written, and need not be. The time-stamp counter is set by its offset.
    fn restore_msrs(&self, saved: &[Msr], fresh: Option<&VcpuState>) -> Result<(), Error> {
        let known = fresh.filter(|fresh| indices(&fresh.msrs).eq(indices(saved)));
        let read = if known.is_none() { self.read_msrs(&self.msrs)? } else { Vec::new() };
        let held = known.map_or(&read, |fresh| &fresh.msrs);
        let changed = saved.iter().zip(held).filter(|(saved, held)| saved != held && saved.index != msr::TSC);
        let mut changed: Vec<Msr> = changed.map(|(saved, _)| *saved).collect();
        changed.sort_by_key(|msr| msr.index == msr::TSC_DEADLINE);
        self.write_msrs(&changed)
    }

    /// Those registers of a state that this vCPU has. One that it lacks, and that is zero in the state, holds
    /// nothing: KVM lets registers be read as zero that a vCPU can't use, by its CPUID, and other hosts have
    /// other ones (kernel source, kvm_do_msr_access).
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmfork_abi::cpuid::{LEAF_FEATURES, LEAF_INTERFACE, LEAF_SIGNATURE};

    use super::*;
    use crate::{
        arch::{
            MAX_CPUID_LEAVES, Registers, VcpuId,
            cpuid::{self, Shape},
            layout::Gpa,
        },
        kvm::{Hypervisor, Vm},
        memory::{self, Mapping},
    };

    const PAGE_BYTES: u64 = 4096;

    /// A vCPU with a page of memory that begins with these four words, or nothing where there is no KVM.
    fn vcpu(words: [u64; 4]) -> Option<(Vm, Vcpu, Arc<Mapping>)> {
        let hypervisor =
            Hypervisor::open().inspect_err(|error| eprintln!("SKIPPED: no KVM here: {error}")).ok()?;
        let ram = Arc::new(Mapping::reserve(4096).unwrap());
        ram.map_shared(&memory::unsealed("test", PAGE_BYTES).unwrap()).unwrap();
        fill(&ram, words);
        let mut vm = hypervisor.create_vm().unwrap();
        vm.map(0, Gpa(0), &ram, 0, PAGE_BYTES).unwrap();
        vm.create_irqchip().unwrap();
        let mut vcpu = vm.create_vcpu(VcpuId(0)).unwrap();
        vcpu.set_cpuid(hypervisor.supported_cpuid().unwrap()).unwrap();
        Some((vm, vcpu, ram))
    }

    fn fill(ram: &Mapping, words: [u64; 4]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        ram.write(0, &bytes).unwrap();
    }

    #[test]
    fn page_directory_pointers_are_those_that_the_processor_has_loaded() {
        let [loaded, in_memory] = [[0x1001, 0x2001, 0x3001, 0x4001], [0x5001, 0x6001, 0x7001, 0x8001]];
        let Some((_vm, vcpu, ram)) = vcpu(loaded) else { return };
        let pae = |reset| kvm_sregs { cr0: 1 << 31 | 1, cr3: 0, cr4: 1 << 5, ..reset };
        vcpu.set_entry(&Registers { rflags: 2, ..Default::default() }, pae).unwrap();
        let state = vcpu.save().unwrap();
        if state.sregs.cr0 & 1 << 31 == 0 {
            // A KVM that runs guest user code only.
            return eprintln!("SKIPPED: this KVM has no 32-bit paging");
        }
        assert_eq!(state.pdptrs, Some(loaded));
        // The guest changes them in memory, and does not load CR3 again. Intel's processors go on with those
        // that they have; with AMD's nested paging, those in memory are looked up.
        fill(&ram, in_memory);
        let state = vcpu.save().unwrap();
        let (_other_vm, mut copy, _other_ram) = self::vcpu(in_memory).unwrap();
        copy.restore(&state).unwrap();
        assert_eq!(copy.save().unwrap().pdptrs, state.pdptrs);
    }

    #[test]
    fn a_guest_that_was_shown_fewer_leaves_goes_on_with_these() {
        let ours = |supported: &[CpuidEntry]| {
            cpuid::for_vcpu(supported, Shape { vcpus: 1, tsc_deadline_timer: false }, VcpuId(0))
        };
        let Some((_vm, mut vcpu, _ram)) = vcpu([0; 4]) else { return };
        let supported = vcpu.cpuid.clone();
        // As a program of before the features has made them.
        let mut before = ours(&supported);
        before.retain(|entry| entry.function != LEAF_FEATURES);
        let signature = before.iter_mut().find(|entry| entry.function == LEAF_SIGNATURE).unwrap();
        signature.eax = LEAF_INTERFACE;
        vcpu.set_cpuid(before.clone()).unwrap();
        let state = vcpu.save().unwrap();
        let (_other_vm, mut copy, _other_ram) = self::vcpu([0; 4]).unwrap();
        copy.set_cpuid(ours(&supported)).unwrap();
        copy.restore(&state).unwrap();
        assert_eq!(copy.save().unwrap().cpuid(), before);
        let shown = copy.fd.get_cpuid2(MAX_CPUID_LEAVES).unwrap();
        assert!(shown.as_slice().iter().all(|entry| entry.function != LEAF_FEATURES));
    }

    #[test]
    fn a_guest_with_state_that_can_not_be_read_is_not_saved() {
        let Some((_vm, vcpu, _ram)) = vcpu([0; 4]) else { return };
        assert!(vcpu.save().is_ok());
        // Where the host has it, and KVM lets it be switched on at all.
        let with_cet =
            |reset: kvm_sregs| kvm_sregs { cr0: reset.cr0 | 1 << 16, cr4: reset.cr4 | CR4_CET, ..reset };
        if vcpu.set_entry(&Registers { rflags: 2, ..Default::default() }, with_cet).is_ok() {
            assert!(matches!(vcpu.save(), Err(Error::Unfit { .. })));
        }
    }

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
}
