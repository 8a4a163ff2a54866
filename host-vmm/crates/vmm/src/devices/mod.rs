//! The devices of a VM, and which port is whose.
//!
//! A device's state stands beside the device; [`DevicesState`] holds them all, so that a fork can forget none.

use std::{
    fs::File,
    sync::{Arc, Mutex, MutexGuard},
};

use base::sync::lock;
use serde::{Deserialize, Serialize};

mod control_page;
pub mod power;
mod serial;

pub use control_page::{ControlPage, ControlPageState, GENERATION_ID_BYTES, GENERATION_ID_OFFSET, new_generation_id};
pub use serial::{Error, Serial, SerialState};

use crate::{
    arch::layout::{I8042_PORT, RESET_PORT, SERIAL_PORT, SLEEP_CONTROL_PORT},
    kvm::CurrentVm,
};
use power::PowerEvent;

/// Devices whose state, or whose interface, a guest takes with it, and their versions.
pub const VERSIONS: &[(&str, u32)] =
    &[("control-page", vmfork_abi::ABI_VERSION), ("serial", serial::VERSION), ("generation-id", 1)];

/// Ports of the serial console behind its first one.
const SERIAL_LAST_PORT: u16 = SERIAL_PORT + 7;

/// All devices of one VM but the control page, which no access traps to.
#[derive(Debug)]
pub struct Devices {
    serial: Mutex<Serial>,
    has_generation_id: bool,
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

/// Devices that stand still.
#[derive(Debug)]
#[must_use]
pub struct Paused<'d> {
    serial: MutexGuard<'d, Serial>,
    has_generation_id: bool,
}

impl Paused<'_> {
    /// The state.
    pub fn save(&self) -> DevicesState {
        DevicesState { serial: self.serial.save(), has_generation_id: self.has_generation_id }
    }
}

impl Devices {
    /// The devices of a VM that is about to boot. The console writes to `output`.
    pub fn new(vm: &Arc<CurrentVm>, output: File) -> Self {
        Self { serial: Mutex::new(Serial::new(vm, output)), has_generation_id: true }
    }

    /// The devices of a copy.
    ///
    /// # Errors
    /// [`Error`] where a state is not one that the device can have.
    pub fn restore(state: &DevicesState, vm: &Arc<CurrentVm>, output: File) -> Result<Self, Error> {
        let serial = Mutex::new(Serial::restore(&state.serial, vm, output)?);
        Ok(Self { serial, has_generation_id: state.has_generation_id })
    }

    /// Keeps the devices as they are: nothing from outside reaches them, and they raise no interrupt, until the result is dropped.
    pub fn pause(&self) -> Paused<'_> {
        Paused { serial: lock(&self.serial), has_generation_id: self.has_generation_id }
    }

    /// Serves a read of a port. Where there is no device, all bits read as one.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (SERIAL_PORT..=SERIAL_LAST_PORT, [byte]) = (port, data) {
            *byte = lock(&self.serial).read(port - SERIAL_PORT);
        }
    }

    /// Serves a write to a port. Where there is no device, nothing happens.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Option<PowerEvent> {
        match (port, data) {
            (SERIAL_PORT..=SERIAL_LAST_PORT, [byte]) => {
                lock(&self.serial).write(port - SERIAL_PORT, *byte);
                None
            }
            (SLEEP_CONTROL_PORT | RESET_PORT | I8042_PORT, [byte]) => power::write(port, *byte),
            _ => None,
        }
    }

    /// Whether the guest knows of a VM generation ID. One that an older program has booted does not, and the
    /// interrupt would be nobody's there.
    pub fn has_generation_id(&self) -> bool {
        self.has_generation_id
    }

    /// Whether the guest has written to its console since it was booted, or copied.
    pub fn has_output(&self) -> bool {
        lock(&self.serial).has_output()
    }

    /// Gives the console as many of these bytes as it takes now, and returns how many that were.
    ///
    /// # Errors
    /// [`Error::Console`] where the guest can't be told.
    pub fn console_input(&self, bytes: &[u8]) -> Result<usize, Error> {
        lock(&self.serial).input(bytes)
    }
}
