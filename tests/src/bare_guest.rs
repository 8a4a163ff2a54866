//! A guest without an operating system: it does what a test has written down, at CPL 0, step by step.
//!
//! It is an ELF file that `host-vmm run --kernel` boots like any other. It needs a few hundred instructions,
//! so that it runs on a KVM that emulates guest kernel code too.

use std::{arch::global_asm, slice};

use tempfile::NamedTempFile;
use vmfork_abi::{PAGE, Request, pad_text};

use crate::elf;

/// Where `host-vmm` puts the control page, and listens for the doorbell. A guest would find both by CPUID.
pub const CONTROL_PAGE: u64 = 0xd000_0000;
/// Where `host-vmm` puts the VM generation ID: behind all that belongs to the control page. A guest would
/// find it by ACPI.
pub const GENERATION_ID: u64 = CONTROL_PAGE + vmfork_abi::REGION_BYTES as u64;
/// Port of the doorbell.
pub const DOORBELL: u16 = 0x560;

/// The machine's sleep control register, and what switches it off.
const SLEEP_CONTROL: u16 = 0x600;
const SWITCH_OFF: u32 = 0x34;

// Steps of 24 bytes: what to do, and two operands.
global_asm!(
    ".pushsection .rodata.bare",
    "bare_start:",
    "    lea rbp, [rip + bare_end]",
    "2:  mov rax, [rbp]",
    "    mov rbx, [rbp + 8]",
    "    mov rcx, [rbp + 16]",
    "    add rbp, 24",
    "    cmp eax, 1",
    "    je 10f",
    "    cmp eax, 2",
    "    je 20f",
    "    cmp eax, 3",
    "    je 30f",
    "    cmp eax, 4",
    "    je 40f",
    "    cmp eax, 5",
    "    je 50f",
    "    cmp eax, 6",
    "    je 60f",
    "    cmp eax, 7",
    "    je 70f",
    "    cmp eax, 8",
    "    je 80f",
    "    cmp eax, 9",
    "    je 95f",
    "    cmp eax, 10",
    "    je 100f",
    "    cmp eax, 11",
    "    je 110f",
    "    cmp eax, 12",
    "    je 120f",
    "    cmp eax, 13",
    "    je 130f",
    "    cmp eax, 14",
    "    je 140f",
    "    cmp eax, 15",
    "    je 150f",
    "    cmp eax, 16",
    "    je 160f",
    "    cmp eax, 17",
    "    je 170f",
    "3:  hlt",
    "    jmp 3b",
    "10: mov [rbx], ecx", // store 4 bytes
    "    jmp 2b",
    "20: mov edi, [rbx]", // print 4 bytes
    "    call bare_line",
    "    jmp 2b",
    "30: mov edx, ebx", // write 4 bytes to a port
    "    mov eax, ecx",
    "    out dx, eax",
    "    jmp 2b",
    "40: mov edx, ebx", // write 1 byte to a port
    "    mov eax, ecx",
    "    out dx, al",
    "    jmp 2b",
    "50: mov edx, ebx", // write 2 bytes to a port
    "    mov eax, ecx",
    "    out dx, ax",
    "    jmp 2b",
    "60: mov rdx, rcx", // hypercall: GPA; pages below, command above; print the result
    "    shr rdx, 32",
    "    mov ecx, ecx",
    "    mov r8, rbx",
    "    push rcx",
    "    push rdx",
    "    xor eax, eax",
    "    cpuid",
    "    mov r9d, ebx",
    "    pop rdx",
    "    pop rcx",
    "    mov rbx, r8",
    "    mov eax, 12",
    "    cmp r9d, 0x68747541", // "Auth"enticAMD
    "    je 61f",
    "    vmcall",
    "    jmp 62f",
    "61: vmmcall",
    "62: mov edi, eax",
    "    call bare_line",
    "    jmp 2b",
    "70: mov eax, ecx", // fill the rest of a page with a byte
    "    mov edi, ebx",
    "    mov ecx, 4096",
    "    and ebx, 4095",
    "    sub ecx, ebx",
    "    rep stosb",
    "    jmp 2b",
    "80: mov eax, [rbx]", // go on behind so many steps where 4 bytes are not what they should be
    "    cmp eax, ecx",
    "    je 2b",
    "    shr rcx, 32",
    "    imul rcx, rcx, 24",
    "    add rbp, rcx",
    "    jmp 2b",
    "95: mov edx, 0x3fd", // wait for a byte of input
    "96: in al, dx",
    "    test al, 1",
    "    jz 96b",
    "    mov edx, 0x3f8",
    "    in al, dx",
    "    jmp 2b",
    "100: inc dword ptr [rbx]", // count so many times
    "    dec ecx",
    "    jnz 100b",
    "    jmp 2b",
    "110: cmp [rbx], ecx", // wait until 4 bytes are as they should be, or for a byte of input
    "    je 2b",
    "    mov edx, 0x3fd",
    "    in al, dx",
    "    test al, 1",
    "    jz 110b",
    "    mov edx, 0x3f8",
    "    in al, dx",
    "    jmp 2b",
    "120: imul rcx, rcx, 24", // go back so many steps
    "    sub rbp, rcx",
    "    jmp 2b",
    "130: mov eax, [rcx]", // print 4 bytes, by their offset
    "    mov edi, [rbx + rax]",
    "    call bare_line",
    "    jmp 2b",
    "140: mov eax, [rbx]", // copy 4 bytes
    "    mov [rcx], eax",
    "    jmp 2b",
    "150: mov rax, rcx", // write a model-specific register
    "    mov rdx, rcx",
    "    shr rdx, 32",
    "    mov ecx, ebx",
    "    wrmsr",
    "    jmp 2b",
    "160: mov rsi, rcx", // look at the clocks
    "161: mov r8d, [rbx]",
    "    test r8d, 1",
    "    jnz 161b",
    "    rdtsc",
    "    shl rdx, 32",
    "    or rax, rdx",
    "    mov r10, rax",
    "    sub rax, [rbx + 8]",
    "    movsx ecx, byte ptr [rbx + 28]",
    "    test ecx, ecx",
    "    js 162f",
    "    shl rax, cl",
    "    jmp 163f",
    "162: neg ecx",
    "    shr rax, cl",
    "163: mov r9d, [rbx + 24]",
    "    mul r9",
    "    shrd rax, rdx, 32",
    "    add rax, [rbx + 16]",
    "    cmp r8d, [rbx]",
    "    jne 161b",
    "    cmp r10, [rsi]",
    "    jae 164f",
    "    inc dword ptr [rsi + 16]",
    "164: cmp rax, [rsi + 8]",
    "    jae 165f",
    "    inc dword ptr [rsi + 20]",
    "165: mov [rsi], r10",
    "    mov [rsi + 8], rax",
    "    jmp 2b",
    "170: mov rdi, rcx", // store what CPUID answers
    "    mov eax, ebx",
    "    xor ecx, ecx",
    "    cpuid",
    "    mov [rdi], eax",
    "    mov [rdi + 4], ebx",
    "    mov [rdi + 8], ecx",
    "    mov [rdi + 12], edx",
    "    jmp 2b",
    elf::print_line!("bare_line"),
    "bare_end:",
    ".popsection",
);

