//! A guest without an operating system that fills all registers that it has, and then looks again and again
//! whether each still holds what it did.
//!
//! It comes to CPL 3 as [`user_guest`] does, and from there to CPL 0 by a general protection fault
//! whenever it wants: it executes HLT, and the gate leads to code of its own. At CPL 0 it writes and reads
//! model-specific registers, debug registers and interrupt controllers; at CPL 3, where a KVM that emulates
//! guest kernel code runs it natively, the components of XSAVE.
//!
//! It prints numbers as lines of eight hexadecimal digits: how many model-specific registers it has found,
//! and how many of them it has changed; then, with each look, what differs (an index, or one of the marks
//! below), and how much that was.

use std::{arch::global_asm, slice};

use tempfile::NamedTempFile;

use crate::{elf, user_guest};

/// Stands for component 0 of the XSAVE area where that differs, and so on.
pub const COMPONENT_MARK: u32 = 0xfa00_0000;

/// Stands for a debug register, a local APIC's or I/O APIC's register, a port.
pub const DEBUG_MARK: u32 = 0xfb00_0000;

/// Stands for a register of an interrupt controller in memory.
pub const MEMORY_MARK: u32 = 0xfc00_0000;

/// Stands for one at a port.
pub const PORT_MARK: u32 = 0xfd00_0000;

