//! KVM as a whole: what it can do here, and the making of VMs.

use std::io;

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_xsave};
use kvm_ioctls::{Cap, Kvm};

use super::{Error, Vm, call, calls};
use crate::arch::{
    CpuidEntry,
    features::ARCH_CAPABILITIES_MSR,
    msr::{self, Msr},
};

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
pub struct HostModel {
    /// The CPUID leaves that KVM can show to a guest.
    pub cpuid: Vec<CpuidEntry>,
    /// Those that guests are shown: the same, or what a profile leaves of them.
    pub shown: Vec<CpuidEntry>,
    /// The model-specific registers that may hold a vCPU's state, sorted; a given vCPU need not have all of
    /// them.
    pub msrs: Vec<u32>,
    /// IA32_ARCH_CAPABILITIES of a guest; 0 where there is no such register.
    pub arch_capabilities: u64,
    /// KVM emulates the TSC deadline timer; CPUID alone does not say so.
    pub tsc_deadline_timer: bool,
    /// Frequency of a guest's time-stamp counter in kHz, unless it is given another one; `None` where this
    /// kernel can't tell.
    pub tsc_khz: Option<u32>,
    /// A guest's time-stamp counter can be given another frequency than the host's (KVM_CAP_TSC_CONTROL).
    pub tsc_scaling: bool,
    /// A guest's time-stamp counter can be shifted against the host's. A KVM without hardware virtualisation
    /// that runs guest user code can't do that: guests read the host's counter.
    pub tsc_shift: bool,
    /// KVM trusts the host's time-stamp counter. Where it does not, the counter of a vCPU that does not run
    /// stands still for whoever reads it.
    pub tsc_steady: bool,
    /// KVM has banks of machine-check registers (KVM_CAP_MCE).
    pub mce_banks: bool,
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
    pub model: HostModel,
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

/// Time-stamp counters of vCPUs on this host.
struct Tsc {
    /// Frequency in kHz, where this kernel can tell (KVM_GET_TSC_KHZ).
    khz: Option<u32>,
    /// They can be shifted against the host's.
    shift: bool,
    /// [`HostModel::tsc_steady`].
    steady: bool,
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
        let cpuid =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(cpuid.as_slice().to_vec())
    }

    /// What this host gives to a vCPU.
    ///
    /// # Errors
    /// [`Error::Call`].
    fn model(&self) -> Result<HostModel, Error> {
        let cpuid = self.supported_cpuid()?;
        let given = GIVEN.iter().filter(|(cap, _)| self.kvm.check_extension(*cap));
        let Tsc { khz: tsc_khz, shift: tsc_shift, steady: tsc_steady } = self.tsc()?;
        Ok(HostModel {
            shown: cpuid.clone(),
            cpuid,
            msrs: self.msr_indices()?,
            arch_capabilities: self.feature_msr(ARCH_CAPABILITIES_MSR)?.unwrap_or(0),
            tsc_deadline_timer: self.kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_khz,
            tsc_scaling: self.kvm.check_extension(Cap::TscControl),
            tsc_shift,
            tsc_steady,
            mce_banks: self.kvm.check_extension(Cap::Mce),
            xsave_bytes: self.xsave_bytes(),
            capabilities: given.map(|(_, name)| (*name).to_owned()).collect(),
        })
    }

    /// Time-stamp counters of vCPUs. It takes a vCPU to ask. A KVM may take an offset, and leave it at that.
    fn tsc(&self) -> Result<Tsc, Error> {
        const TRIED: u64 = 1 << 40;
        let vm = self.kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        let offset = calls::set_tsc_offset(&vcpu, TRIED).and_then(|()| calls::tsc_offset(&vcpu));
        let offset =
            offset.map_err(|_| Error::Missing("KVM_VCPU_TSC_OFFSET (it is there from Linux 5.16 on)"))?;
        let khz = self.kvm.check_extension(Cap::GetTscKhz).then(|| vcpu.get_tsc_khz().ok()).flatten();
        // A KVM that holds the host's counter unstable has the guest's stand still until the vCPU runs, so
        // that the offset is a little smaller at each call (kernel source, kvm_arch_vcpu_load).
        let shift = offset.abs_diff(TRIED) < TRIED / 2;
        Ok(Tsc { khz: khz.filter(|khz| *khz > 0), shift, steady: !shift || offset == TRIED })
    }

    /// Size of a vCPU's XSAVE area in bytes: that of KVM_GET_XSAVE, or what KVM_CAP_XSAVE2 says where that is
    /// more.
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

    /// The model-specific registers that may hold a vCPU's state: KVM_GET_MSR_INDEX_LIST, those of
    /// KVM_GET_MSR_FEATURE_INDEX_LIST, which describe the CPU, and those that are in neither. Sorted, each
    /// once.
    ///
    /// # Errors
    /// [`Error::Call`].
    fn msr_indices(&self) -> Result<Vec<u32>, Error> {
        let state = self.kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        let features =
            self.kvm.get_msr_feature_index_list().map_err(call("KVM_GET_MSR_FEATURE_INDEX_LIST"))?;
        let mut indices = [state.as_slice(), features.as_slice(), &msr::unlisted()].concat();
        indices.sort_unstable();
        indices.dedup();
        Ok(indices)
    }
}
