//! A guest without an operating system that runs at CPL 3: at full speed, also on a KVM that emulates guest
//! kernel code.
//!
//! At CPL 0 it only opens the page tables to user code and goes to CPL 3 with I/O privilege level 3. There it
//! reads [`Order`]s from the console, and carries them out. Each thing that a bench wants to time ends with a
//! port write.

use std::{arch::global_asm, mem::offset_of, slice};

use tempfile::NamedTempFile;
use vmfork_abi::{Header, PAGE, Role, Status, doorbell};

use crate::{
    bare_guest::{CONTROL_PAGE, DOORBELL},
    elf,
};

/// The first thing that a VM does after a fork: it writes its index here. Nothing listens.
const ANSWER_PORT: u16 = 0x501;

/// What a guest is told that is to write to memory.
pub const REWRITE: u8 = b'w';

/// What a guest is told that is not.
pub const ANSWER: u8 = b'a';

/// Where the guest keeps its order, and its stack below.
const ORDER: u64 = 0x30_0000;

/// Memory that it writes to.
const DATA: u64 = 0x100_0000;

/// Page tables that `host-vmm` boots with: PML4, PDPT, four page directories.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const DIRECTORY: u64 = 0xb000;

/// RFLAGS at CPL 3: bit 1 is always set; I/O privilege level 3.
const USER_FLAGS: u64 = 0x3002;

/// EFER and STAR: what SYSRET goes by.
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;

/// STAR's upper half: SYSRET loads CS 0x33 and SS 0x2b.
const SELECTORS: u32 = 0x0023_0010;

/// What the processor goes by to come back to CPL 0 where user code executes HLT: descriptors, and behind
/// them the gates of exceptions, a stack, and the task state. It can't be SYSCALL: a KVM that emulates guest
/// kernel code may go on at CPL 3 behind it.
const TABLES: u64 = 0x18_0000;
const GATES: u64 = TABLES + 0x1000;
const KERNEL_STACK: u64 = TABLES + 0x3000;
const TASK_STATE: u64 = TABLES + 0x3000;

/// Where the task state says where its bitmap of ports is, and where that is: all of it is zero, so that user
/// code may access all of them also where a KVM does not go by the I/O privilege level.
const PORTS_OFFSET: u64 = TASK_STATE + 0x66;
const PORTS: u64 = 0x68;

/// The gate of a general protection fault.
const PROTECTION_GATE: u64 = GATES + 13 * 16;

/// A segment of 64-bit kernel code, as CS 0x10.
const KERNEL_CODE: u64 = 0x00af_9b00_0000_ffff;

/// The lower half of the descriptor of the task state, at 0x38: present, available, to the end of its bitmap
/// and one byte more.
const TASK_STATE_LOW: u64 = 0x0000_8900_0000_0000 | (TASK_STATE & 0xff_ffff) << 16 | (PORTS + 0x2000);

/// The lower half of a gate, but for the address: present, for interrupts, CS 0x10.
const GATE_LOW: u64 = 0x0000_8e00_0010_0000;

/// What a guest is asked to do: dirty memory, fork, and what its children do then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Order {
    /// How many children. With none, the VM waits for one more byte, and then does what a child would: where
    /// that is [`REWRITE`], it writes to memory first. So it can be brought to life again by others than
    /// `host-vmm`.
    pub count: u32,
    /// Pages that each VM writes to before it forks.
    pub dirty_pages: u32,
    /// Pages that each child writes to after its answer; then it prints a line.
    pub rewrite_pages: u32,
    /// Generations of forks beyond the first: each child forks again, with the same order.
    pub depth: u32,
    /// Time that each VM waits before it forks, in units of its TSC.
    pub pace_tsc: u64,
    /// Children stand still in the end, instead of switching themselves off.
    pub stay: bool,
    /// Parent and children print their generation first, as they find it where the control page's header
    /// says.
    pub tell_generation: bool,
    /// Flags of the request: where the children are to run.
    pub flags: u32,
}

impl Order {
    /// Size in bytes.
    pub const BYTES: usize = 32;

