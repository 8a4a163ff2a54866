//! Kernel, initrd and command line.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
};

use linux_loader::{
    bootparam::setup_header,
    cmdline::Cmdline,
    loader::{self, BzImage, Elf, KernelLoader, KernelLoaderResult, bzimage, load_cmdline as write_cmdline},
};
use types::PAGE_BYTES;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{Error, write};
use crate::arch::layout::{CMDLINE, CMDLINE_MAX_BYTES, GAP_START, Gpa, HIGH_RAM_START};

/// The 64-bit entry of a bzImage lies so far behind its load address (kernel documentation,
/// arch/x86/boot.rst).
const BZIMAGE_ENTRY_OFFSET: u64 = 0x200;

/// `xloadflags`: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;

/// Highest initrd address that every kernel accepts; newer ones say in their header if more is fine.
const INITRD_MAX: u64 = 0x37ff_ffff;

/// A loaded kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Where it starts to run.
    pub(super) entry: Gpa,
    /// First byte behind it, with the room that it needs to unpack itself.
    pub(super) end: u64,
    /// A bzImage's own header.
    pub(super) header: Option<setup_header>,
}

/// Where the initrd lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct Initrd {
    pub(super) gpa: Gpa,
    pub(super) bytes: u64,
}

/// Loads a bzImage, or else an ELF file.
pub(super) fn load(memory: &GuestMemoryMmap, image: &mut File) -> Result<Kernel, Error> {
    let start = Some(GuestAddress(HIGH_RAM_START.0));
    let kernel = match BzImage::load(memory, None, image, start) {
        Ok(loaded) => from_bzimage(loaded)?,
        Err(loader::Error::Bzimage(bzimage::Error::InvalidBzImage | bzimage::Error::ReadBzImageHeader)) => {
            let loaded = Elf::load(memory, None, image, start).map_err(Error::Kernel)?;
            Kernel { entry: Gpa(loaded.kernel_load.0), end: loaded.kernel_end, header: None }
        }
        Err(error) => return Err(Error::Kernel(error)),
    };
    if !memory.address_in_range(GuestAddress(kernel.entry.0)) {
        return Err(Error::Entry(kernel.entry));
    }
    Ok(kernel)
}

fn from_bzimage(loaded: KernelLoaderResult) -> Result<Kernel, Error> {
    let header = loaded.setup_header.unwrap_or_default();
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::NoLongModeEntry);
    }
    let unpacked = loaded.kernel_load.0 + u64::from(header.init_size);
    // The kernel unpacks itself to where it would like to be, which can be higher than where it was loaded.
    let preferred = header.pref_address + u64::from(header.init_size);
    Ok(Kernel {
        entry: Gpa(loaded.kernel_load.0 + BZIMAGE_ENTRY_OFFSET),
        end: loaded.kernel_end.max(unpacked).max(preferred),
        header: Some(header),
    })
}

/// Puts the initrd as high as the kernel takes it, below the gap.
pub(super) fn load_initrd(
    memory: &GuestMemoryMmap,
    file: &mut File,
    kernel: &Kernel,
    ram_bytes: u64,
) -> Result<Initrd, Error> {
    let bytes = file.seek(SeekFrom::End(0)).map_err(Error::Initrd)?;
    file.rewind().map_err(Error::Initrd)?;
    let kernel_max = kernel.header.map_or(INITRD_MAX, |header| u64::from(header.initrd_addr_max));
    let end = ram_bytes.min(GAP_START.0).min(kernel_max + 1);
    let start = end.checked_sub(bytes).map(|start| start / PAGE_BYTES * PAGE_BYTES);
    let start = start.filter(|start| *start >= kernel.end).ok_or(Error::InitrdTooLarge { bytes })?;
    let length = usize::try_from(bytes).map_err(|_| Error::InitrdTooLarge { bytes })?;
    let gpa = Gpa(start);
    memory.read_exact_volatile_from(GuestAddress(start), file, length).map_err(write("the initrd", gpa))?;
    Ok(Initrd { gpa, bytes })
}

/// Writes the command line.
pub(super) fn load_cmdline(memory: &GuestMemoryMmap, text: &str) -> Result<(), Error> {
    let cmdline = Cmdline::try_from(text, CMDLINE_MAX_BYTES).map_err(Error::Cmdline)?;
    write_cmdline(memory, GuestAddress(CMDLINE.0), &cmdline).map_err(Error::Kernel)
}
