//! The VMM as a process in the guest reaches it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;
use std::{fs, io};

use vmfork_abi::device::PATH;

use crate::route::Route;
use crate::{DetectError, Fork, ForkError, ForkRequest, HeaderError, OutcomeError, UnknownVia, Via};

/// The variable of the environment by which a route is asked for.
const VIA: &str = "VMFORK_VIA";

/// The VMM that this guest runs on, reached by a route.
#[derive(Debug)]
pub struct Vmm {
    route: Route,
}

/// Why the VMM can't be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The environment asks for a route that there isn't.
    #[error("{VIA} can't be followed")]
    Via(#[source] UnknownVia),
    /// No kernel module offers its device.
    #[error("there is no {PATH}")]
    NoDevice {
        /// What open(2) answered.
        source: io::Error,
    },
    /// The device is not for this caller.
    #[error("{PATH} is for root and the members of its group")]
    DeviceForbidden {
        /// What open(2) answered.
        source: io::Error,
    },
    /// The device can't be opened for another reason.
    #[error("{PATH} can't be opened")]
    OpenDevice {
        /// What open(2) answered.
        source: io::Error,
    },
    /// The kernel module was built for other programs.
    #[error("this program and the kernel module behind {PATH} are of different versions")]
    DeviceVersion {
        /// What the ioctl answered.
        source: io::Error,
    },
    /// The kernel module does not say who this VM is.
    #[error("{PATH} does not answer")]
    AskDevice {
        /// What the ioctl answered.
        source: io::Error,
    },
    /// There is no VMM, or it is another version.
    #[error(transparent)]
    Detect(DetectError),
    /// /dev/mem is missing or not for this caller.
    #[error("/dev/mem can't be opened")]
    OpenMemory {
        /// What open(2) answered.
        source: io::Error,
    },
    /// The kernel does not let the control page be mapped.
    #[error("the control page at {gpa:#x} can't be mapped")]
    MapPage {
        /// Guest-physical address of the page.
        gpa: u64,
        /// What mmap(2) answered.
        source: io::Error,
    },
    /// The page is no control page of this ABI.
    #[error("there is no control page at {gpa:#x}")]
    Header {
        /// Guest-physical address of the page.
        gpa: u64,
        /// What its header says.
        source: HeaderError,
    },
}

impl OpenError {
    /// What it means that open(2) answers so for the device.
    pub(crate) fn of_device(source: io::Error) -> Self {
        match source.raw_os_error() {
            // Without its module, a file that was made by hand leads nowhere.
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Self::NoDevice { source },
            Some(libc::EACCES | libc::EPERM) => Self::DeviceForbidden { source },
            _ => Self::OpenDevice { source },
        }
    }
}

/// Why it is not known who this VM is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StatusError {
    /// The kernel module does not tell.
    #[error("{PATH} does not say who this VM is")]
    Ask {
        /// What the ioctl answered.
        source: io::Error,
    },
    /// No possible identity, or list of copies.
    #[error("the control page says nothing valid about this VM")]
    Outcome(#[source] OutcomeError),
}

impl Vmm {
    /// Opens the best route to the VMM that there is for the caller: the kernel module's device, or else the
    /// doorbell. Where the variable `VMFORK_VIA` was in the environment with which the program was executed,
    /// its value is the name of the one to take ([`Via::name`]).
    ///
    /// The environment is read once, from /proc/self/environ: what the program makes of its variables since
    /// then does not count, nor would it be safe to look at in a thread beside one that calls setenv(3). A
    /// program that may not read it, or has no /proc, asks for no route.
    ///
    /// # Errors
    ///
    /// [`OpenError`] where no route is open to the caller. If there is a device, it is about the device.
    pub fn open() -> Result<Self, OpenError> {
        match asked(at_start(VIA))? {
            Some(via) => Self::open_via(via),
            None => Ok(Self { route: Route::choose()? }),
        }
    }

    /// Opens this route to the VMM, and looks at no other.
    ///
    /// [`Via::Device`] takes a member of the device's group, and a kernel module of this version. Who may
    /// read the device and not write it has [`Vmm::status`] by it, and no fork. [`Via::Doorbell`] takes
    /// CAP_SYS_RAWIO and a kernel without lockdown; with the module loaded, a kernel with
    /// CONFIG_STRICT_DEVMEM keeps the control page for it.
    ///
    /// # Errors
    ///
    /// [`OpenError`] where the route is not open to the caller.
    pub fn open_via(via: Via) -> Result<Self, OpenError> {
        Ok(Self { route: Route::open(via)? })
    }

    /// The route that was taken.
    pub fn via(&self) -> Via {
        self.route.via()
    }

