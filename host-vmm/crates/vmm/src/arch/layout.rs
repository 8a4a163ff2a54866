//! Where things lie in guest-physical memory and among the I/O ports.
//!
//! ```text
//! 0x0000_0000  RAM   boot structures below 1 MiB, the kernel from 1 MiB up, the initrd at the end
//! 0xc000_0000  gap   control page, generation ID, I/O APIC, local APICs
//! 0x1_0000_0000 RAM  what does not fit below the gap
//! ```

use std::fmt;

use types::PAGE_BYTES;

/// Guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// First address of the gap that RAM leaves free below 4 GiB.
pub const GAP_START: Gpa = Gpa(0xc000_0000);

/// First address behind the gap.
pub const GAP_END: Gpa = Gpa(0x1_0000_0000);

/// The control page, in the gap: no RAM, so that `/dev/mem` maps it, and no driver claims it.
pub const CONTROL_PAGE: Gpa = Gpa(0xd000_0000);

/// The control page, the pages behind it that a long list of copies reaches into, and the generation's, in
/// bytes.
pub const CONTROL_REGION_BYTES: u64 = vmfork_abi::REGION_BYTES as u64;

/// The page of the VM generation ID, behind the control page's. The guest can't write to it, and no
/// process of a guest needs to read it.
pub const GENERATION_ID: Gpa = Gpa(CONTROL_PAGE.0 + CONTROL_REGION_BYTES);

/// Registers of the I/O APIC that KVM emulates.
pub const IO_APIC: Gpa = Gpa(0xfec0_0000);

/// Registers of each vCPU's local APIC.
pub const LOCAL_APIC: Gpa = Gpa(0xfee0_0000);

/// Three pages that KVM needs on Intel processors without unrestricted guests (KVM_SET_TSS_ADDR).
pub const KVM_TSS: Gpa = Gpa(0xfffb_d000);

/// One page that KVM needs likewise (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: Gpa = Gpa(0xfffb_c000);

/// Global descriptor table for the kernel's entry.
pub const BOOT_GDT: Gpa = Gpa(0x500);

/// The zero page: `struct boot_params`.
pub const BOOT_PARAMS: Gpa = Gpa(0x7000);

/// Stack of the kernel's entry; it grows down.
pub const BOOT_STACK: Gpa = Gpa(0x8ff0);

/// Page tables of the kernel's entry, which map the first 4 GiB one to one: PML4, PDPT, four page
/// directories.
pub const BOOT_PAGE_TABLES: Gpa = Gpa(0x9000);

/// The kernel command line.
pub const CMDLINE: Gpa = Gpa(0x2_0000);

/// Longest kernel command line in bytes, with its NUL: Linux's COMMAND_LINE_SIZE on x86.
pub const CMDLINE_MAX_BYTES: usize = 2048;

/// End of the memory below 640 KiB that the guest may use.
pub const LOW_RAM_END: Gpa = Gpa(0x9_fc00);

/// ACPI tables, the RSDP first, in the area that a PC's firmware uses.
pub const ACPI: Gpa = Gpa(0xe_0000);

/// Where a processor begins after a reset in real mode, as far as Linux is concerned (FFFF:0000).
pub const RESET_VECTOR: Gpa = Gpa(0xf_fff0);

/// End of the room for ACPI tables; RAM goes on here.
pub const HIGH_RAM_START: Gpa = Gpa(0x10_0000);

/// First of the 8 ports of the serial console (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;

/// Interrupt of the serial console.
pub const SERIAL_GSI: u32 = 4;

/// Interrupt of the VM generation ID: of the I/O APIC alone. The first 16 are the PICs' too, which the kernel
/// of a hardware-reduced machine does not set up: it would take what is raised there for an exception.
pub const GENERATION_ID_GSI: u32 = 16;

/// The keyboard controller's command port; all that is there is the reset line.
pub const I8042_PORT: u16 = 0x64;

/// The doorbell: 4 bytes wide.
pub const DOORBELL_PORT: u16 = 0x560;

/// ACPI's sleep control register, one byte.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;

/// ACPI's sleep status register, one byte.
pub const SLEEP_STATUS_PORT: u16 = 0x601;

/// ACPI's reset register, one byte.
pub const RESET_PORT: u16 = 0x602;

/// A piece of guest RAM: `bytes` bytes at `gpa`, found at `offset` of the memory's file and mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamPiece {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Offset in bytes into the guest's memory as one piece.
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
}

/// The pieces of guest RAM, lowest first, for a memory of `bytes` bytes: one below the gap, and one above it
/// where that is needed.
pub fn ram_pieces(bytes: u64) -> Vec<RamPiece> {
    let low = bytes.min(GAP_START.0);
    let mut pieces = vec![RamPiece { gpa: Gpa(0), offset: 0, bytes: low }];
    if bytes > low {
        pieces.push(RamPiece { gpa: GAP_END, offset: low, bytes: bytes - low });
    }
    pieces
}

/// The page of the guest's memory, as one piece, that a guest-physical address lies in, where that is none of
/// the gap.
pub fn ram_page(gpa: Gpa) -> Option<u64> {
    let offset = if gpa < GAP_START { gpa.0 } else { gpa.0.checked_sub(GAP_END.0)? + GAP_START.0 };
    Some(offset / PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_gap() {
        assert_eq!(ram_pieces(1 << 30), [RamPiece { gpa: Gpa(0), offset: 0, bytes: 1 << 30 }]);
        let pieces = ram_pieces(4 << 30);
        assert_eq!(pieces.len(), 2);
        assert_eq!(pieces[1], RamPiece { gpa: GAP_END, offset: GAP_START.0, bytes: 1 << 30 });
        let pages = [0xfff, 0xbfff_ffff, 0xc000_0000, 0xffff_ffff, 0x1_0000_1000].map(|at| ram_page(Gpa(at)));
        assert_eq!(pages, [Some(0), Some(0xb_ffff), None, None, Some(0xc_0001)]);
    }
}
