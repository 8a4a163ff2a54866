//! The state in which the kernel's 64-bit entry wants the boot processor (kernel documentation,
//! arch/x86/boot.rst): long mode with paging, memory mapped one to one, flat segments, interrupts off, RSI at
//! the zero page.

use types::PAGE_BYTES;
use x86::{
    Ring,
    controlregs::{Cr0, Cr4},
    msr::IA32_MISC_ENABLE,
    segmentation::{
        BuildDescriptor, CodeSegmentType, DataSegmentType, Descriptor, DescriptorBuilder,
        SegmentDescriptorBuilder, SegmentSelector,
    },
};

use super::{
    layout::{BOOT_GDT, BOOT_PAGE_TABLES, BOOT_PARAMS, BOOT_STACK, Gpa},
    msr::MTRR_AT_BOOT,
};
use crate::arch::{Registers, Segment, SystemRegisters, msr::Msr};

/// EFER: long mode enabled and active.
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

/// RFLAGS: bit 1 always reads as one; interrupts are off.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// IA32_MISC_ENABLE: fast string operations.
const MISC_FAST_STRING: u64 = 1;

/// Page-table entry bits: present, writable, and (in a page directory) a 2 MiB page.
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

const ENTRIES: u64 = 512;
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const GIB: u64 = 4;

/// Indices of the code and data segment in the table; the boot protocol asks for selectors 0x10 and 0x18.
const CODE: u16 = 2;
const DATA: u16 = 3;

/// General registers at the entry point of a kernel.
pub fn entry(entry: Gpa) -> Registers {
    Registers {
        rip: entry.0,
        rsi: BOOT_PARAMS.0,
        rsp: BOOT_STACK.0,
        rbp: BOOT_STACK.0,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    }
}

/// `reset`, the system registers of a fresh vCPU, changed for the kernel's entry.
pub fn entry_system(mut reset: SystemRegisters) -> SystemRegisters {
    let [_, _, code, data] = gdt();
    reset.cs = segment(code, CODE);
    for register in [&mut reset.ds, &mut reset.es, &mut reset.fs, &mut reset.gs, &mut reset.ss] {
        *register = segment(data, DATA);
    }
    reset.gdt.base = BOOT_GDT.0;
    reset.gdt.limit = 4 * 8 - 1;
    reset.cr0 |= (Cr0::CR0_PROTECTED_MODE | Cr0::CR0_ENABLE_PAGING).bits() as u64;
    reset.cr3 = BOOT_PAGE_TABLES.0;
    reset.cr4 |= Cr4::CR4_ENABLE_PAE.bits() as u64;
    reset.efer |= EFER_LONG_MODE;
    reset
}

/// Model-specific registers that firmware would have set, on each processor.
pub fn boot_msrs() -> [Msr; 2] {
    [Msr { index: IA32_MISC_ENABLE, value: MISC_FAST_STRING }, MTRR_AT_BOOT]
}

/// The descriptor table for [`BOOT_GDT`]: two unused entries, code, data.
pub fn gdt() -> [u64; 4] {
    let flat = |builder: DescriptorBuilder| builder.present().dpl(Ring::Ring0).limit_granularity_4kb();
    let code: Descriptor =
        flat(DescriptorBuilder::code_descriptor(0, 0xf_ffff, CodeSegmentType::ExecuteReadAccessed))
            .l()
            .finish();
    let data: Descriptor =
        flat(DescriptorBuilder::data_descriptor(0, 0xf_ffff, DataSegmentType::ReadWriteAccessed))
            .db()
            .finish();
    [0, 0, code.as_u64(), data.as_u64()]
}

/// The page tables for [`BOOT_PAGE_TABLES`]: one PML4, one PDPT and four page directories that map 4 GiB one
/// to one.
pub fn page_tables() -> Vec<u64> {
    let table = |number: u64| BOOT_PAGE_TABLES.0 + number * PAGE_BYTES;
    let mut pml4 = vec![0; 512];
    pml4[0] = table(1) | PRESENT_WRITABLE;
    let mut pdpt = vec![0; 512];
    for (entry, directory) in pdpt.iter_mut().zip(0..GIB) {
        *entry = table(2 + directory) | PRESENT_WRITABLE;
    }
    let directories = (0..GIB * ENTRIES).map(|page| (page * LARGE_PAGE_BYTES) | PRESENT_WRITABLE | LARGE);
    pml4.into_iter().chain(pdpt).chain(directories).collect()
}

/// The segment register that loading entry `index` of the table would give.
fn segment(descriptor: u64, index: u16) -> Segment {
    let bits = |at: u32, count: u32| u8::try_from(descriptor >> at & ((1 << count) - 1)).unwrap_or(0);
    Segment {
        base: 0,
        limit: u32::MAX,
        selector: SegmentSelector::new(index, Ring::Ring0).bits(),
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_flat_and_64_bit() {
        let [_, _, code, data] = gdt();
        assert_eq!(code, 0x00af_9b00_0000_ffff);
        assert_eq!(data, 0x00cf_9300_0000_ffff);
        let cs = segment(code, CODE);
        assert_eq!((cs.selector, cs.l, cs.db, cs.type_, cs.s, cs.present), (0x10, 1, 0, 11, 1, 1));
        assert_eq!(segment(data, DATA).selector, 0x18);
    }

    #[test]
    fn tables_map_one_to_one() {
        let tables = page_tables();
        assert_eq!(tables.len(), 6 * 512);
        assert_eq!(tables[0], 0xa003);
        assert_eq!(tables[512 + 3], 0xe003);
        assert_eq!(tables[1024 + 1], 0x20_0083);
        assert_eq!(tables[6 * 512 - 1], 0xffe0_0083);
    }
}
