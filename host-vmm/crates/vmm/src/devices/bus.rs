//! The bus: which device answers at an I/O port or a guest-physical address.
//!
//! Ranges are claimed when a VM is built, and no two may overlap: what lies in memory without an exit (RAM,
//! pages that are mapped, what KVM emulates) is claimed as well. Nothing that a guest does changes the bus.

use std::{fmt, sync::Arc};

use crate::arch::layout::Gpa;

/// Address space of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Space {
    /// I/O ports.
    Ports,
    /// Guest-physical memory.
    Memory,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ports => "I/O ports",
            Self::Memory => "guest-physical memory",
        })
    }
}

/// Range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    space: Space,
    start: u64,
    bytes: u64,
}

impl Range {
    /// `count` I/O ports from `first` on.
    pub const fn ports(first: u16, count: u16) -> Self {
        Self { space: Space::Ports, start: first as u64, bytes: count as u64 }
    }

    /// `bytes` bytes of guest-physical memory from `start` on.
    pub const fn memory(start: Gpa, bytes: u64) -> Self {
        Self { space: Space::Memory, start: start.0, bytes }
    }

    /// First address behind the range.
    fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.space == other.space && self.start < other.end() && other.start < self.end()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:#x}..{:#x}", self.space, self.start, self.end())
    }
}

/// Action that a write asks the thread of its vCPU for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// To serve the doorbell: this command, or `None` where the access was malformed.
    Ring(Option<u32>),
    /// To end the VM: its guest has switched it off.
    PowerOff,
    /// To end the VM: its guest has reset it, by a reboot or a panic with `panic=-1`.
    Reset,
}

/// Registers of a device, as vCPUs read and write them.
///
/// An access lies in the device's range as a whole. It may have any size, and come from several vCPUs at
/// once.
pub trait Registers: fmt::Debug + Send + Sync {
    /// Reads at an offset of the range. `data` holds ones, which stay where nothing answers.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes at an offset of the range.
    fn write(&self, offset: u64, data: &[u8]) -> Option<Action>;
}

/// Claim of a range.
#[derive(Debug)]
struct Claim {
    range: Range,
    owner: &'static str,
    /// `None` where accesses have no exit.
    registers: Option<Arc<dyn Registers>>,
}

/// Two claims of one address: a fault of the program's.
#[derive(Debug, thiserror::Error)]
#[error("{owner} claims {range}, of which {other} has {taken}: change one of them in arch/layout.rs")]
pub struct Overlap {
    owner: &'static str,
    range: Range,
    other: &'static str,
    taken: Range,
}

/// The bus of one VM.
#[derive(Debug, Default)]
pub struct Bus {
    /// By space and address.
    claims: Vec<Claim>,
}

