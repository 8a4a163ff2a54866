//! What this host has to do, and what it has left: its part of a [`Load`].

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
};

use base::{
    host_memory::{self, HostMemory},
    threads,
};

use super::member::Load;

const CPU_PRESSURE: &str = "/proc/pressure/cpu";
const MEMORY_PRESSURE: &str = "/proc/pressure/memory";

/// Reads what this host has to do: its memory, its processors, and what waits for them. What VMs and warm VMs
/// the platform has is its own to fill in, and 0 or empty here.
///
/// # Errors
/// [`host_memory::Error`]: the memory can't be told. A kernel that does not tell what waits (no PSI) is taken
/// for one on which nothing does.
pub fn read() -> Result<Load, host_memory::Error> {
    let memory = HostMemory::read()?;
    Ok(Load {
        processors: u32::try_from(threads::processors()).unwrap_or(u32::MAX),
        cpu_pressure_permille: read_pressure(CPU_PRESSURE),
        memory_pressure_permille: read_pressure(MEMORY_PRESSURE),
        memory_bytes: memory.total,
        memory_available_bytes: memory.available,
        ..Load::default()
    })
}

fn read_pressure(path: &'static str) -> u32 {
    static WAS_TOLD: AtomicBool = AtomicBool::new(false);
    // Where PSI is switched off, the files may be there, and can't be read.
    let pressure = fs::read_to_string(path).map(|text| pressure_permille(&text));
    let told = match pressure {
        Ok(Some(permille)) => return permille,
        Ok(None) => format!("no avg10 in {path}"),
        Err(error) => format!("{path}: {error}"),
    };
    if !WAS_TOLD.swap(true, Ordering::Relaxed) {
        tracing::debug!("this host does not tell what waits for processors and memory ({told})");
    }
    0
}

/// Share of time in which something waited, in thousandths, from the text of a file in `/proc/pressure`: that
/// has percent, with two decimals.
fn pressure_permille(text: &str) -> Option<u32> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let percent = some.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    let (whole, decimals) = percent.split_once('.').unwrap_or((percent, "0"));
    let tenths = decimals.chars().next()?.to_digit(10)?;
    Some(whole.parse::<u32>().ok()?.checked_mul(10)?.checked_add(tenths)?.min(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_in_thousandths() {
        let full = "full avg10=99.00 avg60=0.00 avg300=0.00 total=1\n";
        for (avg10, permille) in [
            ("0.00", 0),
            ("1.23", 12),
            ("0.09", 0),
            ("7", 70),
            ("99.99", 999),
            ("100.00", 1000),
            ("400.00", 1000),
        ] {
            let text = format!("{full}some avg10={avg10} avg60=2.00 avg300=3.00 total=12345\n");
            assert_eq!(pressure_permille(&text), Some(permille), "{avg10}");
        }
        for bad in ["", full, "some avg60=1.00\n", "some avg10=\n", "some avg10=-1.00\n", "some avg10=1.x\n"]
        {
            assert_eq!(pressure_permille(bad), None, "{bad}");
        }
        assert_eq!(pressure_permille("some avg10=99999999999.00"), None);
    }

    #[test]
    fn this_host_has_processors_and_memory() {
        let load = read().unwrap();
        assert!(load.processors > 0 && load.memory_available_bytes > 0);
        assert!(load.memory_available_bytes <= load.memory_bytes);
        assert_eq!((load.vms, load.max_vms, load.draining), (0, 0, false));
    }
}
