//! The serial console: a 16550 (vm-superio's), its interrupt, and where its output goes.

use std::{fs::File, sync::Arc};

use serde::{Deserialize, Serialize};
use vm_superio::{
    Trigger,
    serial::{Error as SerialError, NoEvents, Serial as Uart},
};

use super::{
    Device, Error, Seat,
    bus::{Action, Registers},
};
use crate::{
    arch::layout::SERIAL_GSI,
    kvm::{self, VmHandle},
};

/// The console's interrupt line.
#[derive(Debug)]
struct Interrupt(Arc<VmHandle>);

impl Trigger for Interrupt {
    type E = kvm::Error;

    fn trigger(&self) -> Result<(), kvm::Error> {
        self.0.get().pulse(SERIAL_GSI)
    }
}

/// The serial console.
#[derive(Debug)]
pub(super) struct Serial {
    uart: Uart<Interrupt, NoEvents, File>,
    /// Whether something was written to it since it was made; not part of the state.
    has_output: bool,
}

/// All registers of the console, and the input that the guest has not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl SerialState {
    /// The state after power-on.
    pub(super) fn power_on() -> Self {
        vm_superio::SerialState::default().into()
    }
}

impl Serial {
    /// A console as it is after power-on.
    pub(super) fn power_on(vm: &Arc<VmHandle>, output: File) -> Self {
        Self { uart: Uart::new(Interrupt(Arc::clone(vm)), output), has_output: false }
    }

    /// A console with this state. An interrupt that was pending is raised again.
    pub(super) fn restore(state: &SerialState, vm: &Arc<VmHandle>, output: File) -> Result<Self, Error> {
        let uart = Uart::from_state(&state.into(), Interrupt(Arc::clone(vm)), NoEvents, output)
            .map_err(|error| Error::State { device: Self::NAME, why: error.to_string() })?;
        Ok(Self { uart, has_output: false })
    }

    /// Writes a register. Output that nobody takes, since the platform is gone, is lost; the guest can't help
    /// it.
    fn write(&mut self, register: u8, value: u8) {
        self.has_output |= register == 0;
        if let Err(error) = self.uart.write(register, value) {
            tracing::debug!(%error, "a byte of console output is lost");
        }
    }

    /// Whether the guest has written something since the console was made, here or from a state.
    pub(super) fn has_output(&self) -> bool {
        self.has_output
    }

    /// Takes input for as far as there is room, and returns for how many bytes that was.
    pub(super) fn input(&mut self, bytes: &[u8]) -> Result<usize, Error> {
        let room = self.uart.fifo_capacity().min(bytes.len());
        match self.uart.enqueue_raw_bytes(&bytes[..room]) {
            Ok(taken) => Ok(taken),
            Err(SerialError::FullFifo) => Ok(0),
            Err(error) => Err(Error::Console(error.to_string())),
        }
    }
}

impl Device for Serial {
    const NAME: &'static str = "serial";
    const VERSION: u32 = 1;
    type State = SerialState;

    fn save(&self) -> Result<SerialState, Error> {
        Ok(self.uart.state().into())
    }
}

/// Registers of one byte each.
impl Registers for Seat<Serial> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            *byte = self.access().uart.read(register);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<Action> {
        if let (Ok(register), [byte]) = (u8::try_from(offset), data) {
            self.access().write(register, *byte);
        }
        None
    }
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(state: vm_superio::SerialState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }
}

impl From<&SerialState> for vm_superio::SerialState {
    fn from(state: &SerialState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        }
    }
}