    /// What is to be typed at the guest's console.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.count, self.dirty_pages, self.rewrite_pages, self.depth];
        for (at, word) in words.iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[16..24].copy_from_slice(&self.pace_tsc.to_le_bytes());
        bytes[24] = u8::from(self.stay);
        bytes[25] = u8::from(self.tell_generation);
        bytes[28..32].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

global_asm!(
    ".pushsection .rodata.user",
    ".globl user_start, user_code", // the compiler may have their addresses taken from another object file
    ".hidden user_start, user_code",
    "user_start:",
    "    or qword ptr [{pml4}], 4", // user code may reach all of the first and the control page's 2 MiB pages
    "    or qword ptr [{pdpt}], 4",
    "    or qword ptr [{pdpt} + 24], 4",
    "    or qword ptr [{directory} + 3 * 4096 + {control} % 0x40000000 / 0x200000 * 8], 4",
    "    mov edi, {directory}",
    "    mov ecx, 512",
    "2:  or qword ptr [rdi], 4",
    "    add edi, 8",
    "    dec ecx",
    "    jnz 2b",
    "    mov rax, cr3",
    "    mov cr3, rax",
    "    mov ecx, {efer}",
    "    rdmsr",
    "    or eax, 1",
    "    wrmsr",
    "    mov ecx, {star}",
    "    xor eax, eax",
    "    mov edx, {selectors}",
    "    wrmsr",
    "    mov edi, {tables}", // a way back to CPL 0
    "    mov rax, {kernel_code}",
    "    mov [rdi + 0x10], rax",
    "    mov rax, {task_state_low}",
    "    mov [rdi + 0x38], rax",
    "    mov word ptr [rdi + 0x106], 0x47",
    "    mov [rdi + 0x108], rdi",
    "    lgdt [rdi + 0x106]",
    "    mov dword ptr [{task_state} + 4], {kernel_stack}",
    "    mov word ptr [{ports_offset}], {ports}",
    "    mov eax, 0x38",
    "    ltr ax",
    "    lea rax, [rip + user_stand_still]", // its address is below 4 GiB
    "    mov rcx, {gate_low}",
    "    mov cx, ax",
    "    shr eax, 16",
    "    shl rax, 48",
    "    or rcx, rax",
    "    mov [{protection_gate}], rcx",
    "    mov word ptr [rdi + 0x116], 0xfff",
    "    mov dword ptr [rdi + 0x118], {gates}",
    "    lidt [rdi + 0x116]",
    "    lea rcx, [rip + user_code]",
    "    mov r11d, {flags}",
    "    mov esp, {order}",
    "    sysretq",
    "user_stand_still:",
    "    hlt",
    "    jmp user_stand_still",
    "user_code:",
    "    mov ebp, {order}",
    "    mov ebx, {control}",
    "    xor r15d, r15d", // number of the last request
    "    mov edi, 1",     // says that it is ready for orders
    "    call user_line",
    "10: xor r12d, r12d", // read an order
    "11: mov edx, 0x3fd",
    "    in al, dx",
    "    test al, 1",
    "    jnz 12f",
    "    mov r13d, 1000000",
    "    call user_wait",
    "    jmp 11b",
    "12: mov edx, 0x3f8",
    "    in al, dx",
    "    mov [rbp + r12], al",
    "    inc r12d",
    "    cmp r12d, {order_bytes}",
    "    jb 11b",
    "20: mov r13, [rbp + 16]", // carry it out
    "    call user_wait",
    "    mov ecx, [rbp + 4]",
    "    call user_dirty",
    "    cmp dword ptr [rbp], 0",
    "    je 50f",
    "    inc r15",
    "    mov [rbx + {request}], r15",
    "    mov eax, [rbp]",
    "    mov [rbx + {request} + 8], eax",
    "    mov eax, [rbp + 28]",
    "    mov [rbx + {request} + 12], eax",
    "    mov dword ptr [rbx + {request} + 16], 0x636e6562", // "benc"
    "    mov dword ptr [rbx + {request} + 20], 0x68",       // "h"
    "    mov edx, {doorbell}",
    "    mov eax, {fork}",
    "    out dx, eax",
    "    mov eax, [rbx + {identity} + 4]",
    "    mov edx, {answer}",
    "    out dx, eax",
    "    cmp byte ptr [rbp + 25], 0",
    "    je 21f",
    "    mov eax, [rbx + {generation_offset}]",
    "    mov edi, [rbx + rax]",
    "    call user_line",
    "21:",
    "    cmp dword ptr [rbx + {response} + 8], {forked}",
    "    jne 22f",
    "    cmp dword ptr [rbx + {identity}], {child}",
    "    je 30f",
    // A parent, or there was no fork: a booted VM waits for its next order.
    "22: cmp dword ptr [rbx + {identity} + 12], 0",
    "    je 10b",
    "    jmp 40f",
    "30: mov ecx, [rbp + 8]", // a child
    "    test ecx, ecx",
    "    jz 31f",
    "    call user_dirty",
    "    mov edi, [rbx + {identity} + 4]",
    "    call user_line",
    "31: cmp dword ptr [rbp + 12], 0",
    "    je 40f",
    "    dec dword ptr [rbp + 12]",
    "    jmp 20b",
    "40: cmp byte ptr [rbp + 24], 0",
    "    je 41f",
    "    hlt", // a general protection fault: on to CPL 0
    "41: mov edx, 0x600",
    "    mov eax, 0x34",
    "    out dx, al",
    "    jmp 41b",
    "50: mov edx, 0x3fd", // no fork
    "    in al, dx",
    "    test al, 1",
    "    jz 50b",
    "    mov edx, 0x3f8",
    "    in al, dx",
    "    inc r15",
    "    xor ecx, ecx",
    "    cmp al, {rewrite}",
    "    cmove ecx, [rbp + 8]",
    "    call user_dirty",
    "    mov edi, 1",
    "    call user_line",
    "    jmp 40b",
    "user_wait:", // until R13 units of the TSC have passed
    "    call user_tsc",
    "    add r13, rax",
    "1:  pause",
    "    call user_tsc",
    "    cmp rax, r13",
    "    jb 1b",
    "    ret",
    "user_tsc:",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    ret",
    "user_dirty:", // write to ECX pages, to none what another one has
    "    mov edi, {data}",
    "    jmp 2f",
    "1:  mov [rdi], r15",
    "    mov [rdi + 8], rdi",
    "    add rdi, 4096",
    "    dec ecx",
    "2:  test ecx, ecx",
    "    jnz 1b",
    "    ret",
    elf::print_line!("user_line"),
    "user_end:",
    ".popsection",
    pml4 = const PML4,
    pdpt = const PDPT,
    directory = const DIRECTORY,
    control = const CONTROL_PAGE,
    efer = const EFER,
    star = const STAR,
    tables = const TABLES,
    kernel_code = const KERNEL_CODE,
    task_state_low = const TASK_STATE_LOW,
    task_state = const TASK_STATE,
    kernel_stack = const KERNEL_STACK,
    ports_offset = const PORTS_OFFSET,
    ports = const PORTS,
    gate_low = const GATE_LOW,
    protection_gate = const PROTECTION_GATE,
    gates = const GATES,
    selectors = const SELECTORS,
    flags = const USER_FLAGS,
    order = const ORDER,
    order_bytes = const Order::BYTES,
    rewrite = const REWRITE,
    data = const DATA,
    answer = const ANSWER_PORT,
    doorbell = const DOORBELL,
    fork = const doorbell::FORK,
    request = const PAGE.request.offset,
    response = const PAGE.response.offset,
    identity = const PAGE.identity.offset,
    generation_offset = const offset_of!(Header, generation_offset),
    forked = const Status::Forked.number(),
    child = const Role::Child.number(),
);

unsafe extern "C" {
    static user_start: u8;
    static user_code: u8;
    static user_end: u8;
}

/// Machine code that goes on at CPL 3 behind its end, where it stands at the start of a kernel of its own.
pub(crate) fn way_to_user_code() -> &'static [u8] {
    let (start, end) = (&raw const user_start, &raw const user_code);
    // SAFETY: both labels lie in the one section above, in this order, and what is between them is never
    // written.
    unsafe { slice::from_raw_parts(start, end as usize - start as usize) }
}

/// The guest as an ELF file.
///
/// # Panics
/// Where the file can't be written.
pub fn kernel() -> NamedTempFile {
    let (start, end) = (&raw const user_start, &raw const user_end);
    // SAFETY: both labels lie in the one section above, in this order, and what is between them is never
    // written.
    elf::kernel(unsafe { slice::from_raw_parts(start, end as usize - start as usize) })
}
