//! Is there a VMM, and does it speak this ABI? CPUID tells without privilege.

use vmfork_abi::ABI_VERSION;
use vmfork_abi::cpuid::{Interface, LEAF_SIGNATURE, Registers};

use crate::{Vmm, raw};

/// Why there is no VMM to ask for a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DetectError {
    /// The signature is missing: bare metal, or another VMM.
    #[error("no VMM that can fork this machine answers at CPUID leaf {LEAF_SIGNATURE:#x}")]
    NoVmm,
    /// The VMM was built with another version of the ABI.
    #[error("the VMM speaks ABI version {vmm}, and this program version {ours}")]
    Version {
        /// The VMM's version.
        vmm: u32,
        /// This crate's version.
        ours: u32,
    },
}

impl Vmm {
    /// Finds the VMM's interface by CPUID, which any process may read.
    ///
    /// # Errors
    ///
    /// [`DetectError`] where no VMM of this kind is there, or it speaks another version of the ABI.
    pub fn detect() -> Result<Interface, DetectError> {
        interface(raw::cpuid)
    }
}

/// The interface that CPUID announces, if it is one that this crate speaks.
fn interface(cpuid: impl Fn(u32) -> Registers) -> Result<Interface, DetectError> {
    let interface = Interface::read(cpuid).ok_or(DetectError::NoVmm)?;
    if interface.abi_version != ABI_VERSION {
        return Err(DetectError::Version { vmm: interface.abi_version, ours: ABI_VERSION });
    }
    Ok(interface)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERFACE: Interface = Interface {
        abi_version: ABI_VERSION,
        control_page_gpa: 0xd000_0000,
        doorbell_port: 0x560,
        features: u64::MAX,
    };

    /// What CPUID answers on a VMM with this interface.
    fn shown(interface: Interface) -> impl Fn(u32) -> Registers {
        move |leaf| interface.to_leaves()[(leaf - LEAF_SIGNATURE) as usize]
    }

    #[test]
    fn our_leaves_announce_the_interface_whatever_features_it_has() {
        for features in [0, 1, u64::MAX] {
            let told = Interface { features, ..INTERFACE };
            assert_eq!(interface(shown(told)), Ok(told));
        }
    }

    #[test]
    fn foreign_leaves_are_no_vmm() {
        let nothing = Registers { eax: 0, ebx: 0, ecx: 0, edx: 0 };
        assert_eq!(interface(|_| nothing), Err(DetectError::NoVmm));
    }

    #[test]
    fn another_version_is_refused_by_both_names() {
        let newer = Interface { abi_version: ABI_VERSION + 1, ..INTERFACE };
        let error = interface(shown(newer)).unwrap_err();
        assert_eq!(error.to_string(), "the VMM speaks ABI version 2, and this program version 1");
    }
}
