//! Machines without content, which then boot or become copies.

use std::{
    fs::File,
    sync::{Arc, Mutex},
};

use types::{PAGE_BYTES, VmIdentity, VmShape};

use super::{Built, Exits, Machine, MachineState, SpareVm, VcpuBarrier};
use crate::{
    arch::{
        VcpuId, cpuid,
        layout::{CONTROL_PAGE, CONTROL_REGION_BYTES, GENERATION_ID, ram_pieces},
        regs,
    },
    boot::{self, Payload},
    devices::{self, ControlPage, ControlPageState, Devices, DevicesState, GENERATION_ID_OFFSET},
    kvm::{self, Host, HostModel, Time, TscRate, Vcpu, Vm, VmHandle},
    memory::{self, Faults, GuestMemory, Image, Mapping, PageMap, PremappedRam, WorkingSet},
};

/// `out 0x80, al`: to a port at which nothing happens.
const WARM_UP: [u8; 2] = [0xe6, 0x80];

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
    /// A device can't be built, or take its state.
    #[error("can't build the VM's devices")]
    Device(#[from] devices::Error),
    /// State and image don't fit together.
    #[error("the state is not one of this image: {0}")]
    Mismatch(&'static str),
}

/// Host descriptors that machines are built with. They are opened once, before the seccomp filter forbids it.
#[derive(Debug)]
pub struct HostHandles {
    /// The host.
    pub host: Arc<Host>,
    /// In which it is found what VMs have written to.
    pub page_map: PageMap,
    /// By which it is found out what VMs lack of a memory that is still being filled; none where this host
    /// has no such thing.
    faults: Option<File>,
}

impl HostHandles {
    /// Opens those of this process.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn open(host: Arc<Host>) -> Result<Self, Error> {
        let faults = memory::faults::device()
            .inspect_err(|error| tracing::debug!(%error, "no lazy clones can run here"));
        Ok(Self { host, page_map: PageMap::open()?, faults: faults.ok() })
    }

    /// Faults of this process.
    ///
    /// # Errors
    /// [`Error::Mismatch`] where this host has no such thing, or [`Error::Memory`].
    pub fn faults(&self) -> Result<Faults, Error> {
        let device =
            self.faults.as_ref().ok_or(Error::Mismatch("lazy clones need /dev/userfaultfd (Linux 6.1)"))?;
        Ok(Faults::of_this_process(device)?)
    }
}

/// A machine without content: all that takes long to make is made, and it can become a booted VM or a copy.
#[derive(Debug)]
pub struct BlankMachine {
    handles: Arc<HostHandles>,
    config: VmShape,
    vm: Vm,
    vcpus: Vec<Vcpu>,
    /// Addresses of its memory to come.
    premapped: PremappedRam,
    control_page: ControlPage,
}

impl BlankMachine {
    /// Builds one.
    ///
    /// # Errors
    /// [`Error`]: whatever could not be made.
    pub fn build(handles: &Arc<HostHandles>, config: VmShape) -> Result<Self, Error> {
        Self::build_around(handles, config, ControlPage::new()?)
    }

