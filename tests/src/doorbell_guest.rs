//! A guest without an operating system that makes round trips to its VMM, and tells how long they took.

use std::{arch::global_asm, slice};

use tempfile::NamedTempFile;

use crate::{
    bare_guest::{CONTROL_PAGE, DOORBELL},
    elf, user_guest,
};

/// A port that nothing listens to.
pub const IDLE_PORT: u16 = 0x501;

/// An address in the control page's 2 MiB that nothing lies at.
pub const IDLE_ADDRESS: u64 = CONTROL_PAGE + 0x10_0000;

/// A command that the doorbell does not know.
const UNKNOWN_COMMAND: u32 = 99;

/// How a guest turns to its VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Trip {
    /// Rings the doorbell by its port, with a command that it does not know: the VMM says so in the control
    /// page.
    PortAnswered = 0,
    /// Writes to a port that nothing listens to.
    Port = 1,
    /// Writes to an address that nothing lies at.
    Mmio = 2,
    /// Rings the doorbell by hypercall, as by port. From CPL 3 it does not get that far: the kernel refuses
    /// it.
    HypercallAnswered = 3,
    /// Makes the hypercall for what is no control page: the VMM refuses it, and looks at nothing.
    Hypercall = 4,
}

/// Privilege level at which a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// CPL 0: as `host-vmm` boots it.
    Kernel,
    /// CPL 3, with I/O privilege level 3.
    User,
}

/// What is to be typed at the guest's console: so many of these round trips, less than 2^24. It prints how
/// many units of its TSC they took, as a line of eight hexadecimal digits.
pub fn order(trip: Trip, count: u32) -> [u8; 4] {
    (count << 8 | u32::from(trip as u8)).to_le_bytes()
}

global_asm!(
    ".pushsection .rodata.rings",
    "rings_start:",
    "    mov ebx, {control}",
    "    mov edi, 1", // says that it is ready
    "    call rings_line",
    "10: xor r12d, r12d", // read an order
    "    mov r13d, 4",
    "11: mov edx, 0x3fd",
    "    in al, dx",
    "    test al, 1",
    "    jnz 12f",
    "    pause",
    "    jmp 11b",
    "12: mov edx, 0x3f8",
    "    in al, dx",
    "    movzx eax, al",
    "    or r12d, eax",
    "    ror r12d, 8",
    "    dec r13d",
    "    jnz 11b",
    "    movzx ebp, r12b",
    "    shr r12d, 8", // how often
    "    cmp ebp, {hypercall_answered}",
    "    jb 13f",
    "    xor eax, eax", // which instruction it is
    "    cpuid",
    "    mov r9d, ebx",
    "    mov ebx, {control}",
    "13: call rings_tsc",
    "    mov r14, rax",
    "    mov eax, {unknown}",
    "    mov edx, {doorbell}",
    "    cmp ebp, {port_answered}",
    "    je 20f",
    "    mov edx, {idle_port}",
    "    cmp ebp, {port}",
    "    je 20f",
    "    cmp ebp, {mmio}",
    "    je 30f",
    "    mov edx, {unknown}",
    "    mov ecx, 1",
    "    cmp ebp, {hypercall_answered}",
    "    je 14f",
    "    mov ecx, 2", // pages
    "14: cmp r9d, 0x68747541", // "Auth"enticAMD
    "    je 50f",
    "    jmp 40f",
    "20: out dx, eax",
    "    dec r12d",
    "    jnz 20b",
    "    jmp 60f",
    "30: mov [rbx + {idle_offset}], eax",
    "    dec r12d",
    "    jnz 30b",
    "    jmp 60f",
    "40: mov eax, {number}",
    "    vmcall",
    "    dec r12d",
    "    jnz 40b",
    "    jmp 60f",
    "50: mov eax, {number}",
    "    vmmcall",
    "    dec r12d",
    "    jnz 50b",
    "60: call rings_tsc",
    "    sub rax, r14",
    "    mov edi, eax",
    "    call rings_line",
    "    jmp 10b",
    "rings_tsc:",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    ret",
    elf::print_line!("rings_line"),
    "rings_end:",
    ".popsection",
    control = const CONTROL_PAGE,
    idle_offset = const IDLE_ADDRESS - CONTROL_PAGE,
    idle_port = const IDLE_PORT,
    doorbell = const DOORBELL,
    unknown = const UNKNOWN_COMMAND,
    number = const vmfork_abi::doorbell::HYPERCALL,
    port_answered = const Trip::PortAnswered as u8,
    port = const Trip::Port as u8,
    mmio = const Trip::Mmio as u8,
    hypercall_answered = const Trip::HypercallAnswered as u8,
);

unsafe extern "C" {
    static rings_start: u8;
    static rings_end: u8;
}

/// The guest as an ELF file.
///
/// # Panics
/// Where the file can't be written.
pub fn kernel(level: Level) -> NamedTempFile {
    let (start, end) = (&raw const rings_start, &raw const rings_end);
    // SAFETY: both labels lie in the one section above, in this order, and what is between them is never
    // written.
    let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
    match level {
        Level::Kernel => elf::kernel(code),
        Level::User => elf::kernel(&[user_guest::way_to_user_code(), code].concat()),
    }
}