    /// Who this VM is, and how it came out of its latest fork, without asking for another.
    ///
    /// # Errors
    ///
    /// [`StatusError`] where the kernel module does not tell, or the control page holds no possible identity,
    /// or list of copies.
    pub fn status(&self) -> Result<Fork, StatusError> {
        let report = match &self.route {
            Route::Device(device) => device.report()?,
            Route::Doorbell(doorbell) => doorbell.report(),
        };
        Fork::from_report(&report).map_err(StatusError::Outcome)
    }

    /// Goes as far towards a fork as can be gone without asking the VMM, to tell whether the calling thread
    /// could fork this VM.
    ///
    /// # Errors
    ///
    /// What [`Vmm::fork`] would return without asking the VMM.
    pub fn check(&self) -> Result<(), ForkError> {
        match &self.route {
            Route::Device(device) => device.check(),
            Route::Doorbell(doorbell) => doorbell.check(),
        }
    }

    /// Forks this VM, and returns in the parent and in every child.
    ///
    /// Callers in one guest are served one after another, and after an operator who forks this VM; see
    /// [`ForkError::Copied`] for those that wait. A child's random pool and clock are its own before this
    /// returns, and before any other task of the calling vCPU runs. Tasks on other vCPUs are not held back.
    ///
    /// By the doorbell, that holds for the host name too, and the caller needs CAP_SYS_RAWIO to ring,
    /// CAP_SYS_NICE to run first, CAP_SYS_ADMIN for turn, seed and host name, and CAP_SYS_TIME, and the
    /// kernel has to be Linux 5.2 or newer with CONFIG_DEVTMPFS. By the device it needs nothing; the host
    /// name is set last, and stays the parent's where the caller lacks CAP_SYS_ADMIN.
    ///
    /// # Errors
    ///
    /// [`ForkError`], in the caller's VM or in a copy: see [`ForkError::role`].
    pub fn fork(&self, request: &ForkRequest) -> Result<Fork, ForkError> {
        match &self.route {
            Route::Device(device) => device.fork(request),
            Route::Doorbell(doorbell) => doorbell.fork(request),
        }
    }
}

/// The value of a variable in the environment with which this program was executed.
fn at_start(name: &str) -> Option<OsString> {
    static ENVIRONMENT: OnceLock<Vec<u8>> = OnceLock::new();
    let environment = ENVIRONMENT.get_or_init(|| fs::read("/proc/self/environ").unwrap_or_default());
    value(environment, name).map(OsStr::to_owned)
}

/// The value of a variable in an `environment` as the kernel shows it: `NAME=value`, each ended by a NUL.
fn value<'a>(environment: &'a [u8], name: &str) -> Option<&'a OsStr> {
    let value = |entry: &'a [u8]| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=");
    environment.split(|&byte| byte == 0).find_map(value).map(OsStr::from_bytes)
}

/// The route that the environment's variable asks for, if there is one.
fn asked(name: Option<OsString>) -> Result<Option<Via>, OpenError> {
    name.map(|name| name.to_string_lossy().parse()).transpose().map_err(OpenError::Via)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_asks_for_a_route_or_for_none() {
        assert_eq!(asked(None).unwrap(), None);
        assert_eq!(asked(Some("doorbell".into())).unwrap(), Some(Via::Doorbell));
        for wrong in ["", "agent", "Device"] {
            let error = asked(Some(wrong.into())).unwrap_err();
            assert_eq!(error.to_string(), "VMFORK_VIA can't be followed");
        }
    }

    #[test]
    fn the_environment_is_that_of_the_programs_start() {
        let environment = b"VMFORK_VIAS=1\0A=VMFORK_VIA=2\0VMFORK_VIA=a=b\0VMFORK_VIA=c\0\0NONE\0";
        assert_eq!(value(environment, "VMFORK_VIA"), Some(OsStr::new("a=b")));
        assert_eq!(value(environment, "NONE"), None);
        assert_eq!(value(b"", "VMFORK_VIA"), None);
        assert_eq!(at_start("VMFORK_NO_SUCH"), None);
        assert_eq!(at_start("PATH"), std::env::var_os("PATH"));
    }

    #[test]
    fn a_device_is_missing_or_forbidden_or_broken() {
        let error = |errno| OpenError::of_device(io::Error::from_raw_os_error(errno));
        for missing in [libc::ENOENT, libc::ENXIO, libc::ENODEV] {
            assert!(matches!(error(missing), OpenError::NoDevice { .. }), "{missing}");
        }
        for forbidden in [libc::EACCES, libc::EPERM] {
            assert!(matches!(error(forbidden), OpenError::DeviceForbidden { .. }), "{forbidden}");
        }
        assert!(matches!(error(libc::EMFILE), OpenError::OpenDevice { .. }));
    }
}