impl Bus {
    /// Claims a range for registers.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn attach(
        &mut self,
        range: Range,
        owner: &'static str,
        registers: Arc<dyn Registers>,
    ) -> Result<(), Overlap> {
        self.insert(Claim { range, owner, registers: Some(registers) })
    }

    /// Claims a range in which accesses have no exit.
    ///
    /// # Errors
    /// [`Overlap`].
    pub fn occupy(&mut self, range: Range, owner: &'static str) -> Result<(), Overlap> {
        self.insert(Claim { range, owner, registers: None })
    }

    fn insert(&mut self, claim: Claim) -> Result<(), Overlap> {
        let at = self.claims.partition_point(|other| other.range < claim.range);
        let neighbours = self.claims[..at].last().into_iter().chain(self.claims.get(at));
        for Claim { range: taken, owner: other, .. } in neighbours {
            if taken.overlaps(&claim.range) {
                return Err(Overlap { owner: claim.owner, range: claim.range, other, taken: *taken });
            }
        }
        self.claims.insert(at, claim);
        Ok(())
    }

    /// Serves a read. Where no device answers, all bits read as one.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((registers, offset)) = self.find(space, address, data.len()) {
            registers.read(offset, data);
        }
    }

    /// Serves a write. Where there is no device, nothing happens.
    pub fn write(&self, space: Space, address: u64, data: &[u8]) -> Option<Action> {
        let (registers, offset) = self.find(space, address, data.len())?;
        registers.write(offset, data)
    }

    /// Registers in whose range the whole access lies, and its offset there.
    fn find(&self, space: Space, address: u64, bytes: usize) -> Option<(&dyn Registers, u64)> {
        let behind =
            self.claims.partition_point(|claim| (claim.range.space, claim.range.start) <= (space, address));
        let Claim { range, registers, .. } = self.claims.get(behind.checked_sub(1)?)?;
        let end = address.checked_add(u64::try_from(bytes).ok()?)?;
        let is_inside = range.space == space && end <= range.end();
        Some((registers.as_deref().filter(|_| is_inside)?, address - range.start))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use base::sync::lock;

    use super::*;

    /// Registers that keep what is written to them.
    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Registers for Log {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&self, offset: u64, data: &[u8]) -> Option<Action> {
            lock(&self.0).push((offset, data.to_vec()));
            None
        }
    }

    #[test]
    fn an_access_reaches_the_device_in_whose_range_all_of_it_lies() {
        let (log, mut bus) = (Arc::new(Log::default()), Bus::default());
        bus.attach(Range::ports(0x10, 4), "log", log.clone()).unwrap();
        bus.attach(Range::memory(Gpa(0x10), 4), "log", log.clone()).unwrap();
        bus.occupy(Range::memory(Gpa(0x20), 4), "a page").unwrap();
        for (space, address, bytes, expected) in [
            (Space::Ports, 0x10, 1, Some(0)),
            (Space::Ports, 0x12, 2, Some(2)),
            (Space::Memory, 0x10, 4, Some(0)),
            (Space::Ports, 0x12, 4, None),
            (Space::Ports, 0x0f, 2, None),
            (Space::Ports, 0x14, 1, None),
            (Space::Memory, 0x20, 1, None),
            (Space::Memory, u64::MAX, 8, None),
        ] {
            let mut data = vec![0; bytes];
            bus.read(space, address, &mut data);
            assert_eq!(data, vec![expected.unwrap_or(0xff); bytes], "{space} {address:#x}");
            assert_eq!(bus.write(space, address, &data), None);
            let written = lock(&log.0).pop();
            assert_eq!(written, expected.map(|offset| (u64::from(offset), data)), "{space} {address:#x}");
        }
    }

    #[test]
    fn ranges_that_overlap_are_refused_whichever_comes_first() {
        for (taken, claimed, is_free) in [
            (Range::ports(0x10, 4), Range::ports(0x13, 1), false),
            (Range::ports(0x10, 4), Range::ports(0x14, 1), true),
            (Range::ports(0x10, 4), Range::ports(0x0f, 1), true),
            (Range::ports(0x10, 4), Range::ports(0x00, 0x100), false),
            (Range::ports(0x10, 4), Range::ports(0x10, 4), false),
            (Range::ports(0x10, 4), Range::memory(Gpa(0x10), 4), true),
            (Range::memory(Gpa(0), u64::MAX), Range::memory(Gpa(0x10), 4), false),
        ] {
            for (first, second) in [(taken, claimed), (claimed, taken)] {
                let mut bus = Bus::default();
                bus.occupy(first, "one").unwrap();
                let result = bus.occupy(second, "another");
                assert_eq!(result.is_ok(), is_free, "{first}, {second}: {result:?}");
            }
        }
    }

    #[test]
    fn an_overlap_names_both() {
        let mut bus = Bus::default();
        bus.occupy(Range::ports(0x3f8, 8), "serial").unwrap();
        let error = bus.occupy(Range::ports(0x3ff, 1), "doorbell").unwrap_err().to_string();
        assert!(error.starts_with("doorbell claims I/O ports 0x3ff..0x400, of which serial has"), "{error}");
    }
}
