//! What each VM is and has, for the operator.

use std::{fs, io, time::Instant};

use uuid::Uuid;

use super::{Platform, registry::Entry};
use crate::api::{Memory, State, Vm, Vms};

impl Platform {
    /// All VMs. Their memory is read from `/proc`; they don't notice.
    pub fn vms(&self) -> Vms {
        let (vms, ended) = self.registry.list(vm);
        // Without the registry's lock: it takes a moment for each.
        let vms = vms.into_iter().map(|vm| Vm { memory: memory(vm.pid).ok(), ..vm }).collect();
        Vms { vms, ended }
    }
}

fn vm(entry: &Entry) -> Vm {
    let uptime = Instant::now().saturating_duration_since(entry.since);
    Vm {
        id: entry.vm.id,
        name: entry.vm.name.clone(),
        vm_type: entry.vm.vm_type.clone(),
        parent: Some(entry.vm.parent).filter(|parent| *parent != Uuid::nil()),
        generation: entry.vm.generation,
        state: if entry.runs { State::Running } else { State::Launching },
        pid: entry.pid,
        uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
        vcpus: entry.config.vcpus,
        ram_bytes: entry.config.ram_bytes,
        memory: None,
    }
}

/// The memory of a process.
fn memory(pid: u32) -> io::Result<Memory> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let sum = |names: &[&str]| text.lines().filter_map(|line| kib(line, names)).sum::<u64>() << 10;
    Ok(Memory {
        private_bytes: sum(&["Private_Clean:", "Private_Dirty:"]),
        shared_bytes: sum(&["Shared_Clean:", "Shared_Dirty:"]),
        proportional_bytes: sum(&["Pss:"]),
    })
}

/// The number of a line such as `Pss:      12 kB`, where it has one of these names.
fn kib(line: &str, names: &[&str]) -> Option<u64> {
    let mut words = line.split_ascii_whitespace();
    words.next().filter(|name| names.contains(name))?;
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory() {
        let memory = memory(std::process::id()).unwrap();
        assert!(memory.private_bytes > 4096);
        assert!(memory.proportional_bytes >= memory.private_bytes);
        assert_eq!(kib("Private_Dirty:       12 kB", &["Private_Dirty:"]), Some(12));
        assert_eq!(kib("Private_Hugetlb:     12 kB", &["Private_Dirty:"]), None);
    }
}
