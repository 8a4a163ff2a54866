//! How a request reaches the VMM, and how its answer comes back: a file for each route, and which of them is
//! taken.

mod device;
pub(crate) mod doorbell;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use vmfork_abi::{Identity, ListedCopy, Role};

use self::device::Device;
use self::doorbell::Doorbell;
use crate::OpenError;

/// A route to the VMM. Serialized, it is its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Via {
    /// The kernel module's device, for root and the members of its group.
    Device,
    /// The control page in /dev/mem and a port, for root alone.
    Doorbell,
}

/// No name of a route.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no route to the VMM: {} and {} are", Via::Device, Via::Doorbell)]
pub struct UnknownVia {
    /// What was given.
    pub name: String,
}

impl Via {
    /// Every route, best first.
    pub const ALL: [Self; 2] = [Self::Device, Self::Doorbell];

    /// The name by which it is asked for.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Doorbell => "doorbell",
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Via {
    type Err = UnknownVia;

    fn from_str(name: &str) -> Result<Self, UnknownVia> {
        Self::ALL
            .into_iter()
            .find(|via| via.name() == name)
            .ok_or_else(|| UnknownVia { name: name.to_owned() })
    }
}

/// A route, opened.
#[derive(Debug)]
pub(crate) enum Route {
    Device(Device),
    Doorbell(Doorbell),
}

impl Route {
    /// Opens this route.
    pub(crate) fn open(via: Via) -> Result<Self, OpenError> {
        match via {
            Via::Device => Device::open().map(Self::Device),
            Via::Doorbell => Doorbell::open().map(Self::Doorbell),
        }
    }

    /// Opens the best route that there is for the caller.
    pub(crate) fn choose() -> Result<Self, OpenError> {
        choose(Self::open)
    }

    /// Which one it is.
    pub(crate) fn via(&self) -> Via {
        match self {
            Self::Device(_) => Via::Device,
            Self::Doorbell(_) => Via::Doorbell,
        }
    }
}

/// Raw report of the VMM on a VM and its latest fork, unchecked.
#[derive(Debug, Default)]
pub(crate) struct RawReport {
    /// Who the VM is.
    pub(crate) identity: Identity,
    /// How many copies the list says that it has; 0 in a VM that is no parent, and where the VMM lists none.
    pub(crate) listed: u32,
    /// The copies, at most [`MAX_CHILDREN`](vmfork_abi::MAX_CHILDREN).
    pub(crate) copies: Vec<ListedCopy>,
}

impl RawReport {
    /// The side of a fork that the VM is on, where it is on one.
    pub(crate) fn side(&self) -> Option<Role> {
        Role::from_number(self.identity.role).filter(|&role| role != Role::Booted)
    }
}

/// The device where there is one for the caller, else the doorbell. Whoever may use neither is told what
/// keeps it from the device, if there is one. A device that is open to the caller and does not serve it is an
/// error: by the doorbell, callers would not wait for those that the module serves.
fn choose<R>(open: impl Fn(Via) -> Result<R, OpenError>) -> Result<R, OpenError> {
    match open(Via::Device) {
        Err(OpenError::NoDevice { .. }) => open(Via::Doorbell),
        Err(forbidden @ OpenError::DeviceForbidden { .. }) => open(Via::Doorbell).map_err(|_| forbidden),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::DetectError;

    fn refused(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    /// What is chosen where opening the routes gives these errors, or none.
    fn chosen(
        device: fn() -> Option<OpenError>,
        doorbell: fn() -> Option<OpenError>,
    ) -> Result<Via, OpenError> {
        choose(|via| {
            let error = if via == Via::Device { device() } else { doorbell() };
            error.map_or(Ok(via), Err)
        })
    }

    #[test]
    fn the_device_is_taken_where_it_is_open_to_the_caller() {
        let none = || Some(OpenError::NoDevice { source: refused(libc::ENOENT) });
        let forbidden = || Some(OpenError::DeviceForbidden { source: refused(libc::EACCES) });
        assert_eq!(chosen(|| None, || panic!("not looked at")).unwrap(), Via::Device);
        assert_eq!(chosen(none, || None).unwrap(), Via::Doorbell);
        assert_eq!(chosen(forbidden, || None).unwrap(), Via::Doorbell);
    }

    #[test]
    fn who_may_use_neither_is_told_of_the_better_one() {
        let no_memory = || Some(OpenError::OpenMemory { source: refused(libc::EACCES) });
        let no_vmm = || Some(OpenError::Detect(DetectError::NoVmm));
        let none = || Some(OpenError::NoDevice { source: refused(libc::ENOENT) });
        let forbidden = || Some(OpenError::DeviceForbidden { source: refused(libc::EACCES) });
        assert!(matches!(chosen(none, no_vmm), Err(OpenError::Detect(DetectError::NoVmm))));
        assert!(matches!(chosen(none, no_memory), Err(OpenError::OpenMemory { .. })));
        let error = chosen(forbidden, no_memory).unwrap_err();
        assert_eq!(error.to_string(), "/dev/vmfork is for root and the members of its group");
    }

    #[test]
    fn a_device_that_does_not_serve_is_not_gone_round() {
        let version = || Some(OpenError::DeviceVersion { source: refused(libc::EPROTONOSUPPORT) });
        let mute = || Some(OpenError::AskDevice { source: refused(libc::EIO) });
        let failed = || Some(OpenError::OpenDevice { source: refused(libc::EMFILE) });
        assert!(matches!(chosen(version, || None), Err(OpenError::DeviceVersion { .. })));
        assert!(matches!(chosen(mute, || None), Err(OpenError::AskDevice { .. })));
        assert!(matches!(chosen(failed, || None), Err(OpenError::OpenDevice { .. })));
    }

    #[test]
    fn routes_have_names() {
        assert!(Via::ALL.iter().all(|via| via.to_string().parse() == Ok(*via)));
        assert!(Via::ALL.iter().all(|via| serde_json::to_value(via).unwrap() == via.name()));
        let error = "Device".parse::<Via>().unwrap_err();
        assert_eq!(error.to_string(), r#""Device" is no route to the VMM: device and doorbell are"#);
    }
}
