//! The zero page (`struct boot_params`), and the tables that the kernel's entry runs on.

use linux_loader::{
    bootparam::{boot_e820_entry, boot_params, setup_header},
    configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    Error,
    kernel::{Initrd, Kernel},
    write as failed,
};
use crate::{
    arch::{
        layout::{
            ACPI, BOOT_GDT, BOOT_PAGE_TABLES, BOOT_PARAMS, CMDLINE, CONTROL_PAGE, CONTROL_REGION_BYTES, Gpa,
            HIGH_RAM_START, LOW_RAM_END, RESET_PORT, RESET_VECTOR, ram_pieces,
        },
        regs,
    },
    devices::power::RESET_VALUE,
};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// `type_of_loader`: undefined.
const LOADER_UNDEFINED: u8 = 0xff;

/// Magic numbers of a boot header, for a kernel that brings none (kernel documentation, arch/x86/boot.rst).
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;

/// Writes the zero page.
pub(super) fn write(
    memory: &GuestMemoryMmap,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    cmdline_bytes: usize,
    rsdp: Gpa,
    ram_bytes: u64,
) -> Result<(), Error> {
    let minimal = setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, ..Default::default() };
    let mut params = boot_params { hdr: kernel.header.unwrap_or(minimal), ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(CMDLINE.0);
    params.hdr.cmdline_size = low(cmdline_bytes as u64);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.gpa.0);
        params.hdr.ramdisk_size = low(initrd.bytes);
    }
    params.acpi_rsdp_addr = rsdp.0;
    let map = memory_map(ram_bytes);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    for (entry, wanted) in params.e820_table.iter_mut().zip(map) {
        *entry = wanted;
    }
    let zero_page = BootParams::new(&params, GuestAddress(BOOT_PARAMS.0));
    LinuxBootConfigurator::write_bootparams(&zero_page, memory)
        .map_err(|error| Error::ZeroPage(Box::new(error)))
}

/// Writes the firmware that there is: at the reset vector, real-mode code that resets the machine.
///
/// A kernel that finds hardware-reduced ACPI and no EFI tries to reboot by jumping there, unless it is told
/// `reboot=`.
pub(super) fn write_reset_vector(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let [low, high] = RESET_PORT.to_le_bytes();
    // mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; hlt; jmp to the hlt
    let code = [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
    let gpa = RESET_VECTOR;
    memory.write_slice(&code, GuestAddress(gpa.0)).map_err(failed("the reset vector", gpa))
}

/// Writes the descriptor table and the page tables.
pub(super) fn write_entry_tables(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let put = |what, gpa: Gpa, words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(gpa.0)).map_err(failed(what, gpa))
    };
    put("the descriptor table", BOOT_GDT, &regs::gdt())?;
    put("the page tables", BOOT_PAGE_TABLES, &regs::page_tables())
}

/// What the guest is told of its memory. The control page is named so that nothing else is put there; it is
/// no RAM.
fn memory_map(ram_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry { addr: start, size: end - start, r#type: kind };
    let mut map = vec![
        entry(0, LOW_RAM_END.0, E820_RAM),
        entry(ACPI.0, HIGH_RAM_START.0, E820_RESERVED),
        entry(CONTROL_PAGE.0, CONTROL_PAGE.0 + CONTROL_REGION_BYTES, E820_RESERVED),
    ];
    for piece in ram_pieces(ram_bytes) {
        let start = piece.gpa.0.max(HIGH_RAM_START.0);
        map.push(entry(start, piece.gpa.0 + piece.bytes, E820_RAM));
    }
    map.sort_by_key(|entry| entry.addr);
    map
}

/// An address or size that lies below 4 GiB by construction.
fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_is_sorted_and_leaves_the_gap() {
        let map = memory_map(4 << 30);
        let pieces: Vec<_> =
            map.iter().map(|e| ({ e.addr }, { e.addr } + { e.size }, { e.r#type })).collect();
        assert_eq!(
            pieces,
            [
                (0, 0x9_fc00, E820_RAM),
                (0xe_0000, 0x10_0000, E820_RESERVED),
                (0x10_0000, 0xc000_0000, E820_RAM),
                (0xd000_0000, 0xd001_2000, E820_RESERVED),
                (0x1_0000_0000, 0x1_4000_0000, E820_RAM),
            ]
        );
    }
}
