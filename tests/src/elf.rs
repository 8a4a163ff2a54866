//! Machine code as an ELF file that `host-vmm run --kernel` boots.

use std::io::Write;

use tempfile::NamedTempFile;

/// Where the code is loaded, and begins: behind the first MiB.
pub(crate) const ADDRESS: u64 = 0x20_0000;

/// Assembly of a subroutine of this name, which prints EDI in hexadecimal, and a new line. It changes RAX,
/// RCX, RDX and RDI.
macro_rules! print_line {
    ($name:literal) => {
        concat!(
            $name,
            ": mov ecx, 8\n",
            "1: rol edi, 4\n",
            "mov eax, edi\n",
            "and eax, 15\n",
            "add eax, 48\n",
            "cmp eax, 57\n",
            "jbe 2f\n",
            "add eax, 39\n",
            "2: mov edx, 0x3f8\n",
            "out dx, al\n",
            "dec ecx\n",
            "jnz 1b\n",
            "mov eax, 10\n",
            "out dx, al\n",
            "ret\n",
        )
    };
}
pub(crate) use print_line;

/// Code that starts with its first byte at [`ADDRESS`], as a kernel.
///
/// # Panics
/// Where the file can't be written.
pub(crate) fn kernel(content: &[u8]) -> NamedTempFile {
    const HEADERS: u64 = 64 + 56;
    let length = content.len() as u64;
    let mut file = NamedTempFile::with_prefix("bare-").expect("a temporary file");
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let elf = [
        // e_ident: 64-bit, little-endian. Then ET_EXEC, EM_X86_64, version 1.
        words(&[0x0001_0102_464c_457f, 0, 0x0000_0001_003e_0002]),
        // e_entry, e_phoff, e_shoff.
        words(&[ADDRESS, 64, 0]),
        // e_flags and e_ehsize; e_phentsize 56, one program header; no sections.
        words(&[0x0038_0040_0000_0000, 0x0000_0040_0000_0001]),
        // PT_LOAD, readable, writable and executable; offset, two addresses, two sizes, alignment.
        words(&[0x0000_0007_0000_0001, HEADERS, ADDRESS, ADDRESS, length, length, 16]),
        content.to_vec(),
    ];
    file.write_all(&elf.concat()).expect("a kernel file that can be written");
    file
}
