// SPDX-License-Identifier: GPL-2.0

//! The instruction that leaves the VM: `vmcall` on Intel's CPUs, `vmmcall` on AMD's.
//!
//! KVM takes the other maker's instruction too, but only by patching it in place, which faults
//! where kernel text can't be written.

use core::arch::{asm, x86_64::__cpuid};

use vmfork_abi::doorbell::HYPERCALL;

/// Makers whose CPUs have `vmmcall`, as CPUID leaf 0 spells them in EBX, EDX and ECX.
const VMMCALL: [[u8; 12]; 2] = [*b"AuthenticAMD", *b"HygonGenuine"];

/// What KVM answers where it does not hand the hypercall on to a VMM (`KVM_ENOSYS` of
/// linux/kvm_para.h).
const NOT_HANDED_ON: i64 = -1000;

/// How this CPU makes a hypercall.
pub(crate) struct Hypercall {
    vmmcall: bool,
}

impl Hypercall {
    /// Asks the CPU for its maker.
    pub(crate) fn detect() -> Self {
        // Safe since Rust 1.94.
        #[allow(unused_unsafe)]
        // SAFETY: Every 64-bit CPU has CPUID.
        let leaf = unsafe { __cpuid(0) };
        let mut maker = [0; 12];
        for (part, register) in maker
            .chunks_exact_mut(4)
            .zip([leaf.ebx, leaf.edx, leaf.ecx])
        {
            part.copy_from_slice(&register.to_le_bytes());
        }
        Self {
            vmmcall: VMMCALL.contains(&maker),
        }
    }

    /// Whether the VMM has told KVM to hand the hypercall on. Nothing is asked of the VMM for it:
    /// KVM refuses zero pages itself.
    pub(crate) fn is_handed_on(&self) -> bool {
        self.call(0, 0, 0) != NOT_HANDED_ON
    }

    /// Rings the doorbell of the control page at `gpa` with `command`, and returns the hypercall's
    /// result.
    pub(crate) fn ring(&self, gpa: u64, command: u32) -> i64 {
        self.call(gpa, 1, command)
    }

    fn call(&self, gpa: u64, pages: u64, command: u32) -> i64 {
        let result: i64;
        // SAFETY: The call changes RAX, and the control page, which is only ever looked at as
        // memory that somebody else writes. RBX, which the compiler keeps for itself, is as it was
        // when the block ends; all operands are in registers that are named, since any could be
        // RBX. A copy of this VM goes on here with the same registers and memory.
        unsafe {
            asm!(
                "xchg rsi, rbx",
                "test r8d, r8d",
                "jnz 2f",
                "vmcall",
                "jmp 3f",
                "2:",
                "vmmcall",
                "3:",
                "xchg rsi, rbx",
                inout("rsi") gpa => _,
                in("r8") u64::from(self.vmmcall),
                inout("rax") HYPERCALL => result,
                in("rcx") pages,
                in("rdx") u64::from(command),
                options(nostack),
            );
        }
        result
    }
}
