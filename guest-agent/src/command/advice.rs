//! What a caller can do about what a fork lacks.

use std::io::{self, ErrorKind};
use std::path::Path;

use vmfork::{DetectError, ForkError, LockError, OpenError};
use vmfork_abi::device;

use super::CommandError;

const RAW_IO: &str = "run this as root or with CAP_SYS_RAWIO, which is not enough under kernel lockdown \
                      (Secure Boot); with the kernel module, a member of its device's group needs neither";
const CLAIMED: &str = "go by the device: the kernel module has claimed the control page, and this kernel \
                       keeps it from /dev/mem (CONFIG_STRICT_DEVMEM)";

/// What the caller can do about `error`, where there is something.
pub(crate) fn advice(error: &CommandError) -> Option<&'static str> {
    match error {
        CommandError::Open(error) => about_open(error, Path::new(device::PATH).exists()),
        CommandError::Fork(error) => about_fork(error),
        _ => None,
    }
}

/// Advice about a route that is not open to the caller, where there is a device or not.
fn about_open(error: &OpenError, is_device: bool) -> Option<&'static str> {
    Some(match error {
        OpenError::Detect(DetectError::NoVmm) => "run this in a VM that host-vmm has launched",
        OpenError::Detect(DetectError::Version { .. }) | OpenError::Header { .. } => {
            "use the vmfork and the host-vmm of one release"
        }
        OpenError::NoDevice { .. } => "load the kernel module that offers it, or go by the doorbell",
        OpenError::DeviceForbidden { .. } => {
            "run this as root, or as a member of the group that `ls -l /dev/vmfork` shows"
        }
        OpenError::DeviceVersion { .. } => "use the vmfork and the kernel module of one release",
        OpenError::OpenMemory { source } if source.kind() == ErrorKind::NotFound => {
            "mount devtmpfs on /dev; the kernel must be built with CONFIG_DEVMEM"
        }
        OpenError::MapPage { source, .. } if is_device && forbids(source) => CLAIMED,
        OpenError::OpenMemory { source } | OpenError::MapPage { source, .. } if forbids(source) => RAW_IO,
        _ => return None,
    })
}

/// Advice about what a fork lacks by a route that is open to the caller.
fn about_fork(error: &ForkError) -> Option<&'static str> {
    Some(match error {
        ForkError::Open(error) => return about_open(error, true),
        ForkError::Port { source, .. } if forbids(source) => RAW_IO,
        ForkError::Port { .. } => "the kernel must be built with CONFIG_X86_IOPL_IOPERM",
        ForkError::Privilege(_) => "run this as root or with the capabilities named",
        ForkError::Lock(LockError::Mount { .. }) => {
            "the kernel must be Linux 5.2 or newer with CONFIG_DEVTMPFS, and a container must allow fsopen, \
             fsconfig and fsmount"
        }
        ForkError::OpenRandom { .. } => "mount devtmpfs on /dev",
        _ => return None,
    })
}

fn forbids(source: &io::Error) -> bool {
    source.kind() == ErrorKind::PermissionDenied
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    #[test]
    fn a_page_that_the_module_has_claimed_leads_to_the_device() {
        let map = |errno| OpenError::MapPage { gpa: 0xd000_0000, source: refused(errno) };
        assert_eq!(about_open(&map(libc::EPERM), true), Some(CLAIMED));
        assert_eq!(about_open(&map(libc::EPERM), false), Some(RAW_IO));
        assert_eq!(about_open(&map(libc::EINVAL), true), None);
        assert_eq!(about_open(&OpenError::OpenMemory { source: refused(libc::EACCES) }, true), Some(RAW_IO));
    }

    #[test]
    fn each_lack_of_the_device_has_its_advice() {
        let says = |error, word| about_open(&error, false).is_some_and(|advice| advice.contains(word));
        assert!(says(OpenError::NoDevice { source: refused(libc::ENOENT) }, "load"));
        assert!(says(OpenError::DeviceForbidden { source: refused(libc::EACCES) }, "group"));
        assert!(says(OpenError::DeviceVersion { source: refused(libc::ENOTTY) }, "one release"));
        let version = OpenError::DeviceVersion { source: refused(libc::EPROTONOSUPPORT) };
        assert!(about_fork(&ForkError::Open(version)).is_some());
    }
}