// Memory: variables, what is known of registers (16 bytes each: index, then content), two XSAVE areas.
//
//   0x300000  page that paravirtual registers may name
//   0x310000  where a fault at CPL 0 goes on; 0 in front of the first one
//   0x310008  stack pointer there
//   0x310010  known model-specific registers
//   0x310018  components of XSAVE
//   0x310020  differences
//   0x310028  changed registers
//   0x310038  whether there is XSAVE
//   0x311000  size and offset of each component, 4 bytes each
//   0x320000  known registers
//   0x400000  XSAVE area that is loaded
//   0x410000  XSAVE area that is stored
global_asm!(
    ".pushsection .rodata.state",
    "state_code:", // CPL 3: have the gate lead here, and take it
    "    lea rax, [rip + state_fault]",
    "    mov rcx, 0x00008e0000100000",
    "    mov cx, ax",
    "    shr eax, 16",
    "    shl rax, 48",
    "    or rcx, rax",
    "    mov [0x1810d0], rcx",
    "    hlt",
    "state_fault:", // CPL 0
    "    mov rax, [0x310000]",
    "    test rax, rax",
    "    jz state_begin",
    "    mov rsp, [0x310008]",
    "    jmp rax",
    "state_begin:",
    "    mov [0x310008], rsp",
    "    mov rax, cr4",
    "    or eax, 0x600", // OSXMMEXCPT, OSFXSR
    "    mov cr4, rax",
    "    mov qword ptr [0x310018], 3", // x87 and SSE: where there is no XSAVE, FXSAVE has both
    "    mov eax, 1",
    "    cpuid",
    "    bt ecx, 26",
    "    jnc 8f",
    "    mov rax, cr4",
    "    or eax, 0x40000", // OSXSAVE
    "    mov cr4, rax",
    "    mov eax, 0xd",
    "    xor ecx, ecx",
    "    cpuid",
    "    xor edx, edx",
    "    xor ecx, ecx",
    "    mov [0x310018], rax",
    "    xsetbv",
    "    mov byte ptr [0x310038], 1",
    "    mov eax, 7",
    "    xor ecx, ecx",
    "    cpuid",
    "    bt ecx, 3",
    "    jnc 8f",
    "    mov rax, cr4", // as Linux does where there are protection keys
    "    or eax, 0x400000", // PKE
    "    mov cr4, rax",
    "8:  mov esi, 2", // where components are: here, for at CPL 3 CPUID may be a fault later
    "9:  mov eax, 0xd",
    "    mov ecx, esi",
    "    cpuid",
    "    mov [rsi * 8 + 0x311000], eax",
    "    mov [rsi * 8 + 0x311004], ebx",
    "    inc esi",
    "    cmp esi, 10",
    "    jb 9b",
    "    lea rsi, [rip + state_ranges]", // look for registers
    "    mov edi, 0x320000",
    "10: mov ebx, [rsi]",
    "    mov ebp, [rsi + 4]",
    "    add rsi, 8",
    "    test ebp, ebp",
    "    jz 20f",
    "11: lea rax, [rip + 12f]",
    "    mov [0x310000], rax",
    "    mov ecx, ebx",
    "    rdmsr",
    "    mov [rdi], ebx",
    "    mov [rdi + 8], eax",
    "    mov [rdi + 12], edx",
    "    add rdi, 16",
    "    inc dword ptr [0x310010]",
    "12: inc ebx",
    "    dec ebp",
    "    jnz 11b",
    "    jmp 10b",
    "20: mov ebp, [0x310010]", // change each: with the first value that it takes
    "    mov edi, 0x320000",
    "21: lea rsi, [rip + state_trials]",
    "22: mov r8d, [rsi]",
    "    mov r9d, [rsi + 4]",
    "    add rsi, 8",
    "    mov eax, r8d",
    "    or eax, r9d",
    "    jz 26f",
    "    lea rax, [rip + 22b]",
    "    mov [0x310000], rax",
    "    mov ecx, [rdi]",
    "    mov eax, r8d",
    "    mov edx, r9d",
    "    wrmsr",
    "    mov ecx, [rdi]",
    "    rdmsr",
    "    cmp eax, [rdi + 8]",
    "    jne 25f",
    "    cmp edx, [rdi + 12]",
    "    je 22b",
    "25: inc dword ptr [0x310028]",
    "26: add rdi, 16",
    "    dec ebp",
    "    jnz 21b",
    "    mov rax, 0x1111222233334444", // debug registers, without a breakpoint
    "    mov dr0, rax",
    "    mov rax, 0x2222333344445555",
    "    mov dr1, rax",
    "    mov rax, 0x3333444455556666",
    "    mov dr2, rax",
    "    mov rax, 0x4444555566667777",
    "    mov dr3, rax",
    "    mov eax, 0xffff0ff5",
    "    mov dr6, rax",
    "    mov eax, 0x700",
    "    mov dr7, rax",
    "    mov eax, 0xfee00000", // local APIC
    "    mov dword ptr [rax + 0xf0], 0x1ff",
    "    mov dword ptr [rax + 0x80], 0x20",
    "    mov dword ptr [rax + 0xd0], 0x5000000",
    "    mov dword ptr [rax + 0x340], 0x10031",
    "    mov dword ptr [rax + 0x350], 0x10032",
    "    mov dword ptr [rax + 0x360], 0x10033",
    "    mov dword ptr [rax + 0x370], 0x10034",
    "    mov dword ptr [rax + 0x3e0], 0xb",
    "    mov eax, 0xfec00000", // I/O APIC: entries 5 and 17
    "    mov dword ptr [rax], 0x1a",
    "    mov dword ptr [rax + 0x10], 0x10035",
    "    mov dword ptr [rax], 0x33",
    "    mov dword ptr [rax + 0x10], 0x7000000",
    "    mov al, 0x5a", // masks of the old interrupt controllers, and which of their lines are levels
    "    out 0x21, al",
    "    mov al, 0xa5",
    "    out 0xa1, al",
    "    mov edx, 0x4d0",
    "    mov al, 0x20",
    "    out dx, al",
    "    inc edx",
    "    mov al, 0x0c",
    "    out dx, al",
    "    xor ebx, ebx", // what is known: read twice, and what changes by itself is forgotten
    "    call state_registers",
    "    mov ecx, 2000",
    "30: dec ecx",
    "    jnz 30b",
    "    mov ebx, 1",
    "    call state_registers",
    "    mov edi, [0x310010]",
    "    call state_line",
    "    mov edi, [0x310028]",
    "    call state_line",
    "    mov edi, 0x400000", // an XSAVE area: all of it is a pattern, but for what must be otherwise
    "    mov ecx, 0x1000",
    "    mov eax, 0x12345678",
    "31: mov [rdi], eax",
    "    add eax, 0x01030507",
    "    add edi, 4",
    "    dec ecx",
    "    jnz 31b",
    "    mov edi, 0x400000",
    "    mov qword ptr [rdi], 0x37f", // x87: control; no pointers, which some processors don't keep
    "    mov qword ptr [rdi + 8], 0",
    "    mov qword ptr [rdi + 16], 0",
    "    mov qword ptr [rdi + 24], 0x1fa0", // MXCSR
    "    mov byte ptr [rdi + 4], 0xff",     // all of its registers are in use
    "    mov ecx, 8",
    "32: mov word ptr [rdi + 42], 0", // registers of ten bytes
    "    mov dword ptr [rdi + 44], 0",
    "    add edi, 16",
    "    dec ecx",
    "    jnz 32b",
    "    mov edi, 0x400200",
    "    mov ecx, 16",
    "33: mov dword ptr [rdi], 0",
    "    add edi, 4",
    "    dec ecx",
    "    jnz 33b",
    "    mov rax, [0x310018]",
    "    mov [0x400200], rax",
    "    bt eax, 9", // PKRU: key 0, which all pages have, allows all
    "    jnc 34f",
    "    mov eax, [9 * 8 + 0x311004]",
    "    and byte ptr [rax + 0x400000], 0xfc",
    "    mov dword ptr [rax + 0x400004], 0", // nothing is there, and nothing stays there
    "34:",
    "    lea rax, [rip + state_look]", // a fault from here on is HLT at CPL 3
    "    mov [0x310000], rax",
    "    lea rcx, [rip + state_load]",
    "    mov r11d, 0x3002",
    "    mov esp, 0x300000",
    "    sysretq",
    "state_load:", // CPL 3
    "    mov edi, 0x400000",
    "    cmp byte ptr [0x310038], 0",
    "    je 39f",
    "    mov eax, [0x310018]",
    "    xor edx, edx",
    "    xrstor [rdi]",
    "    jmp 40f",
    "39: fxrstor [rdi]",
    "40: mov edi, 0x410000", // a look: what was stored before counts for nothing
    "    mov ecx, 0x1000",
    "    xor eax, eax",
    "    rep stosd",
    "    mov edi, 0x410000",
    "    cmp byte ptr [0x310038], 0",
    "    je 44f",
    "    mov eax, [0x310018]",
    "    xor edx, edx",
    "    xsave [rdi]",
    "    jmp 46f",
    "44: fxsave [rdi]",
    "46: mov dword ptr [0x310020], 0",
    "    xor r8d, r8d", // component
    "    xor r9d, r9d", // where it begins, and how long it is
    "    mov r10d, 416",
    "41: mov esi, 0x400000",
    "    mov edi, 0x410000",
    "    add esi, r9d",
    "    add edi, r9d",
    "    mov ecx, r10d",
    "    test r8d, r8d",
    "    jnz 42f",
    "    mov dword ptr [rdi + 28], 0", // a mask that is not loaded
    "    mov dword ptr [rsi + 28], 0",
    "42: repe cmpsb",
    "    je 43f",
    "    lea edi, [r8 + 0x7a000000]",
    "    bts edi, 31",
    "    call state_differs",
    "43: inc r8d",
    "    cmp r8d, 2",
    "    jb 43b",
    "    cmp r8d, 10",
    "    je 45f",
    "    bt [0x310018], r8d",
    "    jnc 43b",
    "    mov r9d, [r8 * 8 + 0x311004]",
    "    mov r10d, [r8 * 8 + 0x311000]",
    "    jmp 41b",
    "45: hlt",
    "state_look:", // CPL 0
    "    mov ebx, 2",
    "    call state_registers",
    "    mov edi, [0x310020]",
    "    call state_line",
    "    lea rax, [rip + state_look]",
    "    mov [0x310000], rax",
    "    lea rcx, [rip + 40b]",
    "    mov r11d, 0x3002",
    "    mov esp, 0x300000",
    "    sysretq",
    "state_differs:",
    "    inc dword ptr [0x310020]",
    "    jmp state_line",
    // EBX says what to do with what is read: 0 note it, 1 forget what has changed, 2 count what has changed.
    "state_registers:",
    "    lea rax, [rip + state_stray]",
    "    mov [0x310000], rax",
    "    mov ebp, [0x310010]",
    "    mov esi, 0x320000",
    "50: mov ecx, [rsi]",
    "    cmp ecx, -1", // forgotten
    "    je 51f",
    "    rdmsr",
    "    mov edi, ecx",
    "    call state_compare",
    "51: add esi, 16",
    "    dec ebp",
    "    jnz 50b",
    "    mov edi, {debug}",
    "    mov rax, dr0",
    "    call state_compare_next",
    "    mov rax, dr1",
    "    call state_compare_next",
    "    mov rax, dr2",
    "    call state_compare_next",
    "    mov rax, dr3",
    "    call state_compare_next",
    "    mov rax, dr6",
    "    call state_compare_next",
    "    mov rax, dr7",
    "    call state_compare_next",
    "    lea r8, [rip + state_memory]",
    "    mov edi, {memory}",
    "52: mov ecx, [r8]",
    "    test ecx, ecx",
    "    jz 53f",
    "    mov eax, [rcx]",
    "    add r8, 4",
    "    call state_compare_next",
    "    jmp 52b",
    "53: mov ecx, 0xfec00000",
    "    mov dword ptr [rcx], 0x1a",
    "    mov eax, [rcx + 0x10]",
    "    call state_compare_next",
    "    mov dword ptr [rcx], 0x33",
    "    mov eax, [rcx + 0x10]",
    "    call state_compare_next",
    "    lea r8, [rip + state_ports]",
    "    mov edi, {port}",
    "54: movzx edx, word ptr [r8]",
    "    test edx, edx",
    "    jz 55f",
    "    xor eax, eax",
    "    in al, dx",
    "    add r8, 2",
    "    call state_compare_next",
    "    jmp 54b",
    "55: ret",
    "state_compare_next:", // RAX, as the next one that is known, which EDI stands for
    "    mov rdx, rax",
    "    shr rdx, 32",
    "    inc edi",
    "    call state_compare",
    "    add esi, 16",
    "    ret",
    "state_compare:", // EDX:EAX with what is known at RSI, which EDI stands for
    "    test ebx, ebx",
    "    jz 60f",
    "    cmp eax, [rsi + 8]",
    "    jne 61f",
    "    cmp edx, [rsi + 12]",
    "    jne 61f",
    "    ret",
    "60: mov [rsi + 8], eax",
    "    mov [rsi + 12], edx",
    "    ret",
    "61: cmp dword ptr [rsi], -1",
    "    je 63f",
    "    cmp ebx, 1",
    "    je 62f",
    "    push rdi",
    "    push rcx",
    "    call state_differs",
    "    pop rcx",
    "    pop rdi",
    "    ret",
    "62: mov dword ptr [rsi], -1",
    "63: ret",
    "state_stray:", // a register that could be read once, and no more
    "    mov edi, -1",
    "    call state_line",
    "3:  hlt",
    "    jmp 3b",
    elf::print_line!("state_line"),
    ".balign 8",
    // First index, and how many: but for what counts time, where the local APIC is, and what SYSRET goes by.
    "state_ranges:",
    "    .long 0, 0x10",
    "    .long 0x11, 0xa",
    "    .long 0x1c, 0x6c4",
    "    .long 0x6e1, 0x11f",
    "    .long 0x900, 0x700",
    "    .long 0x4b564d00, 0x10",
    "    .long 0xc0000082, 0x17e",
    "    .long 0xc0010000, 0x300",
    "    .long 0xc0011000, 0x40",
    "    .long 0, 0",
    "state_trials:", // values: an address, memory types, what a default type may be, bits
    "    .quad 0x300001, 0x0606060606060606, 0xc06, 0x5000, 1, 2, -1, 0",
    "state_memory:",
    "    .long 0xfee00080, 0xfee000d0, 0xfee000f0, 0xfee00340, 0xfee00350",
    "    .long 0xfee00360, 0xfee00370, 0xfee003e0, 0",
    "state_ports:",
    "    .word 0x21, 0xa1, 0x4d0, 0x4d1, 0",
    "state_end:",
    ".popsection",
    debug = const DEBUG_MARK,
    memory = const MEMORY_MARK,
    port = const PORT_MARK,
);

unsafe extern "C" {
    static state_code: u8;
    static state_end: u8;
}

/// The guest as an ELF file.
///
/// # Panics
/// Where the file can't be written.
pub fn kernel() -> NamedTempFile {
    let (start, end) = (&raw const state_code, &raw const state_end);
    // SAFETY: both labels lie in the one section above, in this order, and what is between them is never
    // written.
    let code = unsafe { slice::from_raw_parts(start, end as usize - start as usize) };
    elf::kernel(&[user_guest::way_to_user_code(), code].concat())
}
