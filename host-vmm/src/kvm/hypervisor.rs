//! KVM as a whole: what it can do here, and the making of VMs.

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};

use super::{CpuidEntry, Error, Vm, call};

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
    /// The model-specific registers that may hold a vCPU's state, sorted; a given vCPU need not have all of them.
    pub msrs: Vec<u32>,
    /// KVM emulates the TSC deadline timer; CPUID alone does not say so.
    pub tsc_deadline_timer: bool,
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
        Ok(Model {
            cpuid: self.supported_cpuid()?,
            msrs: self.msr_indices()?,
            tsc_deadline_timer: self.kvm.check_extension(Cap::TscDeadlineTimer),
        })
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