    /// Does beforehand, where there is time, what would make its launch take longer.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn warm_up(&mut self) -> Result<(), Error> {
        if let Some(first) = self.vcpus.first_mut() {
            self.control_page.with_code(&WARM_UP, || first.warm_up(CONTROL_PAGE))??;
        }
        self.settle()
    }

    /// Builds one that shares the control page of a machine of this process: a place for that machine to go
    /// on in.
    ///
    /// # Errors
    /// [`Error`]: whatever could not be made.
    pub fn build_spare(machine: &Machine) -> Result<Self, Error> {
        let mut spare = Self::build_around(&machine.handles, machine.config, machine.control_page.clone())?;
        spare.settle()?;
        Ok(spare)
    }

    /// Makes the VM, its memory slots, its interrupt controllers and its vCPUs, in the order that costs no
    /// waiting (see [`Vm::map`]).
    fn build_around(
        handles: &Arc<HostHandles>,
        config: VmShape,
        control_page: ControlPage,
    ) -> Result<Self, Error> {
        let Host { hypervisor, model } = &*handles.host;
        let bytes =
            usize::try_from(config.ram_bytes).map_err(|_| Error::Mismatch("the memory is too large"))?;
        let mapping = Arc::new(Mapping::reserve(bytes)?);
        let mut vm = hypervisor.create_vm()?;
        vm.map(0, CONTROL_PAGE, control_page.mapping(), 0, CONTROL_REGION_BYTES)?;
        vm.map_read_only(1, GENERATION_ID, control_page.mapping(), GENERATION_ID_OFFSET as u64, PAGE_BYTES)?;
        for (slot, piece) in (2..).zip(ram_pieces(config.ram_bytes)) {
            vm.map(slot, piece.gpa, &mapping, piece.offset, piece.bytes)?;
        }
        vm.create_irqchip()?;
        vm.enable_hypercall()?;
        let shape = cpuid::Shape { vcpus: config.vcpus, tsc_deadline_timer: model.tsc_deadline_timer };
        let vcpus = (0..config.vcpus).map(VcpuId).map(|id| {
            let mut vcpu = vm.create_vcpu(id)?;
            vcpu.set_model(cpuid::for_vcpu(&model.shown, shape, id), model)?;
            Ok(vcpu)
        });
        let vcpus = vcpus.collect::<Result<_, kvm::Error>>()?;
        Ok(Self { handles: Arc::clone(handles), config, vm, vcpus, premapped: mapping.into(), control_page })
    }

    /// Maps the lowest layer of the image that it is likely to become a copy of, and makes the pages ready
    /// that such copies write to first, for as long as `goes_on` says so.
    ///
    /// # Errors
    /// [`Error::Memory`]: the machine is as good as before.
    pub fn prepare_memory(
        &mut self,
        lowest: &Arc<File>,
        working_set: &WorkingSet,
        goes_on: impl Fn() -> bool,
    ) -> Result<(), Error> {
        self.premapped.premap_base(lowest)?;
        Ok(self.premapped.prefault(working_set, goes_on)?)
    }

    fn settle(&mut self) -> Result<(), Error> {
        self.vm.settle()?;
        Ok(self.vcpus.iter_mut().try_for_each(Vcpu::settle)?)
    }

    /// What it holds by itself, as a state that a machine could be restored from; `None` before it is
    /// settled.
    pub fn fresh_state(&self) -> Option<MachineState> {
        let vcpus = self.vcpus.iter().map(|vcpu| vcpu.fresh_state().cloned()).collect::<Option<_>>()?;
        let HostModel { tsc_khz, capabilities, .. } = &self.handles.host.model;
        Some(MachineState {
            config: self.config,
            vm: self.vm.save().ok()?.0,
            vcpus,
            devices: DevicesState::power_on(),
            control_page: ControlPageState::default(),
            tsc_khz: *tsc_khz,
            capabilities: capabilities.clone(),
        })
    }

    /// Makes it a machine at the entry of a kernel. Its console writes to `console`. With `prealloc`, all of
    /// its memory is taken from the host now.
    ///
    /// # Errors
    /// [`Error`]: whatever does not fit.
    pub fn boot(
        self,
        payload: &mut Payload,
        prealloc: bool,
        console: File,
    ) -> Result<AnonymousMachine, Error> {
        let Self { handles, config, vm, vcpus, premapped, control_page } = self;
        let memory = GuestMemory::own(premapped.into_mapping())?;
        if prealloc {
            memory.mapping().populate(0, memory.mapping().bytes())?;
        }
        let file = memory.own_file().ok_or(Error::Mismatch("a booted VM's memory is its own"))?;
        let entry = boot::load(payload, file, config.ram_bytes, config.vcpus)?;
        vcpus.iter().try_for_each(|vcpu| vcpu.write_msrs(&regs::boot_msrs()))?;
        // The others wait to be started by the first one.
        if let Some(first) = vcpus.first() {
            first.set_entry(&regs::entry(entry), regs::entry_system)?;
        }
        let vm = Arc::new(VmHandle::new(vm));
        let devices = Devices::power_on(&vm, config.ram_bytes, &control_page, console)?;
        let tsc_khz = handles.host.model.tsc_khz;
        let (clock_began_ns, faults) = (None, None);
        Ok(AnonymousMachine {
            handles,
            config,
            vm,
            memory,
            control_page,
            devices,
            vcpus,
            tsc_khz,
            clock_began_ns,
            faults,
        })
    }

    /// Address of the memory that it will have.
    pub fn memory_start(&self) -> u64 {
        self.premapped.start() as u64
    }

    /// Makes it a machine that goes on where `state` and `image` were captured. Where the image is still
    /// being filled, `faults` are those of this process, and somebody has to deal with them.
    ///
    /// # Errors
    /// [`Error`]: whatever does not take its state.
    pub fn restore(
        self,
        state: &MachineState,
        image: Arc<Image>,
        console: File,
        faults: Option<Faults>,
    ) -> Result<AnonymousMachine, Error> {
        let (handles, control_page, config) =
            (Arc::clone(&self.handles), self.control_page.clone(), self.config);
        let restored = self.take_state(state, image, Time::FromCapture, faults.as_ref())?;
        let RestoredVm { vm, vcpus, memory, clock_began_ns } = restored;
        let vm = Arc::new(VmHandle::new(vm));
        control_page.restore(&state.control_page)?;
        let devices = Devices::restore(&state.devices, &vm, config.ram_bytes, &control_page, console)?;
        let tsc_khz = state.tsc_khz.or(handles.host.model.tsc_khz);
        let clock_began_ns = Some(clock_began_ns);
        Ok(AnonymousMachine {
            handles,
            config,
            vm,
            memory,
            control_page,
            devices,
            vcpus,
            tsc_khz,
            clock_began_ns,
            faults,
        })
    }

    /// Brings VM, vCPUs and memory to where `state` and `image` were captured.
    pub(super) fn take_state(
        mut self,
        state: &MachineState,
        image: Arc<Image>,
        time: Time,
        faults: Option<&Faults>,
    ) -> Result<RestoredVm, Error> {
        if state.config != self.config {
            return Err(Error::Mismatch("it was captured in a machine of another shape"));
        }
        if image.pages().checked_mul(PAGE_BYTES) != Some(self.config.ram_bytes) {
            return Err(Error::Mismatch("the memory has another size"));
        }
        if state.vcpus.len() != self.vcpus.len() {
            return Err(Error::Mismatch("the number of vCPUs differs"));
        }
        let memory = GuestMemory::of_image(image, self.premapped)?;
        // Before KVM looks at the guest's memory, which it does when it takes a state in.
        faults.map_or(Ok(()), |faults| faults.watch(memory.mapping()))?;
        let HostModel { tsc_khz: host_khz, tsc_shift, .. } = self.handles.host.model;
        let rate = TscRate::new(state.tsc_khz, host_khz);
        // Captured on a host whose counters run at another speed, the guest goes on with the one that it has
        // measured.
        if let Some(khz) = rate.scaled() {
            self.vcpus.iter().try_for_each(|vcpu| vcpu.set_tsc_khz(khz))?;
        }
        let time = if tsc_shift { time } else { time.of_unshifted(state.vcpus.first(), rate) };
        let set = self.vm.restore(&state.vm, time)?;
        let captured_ns = state.vm.clock_ns();
        kvm::set_counters(&self.vcpus, &state.vcpus, (captured_ns, set), rate, time)?;
        self.vcpus.iter_mut().zip(&state.vcpus).try_for_each(|(vcpu, state)| vcpu.restore(state))?;
        // What its clock shows more than at the capture has passed since.
        let clock_began_ns = set.host.raw_ns.saturating_sub(set.clock_ns.saturating_sub(captured_ns));
        Ok(RestoredVm { vm: self.vm, vcpus: self.vcpus, memory, clock_began_ns })
    }
}