unsafe extern "C" {
    static bare_start: u8;
    static bare_end: u8;
}

/// What a bare guest does.
#[derive(Debug, Clone, Default)]
pub struct Script {
    steps: Vec<[u64; 3]>,
}

impl Script {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn step(mut self, what: u64, first: u64, second: u64) -> Self {
        self.steps.push([what, first, second]);
        self
    }

    /// Waits until something is typed at the console.
    pub fn wait_for_input(self) -> Self {
        self.step(9, 0, 0)
    }

    /// Stores four bytes in memory.
    #[must_use]
    pub fn store(self, address: u64, value: u32) -> Self {
        self.step(1, address, u64::from(value))
    }

    /// Copies so many bytes of memory, a multiple of four.
    #[must_use]
    pub fn copy(self, from: u64, to: u64, bytes: u64) -> Self {
        (0..bytes / 4).fold(self, |script, word| script.step(14, from + 4 * word, to + 4 * word))
    }

    /// Prints four bytes of memory, as a line of eight hexadecimal digits.
    #[must_use]
    pub fn print(self, address: u64) -> Self {
        self.step(2, address, 0)
    }

    /// Prints the four bytes of memory that lie so far behind `address` as the four bytes at `offset_at` say.
    #[must_use]
    pub fn print_behind(self, address: u64, offset_at: u64) -> Self {
        self.step(13, address, offset_at)
    }

