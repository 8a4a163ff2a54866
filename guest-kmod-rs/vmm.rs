// SPDX-License-Identifier: GPL-2.0

//! Is there a VMM that can fork this VM? CPUID tells.

use core::arch::x86_64::__cpuid;

use kernel::prelude::*;
use vmfork_abi::{
    cpuid::{Interface, Registers, LEAF_SIGNATURE},
    ABI_VERSION,
};

/// Finds the VMM's interface.
///
/// # Errors
///
/// `ENODEV` where there is no such VMM, or it speaks another version; the kernel's log tells which.
pub(crate) fn detect() -> Result<Interface> {
    let Some(interface) = Interface::read(leaf) else {
        pr_err!("no VMM that can fork this machine answers at CPUID leaf {LEAF_SIGNATURE:#x}\n");
        return Err(ENODEV);
    };
    if interface.abi_version != ABI_VERSION {
        pr_err!(
            "the VMM speaks ABI version {}, and this module version {ABI_VERSION}\n",
            interface.abi_version
        );
        return Err(ENODEV);
    }
    Ok(interface)
}

fn leaf(number: u32) -> Registers {
    // Safe since Rust 1.94.
    #[allow(unused_unsafe)]
    // SAFETY: Every 64-bit CPU has CPUID, and leaves that a CPU or VMM does not know have some
    // content too.
    let leaf = unsafe { __cpuid(number) };
    Registers {
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
    }
}