/// A KVM VM with vCPUs and memory, restored.
#[derive(Debug)]
pub(super) struct RestoredVm {
    pub(super) vm: Vm,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) memory: GuestMemory,
    pub(super) clock_began_ns: u64,
}

/// A machine that could run, but has no identity yet.
#[derive(Debug)]
#[must_use]
pub struct AnonymousMachine {
    handles: Arc<HostHandles>,
    config: VmShape,
    vm: Arc<VmHandle>,
    memory: GuestMemory,
    control_page: ControlPage,
    devices: Devices,
    vcpus: Vec<Vcpu>,
    tsc_khz: Option<u32>,
    clock_began_ns: Option<u64>,
    faults: Option<Faults>,
}

impl AnonymousMachine {
    /// Gives it the identity, and with that makes it a machine.
    pub fn with_identity(self, identity: VmIdentity) -> Built {
        let Self {
            handles,
            config,
            vm,
            memory,
            control_page,
            devices,
            vcpus,
            tsc_khz,
            clock_began_ns,
            faults,
        } = self;
        let machine = Machine {
            handles,
            config,
            vm,
            memory: Mutex::new(memory),
            control_page,
            devices,
            vcpu_barrier: VcpuBarrier::new(&vcpus),
            spare_vm: SpareVm::default(),
            exits: Exits::default(),
            tsc_khz,
            clock_began_ns,
            faults: Mutex::new(faults),
            identity: Mutex::new(identity),
        };
        (machine, vcpus)
    }
}
