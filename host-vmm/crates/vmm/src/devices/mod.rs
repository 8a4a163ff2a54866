//! The devices of a VM, and where each of them answers.
//!
//! A device's state stands beside the device; [`DevicesState`] holds them all, so that a fork can forget
//! none. A new device gets a file here, its addresses and interrupt in [`layout`](crate::arch::layout), a row
//! in [`VERSIONS`], and a place in [`Devices`], [`DevicesState`] and [`PausedDevices`]; the kernel is told of
//! it in [`boot`](crate::boot).

use std::{fs::File, io, sync::Arc};

use serde::{Deserialize, Serialize};
use types::PAGE_BYTES;

pub mod bus;
mod control_page;
mod device;
mod doorbell;
mod generation_id;
pub mod power;
mod serial;

pub use control_page::{ControlPage, ControlPageState, GENERATION_ID_OFFSET};
pub use device::Device;
pub use generation_id::GENERATION_ID_BYTES;
pub use serial::SerialState;

use crate::{
    arch::layout::{
        CONTROL_PAGE, CONTROL_REGION_BYTES, DOORBELL_PORT, GENERATION_ID, I8042_PORT, IO_APIC,
        KVM_IDENTITY_MAP, KVM_TSS, LOCAL_APIC, RESET_PORT, SERIAL_PORT, SLEEP_CONTROL_PORT, ram_pieces,
    },
    kvm::{self, VmHandle},
    memory,
};
use bus::{Action, Bus, Overlap, Range, Space};
use device::{Paused, Seat, version};
use doorbell::Doorbell;
use generation_id::GenerationId;
use power::PowerRegister;
use serial::Serial;

/// Devices whose state, or whose interface, a guest takes with it, and their versions.
pub const VERSIONS: &[(&str, u32)] =
    &[version::<ControlPage>(), version::<Serial>(), version::<GenerationId>()];

/// Why a device can't be built, used or saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The state is not one that the device can have.
    #[error("the state of the device {device} is not valid: {why}")]
    State {
        /// Name of the device.
        device: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Console input could not be announced to the guest.
    #[error("the serial console can't take input: {0}")]
    Console(String),
    /// No VM generation ID could be drawn.
    #[error("the system has no random bytes for the VM's generation ID")]
    Random(#[source] io::Error),
    /// A page of a device can't be read or written.
    #[error("the memory of a device can't be used")]
    Memory(#[from] memory::Error),
    /// An interrupt can't be raised.
    #[error("a device can't raise its interrupt")]
    Kvm(#[from] kvm::Error),
    /// Two devices have an address in common.
    #[error("the devices don't fit together")]
    Overlap(#[from] Overlap),
}

/// All devices of one VM but the control page, which no access traps to.
#[derive(Debug)]
pub struct Devices {
    bus: Bus,
    serial: Arc<Seat<Serial>>,
    generation_id: GenerationId,
}

/// State of all devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DevicesState {
    serial: SerialState,
    /// Whether the guest was told at its boot of a VM generation ID: of its interrupt, too.
    has_generation_id: bool,
}

impl DevicesState {
    /// The state after power-on.
    pub fn power_on() -> Self {
        Self { serial: SerialState::power_on(), has_generation_id: true }
    }

    /// Whether the guest knows of a VM generation ID.
    pub fn has_generation_id(&self) -> bool {
        self.has_generation_id
    }
}

/// State of all devices in capsules of before there was a VM generation ID.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OlderDevicesState {
    serial: SerialState,
}

impl From<OlderDevicesState> for DevicesState {
    fn from(OlderDevicesState { serial }: OlderDevicesState) -> Self {
        Self { serial, has_generation_id: false }
    }
}

#[cfg(any(test, feature = "samples"))]
impl From<DevicesState> for OlderDevicesState {
    fn from(DevicesState { serial, .. }: DevicesState) -> Self {
        Self { serial }
    }
}

/// All devices, paused.
#[derive(Debug)]
#[must_use]
pub struct PausedDevices<'d> {
    serial: Paused<'d, Serial>,
    generation_id: &'d GenerationId,
}

impl PausedDevices<'_> {
    /// Saves the state of all devices.
    ///
    /// # Errors
    /// [`Error`] of the first one that can't be saved.
    pub fn save(&self) -> Result<DevicesState, Error> {
        Ok(DevicesState { serial: self.serial.save()?, has_generation_id: self.generation_id.save()? })
    }
}

