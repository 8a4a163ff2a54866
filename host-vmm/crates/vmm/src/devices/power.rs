//! Power off and reset: ACPI's sleep control and reset registers, and the keyboard controller's reset line. They have no state.

use crate::arch::layout::{I8042_PORT, RESET_PORT, SLEEP_CONTROL_PORT};

/// Sleep type of S5, "soft off", as the DSDT names it.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// What the FADT tells the guest to write to the reset register.
pub const RESET_VALUE: u8 = 1;

/// Sleep control register: the sleep type stands in bits 2 to 4, and bit 5 makes it so (ACPI 6.5, 4.8.3.7).
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Keyboard controller command: pulse the reset line.
const I8042_RESET: u8 = 0xfe;

/// What a guest does with its power switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerEvent {
    /// It switched itself off.
    Off,
    /// It reset itself: a reboot, or a panic with `panic=-1`.
    Reset,
}

/// Serves a write to one of the power ports.
pub(super) fn write(port: u16, value: u8) -> Option<PowerEvent> {
    match (port, value) {
        (SLEEP_CONTROL_PORT, value) if value == SLEEP_ENABLE | SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT => {
            Some(PowerEvent::Off)
        }
        (RESET_PORT, RESET_VALUE) | (I8042_PORT, I8042_RESET) => Some(PowerEvent::Reset),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_values_do_something() {
        assert_eq!(write(SLEEP_CONTROL_PORT, 0x34), Some(PowerEvent::Off));
        assert_eq!(write(SLEEP_CONTROL_PORT, 0x14), None);
        assert_eq!(write(RESET_PORT, 1), Some(PowerEvent::Reset));
        assert_eq!(write(RESET_PORT, 0), None);
        assert_eq!(write(I8042_PORT, 0xfe), Some(PowerEvent::Reset));
        assert_eq!(write(I8042_PORT, 0xed), None);
    }
}
