//! The doorbell at its I/O port: a guest's user space rings it by a write of 4 bytes.

use super::bus::{Action, Registers};

/// The doorbell. It has no state.
#[derive(Debug)]
pub(super) struct Doorbell;

impl Registers for Doorbell {
    fn read(&self, _offset: u64, _data: &mut [u8]) {}

    fn write(&self, offset: u64, data: &[u8]) -> Option<Action> {
        let command = <[u8; 4]>::try_from(data).ok().filter(|_| offset == 0);
        Some(Action::Ring(command.map(u32::from_le_bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_has_four_bytes() {
        assert_eq!(Doorbell.write(0, &[1, 2, 0, 0]), Some(Action::Ring(Some(0x201))));
        assert_eq!(Doorbell.write(0, &[1]), Some(Action::Ring(None)));
        assert_eq!(Doorbell.write(2, &[1, 0]), Some(Action::Ring(None)));
    }
}