impl Devices {
    /// Devices of a VM with so much RAM that is about to boot. The console writes to `output`.
    ///
    /// # Errors
    /// [`Error`] where one can't be built.
    pub fn power_on(
        vm: &Arc<VmHandle>,
        ram_bytes: u64,
        control_page: &ControlPage,
        output: File,
    ) -> Result<Self, Error> {
        Self::assemble(ram_bytes, Serial::power_on(vm, output), GenerationId::power_on(control_page)?)
    }

    /// Devices of a copy, whose VM and vCPUs have their state already.
    ///
    /// # Errors
    /// [`Error`] where a state is not one that the device can have.
    pub fn restore(
        state: &DevicesState,
        vm: &Arc<VmHandle>,
        ram_bytes: u64,
        control_page: &ControlPage,
        output: File,
    ) -> Result<Self, Error> {
        let serial = Serial::restore(&state.serial, vm, output)?;
        let generation_id = GenerationId::restore(state.has_generation_id, control_page, vm)?;
        Self::assemble(ram_bytes, serial, generation_id)
    }

    fn assemble(ram_bytes: u64, serial: Serial, generation_id: GenerationId) -> Result<Self, Error> {
        let serial = Arc::new(Seat::new(serial));
        let mut bus = address_map(ram_bytes)?;
        bus.attach(Range::ports(SERIAL_PORT, 8), "serial", Arc::clone(&serial) as _)?;
        Ok(Self { bus, serial, generation_id })
    }

    /// Lets the devices run, before the first vCPU does.
    pub fn run(&self) {
        self.serial.run();
    }

    /// Pauses the devices, until the result is dropped. All vCPUs have stopped.
    pub fn pause(&self) -> PausedDevices<'_> {
        PausedDevices { serial: self.serial.pause(), generation_id: &self.generation_id }
    }

    /// Serves a read. Where there is no device, all bits read as one.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        self.bus.read(space, address, data);
    }

    /// Serves a write. Where there is no device, nothing happens.
    pub fn write(&self, space: Space, address: u64, data: &[u8]) -> Option<Action> {
        self.bus.write(space, address, data)
    }

    /// Whether the guest knows of a VM generation ID. Waits for no fork, unlike the other questions.
    pub fn has_generation_id(&self) -> bool {
        self.generation_id.is_known()
    }

    /// Whether the guest has written to its console since it was booted, or copied.
    pub fn has_output(&self) -> bool {
        self.serial.access().has_output()
    }

    /// Gives the console as many of these bytes as it takes now, and returns how many that were.
    ///
    /// # Errors
    /// [`Error::Console`] where the guest can't be told.
    pub fn console_input(&self, bytes: &[u8]) -> Result<usize, Error> {
        self.serial.access().input(bytes)
    }
}

/// The bus of a VM with all that has no state, and all that is there without an exit.
fn address_map(ram_bytes: u64) -> Result<Bus, Overlap> {
    let mut bus = Bus::default();
    for piece in ram_pieces(ram_bytes) {
        bus.occupy(Range::memory(piece.gpa, piece.bytes), "RAM")?;
    }
    for (start, bytes, owner) in [
        (CONTROL_PAGE, CONTROL_REGION_BYTES, "control page"),
        (GENERATION_ID, PAGE_BYTES, "generation ID"),
        (IO_APIC, PAGE_BYTES, "I/O APIC"),
        (LOCAL_APIC, PAGE_BYTES, "local APIC"),
        (KVM_IDENTITY_MAP, PAGE_BYTES, "KVM's identity map"),
        (KVM_TSS, 3 * PAGE_BYTES, "KVM's task state"),
    ] {
        bus.occupy(Range::memory(start, bytes), owner)?;
    }
    bus.attach(Range::ports(DOORBELL_PORT, 4), "doorbell", Arc::new(Doorbell))?;
    for (port, register) in [
        (SLEEP_CONTROL_PORT, PowerRegister::SleepControl),
        (RESET_PORT, PowerRegister::Reset),
        (I8042_PORT, PowerRegister::KeyboardController),
    ] {
        bus.attach(Range::ports(port, 1), "power", Arc::new(register))?;
    }
    Ok(bus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{MAX_RAM_BYTES, MIN_RAM_BYTES};

    #[test]
    fn no_two_devices_share_an_address_whatever_the_size_of_the_memory() {
        for bytes in [MIN_RAM_BYTES, 3 << 30, (3 << 30) + PAGE_BYTES, MAX_RAM_BYTES] {
            address_map(bytes).unwrap();
        }
    }

    #[test]
    fn the_table_of_versions_has_each_name_once() {
        let names: Vec<_> = VERSIONS.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["control-page", "serial", "generation-id"]);
    }
}