    /// Writes to a port, 1, 2 or 4 bytes wide.
    ///
    /// # Panics
    /// For another width.
    #[must_use]
    pub fn out(self, port: u16, value: u32, bytes: usize) -> Self {
        let what = match bytes {
            4 => 3,
            1 => 4,
            2 => 5,
            other => panic!("no port access is {other} bytes wide"),
        };
        self.step(what, u64::from(port), u64::from(value))
    }

    /// Makes the hypercall, and prints its result.
    #[must_use]
    pub fn hypercall(self, gpa: u64, pages: u32, command: u32) -> Self {
        self.step(6, gpa, u64::from(pages) | u64::from(command) << 32)
    }

    /// Fills memory with a byte, from an address to the end of its page.
    #[must_use]
    pub fn fill(self, address: u64, value: u8) -> Self {
        self.step(7, address, u64::from(value))
    }

    /// Does `then` only where four bytes of memory have this value.
    #[must_use]
    pub fn only_if(mut self, address: u64, value: u32, then: Self) -> Self {
        let skip = then.steps.len() as u64;
        self = self.step(8, address, u64::from(value) | skip << 32);
        self.steps.extend(then.steps);
        self
    }

    /// Adds one to four bytes of memory, so many times, which are not none.
    #[must_use]
    pub fn count(self, address: u64, times: u32) -> Self {
        self.step(10, address, u64::from(times))
    }

    /// Waits until four bytes of memory have this value, or something is typed at the console.
    #[must_use]
    pub fn wait_for_input_or(self, address: u64, value: u32) -> Self {
        self.step(11, address, u64::from(value))
    }

    /// Does something again and again.
    #[must_use]
    pub fn forever(mut self, what: Self) -> Self {
        let steps = what.steps.len() as u64 + 1;
        self.steps.extend(what.steps);
        self.step(12, 0, steps)
    }

    /// Writes a model-specific register.
    #[must_use]
    pub fn write_msr(self, index: u32, value: u64) -> Self {
        self.step(15, u64::from(index), value)
    }

    /// Looks at the time-stamp counter, and at kvmclock, whose structure is at `clock`. Stores both at
    /// `result`, 8 bytes each, and counts behind them, 4 bytes each, how often they have gone back from one
    /// look to the next.
    #[must_use]
    pub fn look_at_clocks(self, clock: u64, result: u64) -> Self {
        self.step(16, clock, result)
    }

    /// Stores what CPUID answers to a leaf: EAX, EBX, ECX and EDX, 4 bytes each.
    #[must_use]
    pub fn cpuid(self, leaf: u32, result: u64) -> Self {
        self.step(17, u64::from(leaf), result)
    }

    /// Stands still.
    #[must_use]
    pub fn hang(self) -> Self {
        self.step(0, 0, 0)
    }

    /// Writes a request into the control page.
    ///
    /// # Panics
    /// For a type that does not fit.
    #[must_use]
    pub fn request(mut self, seq: u64, vm_type: &str, count: u32) -> Self {
        let vm_type = pad_text(vm_type).expect("a VM type that fits");
        let bytes = Request { seq, count, vm_type, ..Default::default() }.to_bytes();
        for (word, chunk) in (0..).zip(bytes.as_chunks().0) {
            self = self.store(control(PAGE.request.offset) + 4 * word, u32::from_le_bytes(*chunk));
        }
        self
    }

    /// Rings the doorbell for a fork.
    #[must_use]
    pub fn ring(self) -> Self {
        self.out(DOORBELL, vmfork_abi::doorbell::FORK, 4)
    }

    /// Switches the VM off.
    #[must_use]
    pub fn off(self) -> Self {
        self.out(SLEEP_CONTROL, SWITCH_OFF, 1)
    }

    /// The guest as an ELF file. A script that comes to its end stands still.
    ///
    /// # Panics
    /// Where the file can't be written.
    pub fn to_kernel(&self) -> NamedTempFile {
        let mut content = machine_code().to_vec();
        content.extend(self.steps.iter().chain([&[0; 3]]).flatten().flat_map(|word| word.to_le_bytes()));
        elf::kernel(&content)
    }
}

/// Address of a byte of the control page.
pub fn control(offset: usize) -> u64 {
    CONTROL_PAGE + offset as u64
}

fn machine_code() -> &'static [u8] {
    let (start, end) = (&raw const bare_start, &raw const bare_end);
    // SAFETY: both labels lie in the one section above, in this order, and what is between them is never
    // written.
    unsafe { slice::from_raw_parts(start, end as usize - start as usize) }
}
