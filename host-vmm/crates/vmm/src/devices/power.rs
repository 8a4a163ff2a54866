//! Power off and reset: ACPI's sleep control and reset registers, and the keyboard controller's reset line.
//! They have no state.

use super::bus::{Action, Registers};

/// Sleep type of S5, "soft off", as the DSDT names it.
pub const SLEEP_TYPE_OFF: u8 = 5;

/// Value that the FADT tells the guest to write to the reset register.
pub const RESET_VALUE: u8 = 1;

/// Sleep control register: the sleep type stands in bits 2 to 4, and bit 5 makes it so (ACPI 6.5, 4.8.3.7).
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Keyboard controller command: pulse the reset line.
const I8042_RESET: u8 = 0xfe;

/// Register of one byte, which reads as ones.
#[derive(Debug, Clone, Copy)]
pub(super) enum PowerRegister {
    /// ACPI's sleep control register.
    SleepControl,
    /// ACPI's reset register.
    Reset,
    /// Command port of the keyboard controller.
    KeyboardController,
}

impl Registers for PowerRegister {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, _offset: u64, data: &[u8]) -> Option<Action> {
        let [value] = data else { return None };
        match (self, *value) {
            (Self::SleepControl, value) if value == SLEEP_ENABLE | SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT => {
                Some(Action::PowerOff)
            }
            (Self::Reset, RESET_VALUE) | (Self::KeyboardController, I8042_RESET) => Some(Action::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_values_do_something() {
        for (register, value, action) in [
            (PowerRegister::SleepControl, 0x34, Some(Action::PowerOff)),
            (PowerRegister::SleepControl, 0x14, None),
            (PowerRegister::Reset, 1, Some(Action::Reset)),
            (PowerRegister::Reset, 0, None),
            (PowerRegister::KeyboardController, 0xfe, Some(Action::Reset)),
            (PowerRegister::KeyboardController, 0xed, None),
        ] {
            assert_eq!(register.write(0, &[value]), action, "{register:?} {value:#x}");
        }
        assert_eq!(PowerRegister::Reset.write(0, &[]), None);
    }
}
