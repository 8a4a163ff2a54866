//! What each VM is and has, for the operator.

use std::{
    collections::BTreeMap,
    fs, io,
    sync::Weak,
    time::{Duration, Instant},
};

use api::{Memory, State, Vm, Vms};
use uuid::Uuid;

use super::{
    Error, Platform,
    logs::{Follower, Piece},
    registry::Entry,
};

/// How long it is waited for the end of a VM that is stopped.
const END_TIMEOUT: Duration = Duration::from_secs(30);

impl Platform {
    /// All VMs. Their memory is read from `/proc`; they don't notice.
    pub fn vms(&self) -> Vms {
        let (vms, ended) = self.registry.list(vm);
        // Without the registry's lock: it takes a moment for each.
        let vms = vms.into_iter().map(|vm| Vm { memory: memory(vm.pid).ok(), ..vm }).collect();
        Vms { vms, ended }
    }

    /// One VM, by its name, its ID, or how that begins.
    ///
    /// # Errors
    /// [`Error::NoVm`] or [`Error::AmbiguousVm`].
    pub fn vm(&self, named: &str) -> Result<Vm, Error> {
        let vm = self.registry.get(self.find_vm(named)?, vm).ok_or_else(|| Error::NoVm(named.to_owned()))?;
        Ok(Vm { memory: memory(vm.pid).ok(), ..vm })
    }

    /// Ends one VM, and waits until it has ended. One that has ended already stays as it is, for as long as
    /// it is known.
    ///
    /// # Errors
    /// As [`Platform::vm`], or [`Error::Lingers`].
    pub fn stop_vm(&self, named: &str) -> Result<(), Error> {
        let id = self.find_vm(named)?;
        if self.registry.end(id, END_TIMEOUT) { Ok(()) } else { Err(Error::Lingers(id)) }
    }

    /// Waits until a VM has written something at an offset of its console's log, or has ended, or the time is
    /// over.
    ///
    /// # Errors
    /// As [`Platform::vm`].
    pub(crate) async fn await_log(&self, named: &str, from: u64, limit: Duration) -> Result<(), Error> {
        if let Some(log) = self.consoles.logs().find(self.find_vm(named)?) {
            tokio::time::timeout(limit, log.reaches(from)).await.unwrap_or(());
        }
        Ok(())
    }

    /// Says that somebody follows a log: for as long as it is there, or is to come again, the platform does
    /// not come to its end.
    pub(crate) fn follow_log(&self) -> Follower {
        self.consoles.logs().follow()
    }

    /// What a VM has written to its console, from an offset on; that of one that has ended too, for as long
    /// as it is known.
    ///
    /// # Errors
    /// As [`Platform::vm`], or [`Error::ReadLog`].
    pub(crate) fn log(&self, named: &str, from: u64) -> Result<Piece, Error> {
        let id = self.find_vm(named)?;
        match self.consoles.logs().find(id) {
            Some(log) => log.read(from).map_err(|source| Error::ReadLog { vm: id, source }),
            // It does not run yet, or its log is forgotten.
            None => {
                Ok(Piece { bytes: Vec::new(), next: from, is_last: self.registry.get(id, |_| ()).is_none() })
            }
        }
    }

    /// The ID of the VM that is called so, or whose ID begins so.
    pub(crate) fn find_vm(&self, named: &str) -> Result<Uuid, Error> {
        let known = self.consoles.logs().known().into_iter().chain(self.registry.known());
        which(named, &known.collect())
    }
}

/// The ID of the VM that is meant.
fn which(named: &str, known: &BTreeMap<Uuid, String>) -> Result<Uuid, Error> {
    if let Some((id, _)) = known.iter().find(|(_, name)| *name == named) {
        return Ok(*id);
    }
    let mut found = known.keys().filter(|id| !named.is_empty() && id.to_string().starts_with(named));
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(*id),
        (None, _) => Err(Error::NoVm(named.to_owned())),
        (Some(_), Some(_)) => Err(Error::AmbiguousVm(named.to_owned())),
    }
}

fn vm(entry: &Entry) -> Vm {
    let uptime = Instant::now().saturating_duration_since(entry.since);
    let postcopy = entry.postcopy.as_ref().and_then(Weak::upgrade).filter(|postcopy| !postcopy.is_over());
    Vm {
        id: entry.vm.id,
        name: entry.vm.name.clone(),
        vm_type: entry.vm.vm_type.clone(),
        parent: Some(entry.vm.parent).filter(|parent| *parent != Uuid::nil()),
        generation: entry.vm.generation,
        state: match (entry.runs, &postcopy) {
            (false, _) => State::Launching,
            (true, Some(_)) => State::Dependent,
            (true, None) => State::Running,
        },
        pid: entry.pid,
        uptime_ms: u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
        vcpus: entry.config.vcpus,
        ram_bytes: entry.config.ram_bytes,
        sealed: is_sealed(entry, postcopy.is_some()),
        generation_id: entry.generation_id,
        missing_bytes: postcopy.map(|postcopy| postcopy.missing_bytes()),
        memory: None,
    }
}

/// Whether the images are sealed that a VM's memory is a view of, if it is one.
fn is_sealed(entry: &Entry, is_being_filled: bool) -> Option<bool> {
    let are_sealed = || !is_being_filled && entry.seals.iter().all(|seal| seal.is_sealed());
    (!entry.seals.is_empty()).then(are_sealed)
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
    fn a_vm_is_meant_by_its_name_or_how_its_id_begins() {
        let id = |text: &str| text.parse::<Uuid>().unwrap();
        let (one, other) =
            (id("deb00000-0000-4000-8000-000000000001"), id("deb00000-0000-4000-8000-000000000002"));
        let third = id("ab000000-0000-4000-8000-000000000003");
        let known =
            [(one, "vm"), (other, "web.1"), (third, "deb")].map(|(id, name)| (id, name.to_owned())).into();
        let find = |named: &str| which(named, &known);
        assert_eq!(find("vm").unwrap(), one);
        assert_eq!(find("ab").unwrap(), third);
        assert_eq!(find(&other.to_string()).unwrap(), other);
        assert_eq!(find("deb").unwrap(), third, "a name comes first");
        assert!(matches!(find("deb0"), Err(Error::AmbiguousVm(_))));
        for unknown in ["", "web", "web.2", "../vm", "00000001", "DEB00000-0000-4000-8000-000000000001"] {
            assert!(matches!(find(unknown), Err(Error::NoVm(_))), "{unknown}");
        }
    }

    #[test]
    fn this_process_has_memory() {
        let memory = memory(std::process::id()).unwrap();
        assert!(memory.private_bytes > 4096);
        assert!(memory.proportional_bytes >= memory.private_bytes);
        assert_eq!(kib("Private_Dirty:       12 kB", &["Private_Dirty:"]), Some(12));
        assert_eq!(kib("Private_Hugetlb:     12 kB", &["Private_Dirty:"]), None);
    }
}
