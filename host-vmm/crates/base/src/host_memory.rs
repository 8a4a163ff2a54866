//! The memory of this host, as Linux tells it.

use std::{fs, io};

const MEMINFO: &str = "/proc/meminfo";

/// Why a host's memory can't be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("can't read {MEMINFO}: is /proc mounted?")]
    Read(#[source] io::Error),
    /// A line is missing, or holds no number.
    #[error("{MEMINFO} has no {0} in kB: Linux has it since 3.14")]
    Missing(&'static str),
}

/// Memory of a host in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total: u64,
    /// What new programs can have without swapping: `MemAvailable`.
    pub available: u64,
}

impl HostMemory {
    /// That of this host, at present.
    ///
    /// # Errors
    /// [`Error`].
    pub fn read() -> Result<Self, Error> {
        Self::parse(&fs::read_to_string(MEMINFO).map_err(Error::Read)?)
    }

    /// From the text of `/proc/meminfo`.
    fn parse(text: &str) -> Result<Self, Error> {
        let bytes = |name: &'static str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
            number.and_then(|kib| kib.checked_mul(1024)).ok_or(Error::Missing(name))
        };
        Ok(Self { total: bytes("MemTotal")?, available: bytes("MemAvailable")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        let text = "MemTotal:       24689764 kB\nMemFree:         1000000 kB\nMemAvailable:   20000000 kB\nBuffers:  1 kB\n";
        let memory = HostMemory { total: 24_689_764 << 10, available: 20_000_000 << 10 };
        assert_eq!(HostMemory::parse(text).unwrap(), memory);
    }

    #[test]
    fn memory_that_is_not_told_is_an_error() {
        for (text, missing) in [
            ("", "MemTotal"),
            ("MemTotal: 1 kB\nMemFree: 1 kB\n", "MemAvailable"),
            ("MemTotal: 1 kB\nMemAvailable: 1\n", "MemAvailable"),
            ("MemTotal: x kB\nMemAvailable: 1 kB\n", "MemTotal"),
            ("MemTotalled: 1 kB\nMemAvailable: 1 kB\n", "MemTotal"),
            ("MemTotal: 18446744073709551615 kB\nMemAvailable: 1 kB\n", "MemTotal"),
        ] {
            let Err(Error::Missing(name)) = HostMemory::parse(text) else { panic!("{text}") };
            assert_eq!(name, missing, "{text}");
        }
    }
}
