//! KVM as a whole: what it can do here, and the making of VMs.

use std::io;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_xsave};
use kvm_ioctls::{Cap, Kvm};

use super::{CpuidEntry, Error, Msr, Vm, call};
use crate::arch::features::ARCH_CAPABILITIES_MSR;

/// What every VM here needs. A VM is forked only if all of its state can be saved.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// What a VM is given where a host has it. Its guest, or its state, needs it from then on.
const GIVEN: &[(Cap, &str)] = &[(Cap::ExitHypercall, "KVM_CAP_EXIT_HYPERCALL"), (Cap::Xcrs, "KVM_CAP_XCRS")];

/// An open /dev/kvm that can do all that is needed.
#[derive(Debug)]
pub struct Hypervisor {
    kvm: Kvm,
}

/// What this host gives to a vCPU: read once, since it takes a while and stays the same.
#[derive(Debug)]
pub struct Model {
    /// The CPUID leaves that KVM can show to a guest.
    pub cpuid: Vec<CpuidEntry>,
    /// Those that guests are shown: the same, or what a profile leaves of them.
    pub shown: Vec<CpuidEntry>,
    /// The model-specific registers that may hold a vCPU's state, sorted; a given vCPU need not have all of them.
    pub msrs: Vec<u32>,
    /// IA32_ARCH_CAPABILITIES of a guest; 0 where there is no such register.
    pub arch_capabilities: u64,
    /// KVM emulates the TSC deadline timer; CPUID alone does not say so.
    pub tsc_deadline_timer: bool,
    /// Frequency of a guest's time-stamp counter in kHz, unless it is given another one; `None` where this kernel can't tell.
    pub tsc_khz: Option<u32>,
    /// A guest's time-stamp counter can be given another frequency than the host's (KVM_CAP_TSC_CONTROL).
    pub tsc_scaling: bool,
    /// Size of a vCPU's XSAVE area in bytes.
    pub xsave_bytes: usize,
    /// Names of the capabilities that VMs are given here, of those that not every host has.
    pub capabilities: Vec<String>,
}

/// A host on which VMs are built.
#[derive(Debug)]
pub struct Host {
    /// Its KVM.
    pub hypervisor: Hypervisor,
    /// What it gives to a vCPU.
    pub model: Model,
}

impl Host {
    /// This one.
    ///
    /// # Errors
    /// As [`Hypervisor::open`], or [`Error::Call`].
    pub fn open() -> Result<Self, Error> {
        let hypervisor = Hypervisor::open()?;
        Ok(Self { model: hypervisor.model()?, hypervisor })
    }
}

impl Hypervisor {
    /// Opens /dev/kvm, and checks its version and capabilities.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::ApiVersion`] or [`Error::Missing`].
    pub fn open() -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(|errno| Error::Open(errno.into()))?;
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(Error::ApiVersion(version));
        }
        match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            Some((_, name)) => Err(Error::Missing(name)),
            None => Ok(Self { kvm }),
        }
    }

    /// Makes a VM with nothing in it (KVM_CREATE_VM).
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn create_vm(&self) -> Result<Vm, Error> {
        Vm::new(self.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?)
    }

    /// The CPUID leaves that KVM can show to a guest (KVM_GET_SUPPORTED_CPUID).
    ///
    /// # Errors
    /// [`Error::Call`].
    pub fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Error> {
        let cpuid = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(cpuid.as_slice().to_vec())
    }

    /// What this host gives to a vCPU.
    ///
    /// # Errors
    /// [`Error::Call`].
    fn model(&self) -> Result<Model, Error> {
        let cpuid = self.supported_cpuid()?;
        let given = GIVEN.iter().filter(|(cap, _)| self.kvm.check_extension(*cap));
        Ok(Model {
            shown: cpuid.clone(),
            cpuid,
            msrs: self.msr_indices()?,
            arch_capabilities: self.feature_msr(ARCH_CAPABILITIES_MSR)?.unwrap_or(0),
            tsc_deadline_timer: self.kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_khz: self.tsc_khz()?,
            tsc_scaling: self.kvm.check_extension(Cap::TscControl),
            xsave_bytes: self.xsave_bytes(),
            capabilities: given.map(|(_, name)| (*name).to_owned()).collect(),
        })
    }

    /// Frequency of a vCPU's time-stamp counter in kHz, where this kernel can tell (KVM_GET_TSC_KHZ). It takes a vCPU to ask.
    fn tsc_khz(&self) -> Result<Option<u32>, Error> {
        if !self.kvm.check_extension(Cap::GetTscKhz) {
            return Ok(None);
        }
        let vm = self.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        Ok(vcpu.get_tsc_khz().ok().filter(|khz| *khz > 0))
    }

    /// Size of a vCPU's XSAVE area in bytes: that of KVM_GET_XSAVE, or what KVM_CAP_XSAVE2 says where that is more.
    fn xsave_bytes(&self) -> usize {
        let xsave2 = usize::try_from(self.kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        xsave2.next_multiple_of(size_of::<u32>()).max(size_of::<kvm_xsave>())
    }

    /// What a guest reads from a register that describes the CPU; `None` where KVM has no such one.
    fn feature_msr(&self, index: u32) -> Result<Option<u64>, Error> {
        let none_left = |_| Error::Call { call: "KVM_GET_MSRS", source: io::ErrorKind::OutOfMemory.into() };
        let mut msrs = Msrs::from_entries(&[Msr { index, value: 0 }.into()]).map_err(none_left)?;
        let read = self.kvm.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
        Ok(msrs.as_slice()[..read].first().map(|entry| entry.data))
    }

    /// Most vCPUs that this host advises to give to one VM (KVM_CAP_NR_VCPUS).
    pub fn advised_vcpus(&self) -> usize {
        self.kvm.get_nr_vcpus()
    }

    /// The model-specific registers that may hold a vCPU's state: KVM_GET_MSR_INDEX_LIST, and those of
    /// KVM_GET_MSR_FEATURE_INDEX_LIST, which describe the CPU. Sorted, each once.
    ///
    /// # Errors
    /// [`Error::Call`].
    fn msr_indices(&self) -> Result<Vec<u32>, Error> {
        let state = self.kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let features = self.kvm.get_msr_feature_index_list().map_err(call("KVM_GET_MSR_FEATURE_INDEX_LIST"))?;
        let mut indices = [state.as_slice(), features.as_slice()].concat();
        indices.sort_unstable();
        indices.dedup();
        Ok(indices)
    }
}
