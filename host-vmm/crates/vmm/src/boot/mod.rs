//! Filling a new VM's memory with a kernel, an initrd, and what the kernel wants to know of the machine.

use std::{fs::File, io, sync::Arc};

use linux_loader::cmdline;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::arch::layout::{Gpa, ram_pieces};

mod acpi;
mod kernel;
mod params;

/// What to boot.
#[derive(Debug)]
pub struct Payload {
    /// A bzImage, or an ELF file whose entry is the kernel's 64-bit one.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Why a payload can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The memory could not be mapped for loading.
    #[error("can't map the guest's memory for loading")]
    Map(#[source] vm_memory::mmap::FromRangesError),
    /// Something does not fit into the memory.
    #[error("can't write {what} at {gpa}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Where.
        gpa: Gpa,
        /// Why not.
        source: GuestMemoryError,
    },
    /// The kernel is neither a bzImage nor a 64-bit ELF file that fits.
    #[error(
        "can't load the kernel: it must be a bzImage or an ELF vmlinux for x86-64 that fits into the memory"
    )]
    Kernel(#[source] linux_loader::loader::Error),
    /// The kernel has no 64-bit entry.
    #[error("the kernel has no 64-bit entry point (XLF_KERNEL_64 is not set)")]
    NoLongModeEntry,
    /// The kernel's entry does not lie in memory.
    #[error("the kernel's entry point {0} does not lie in the guest's memory")]
    Entry(Gpa),
    /// The initrd could not be read.
    #[error("can't read the initrd")]
    Initrd(#[source] io::Error),
    /// The initrd does not fit into the memory.
    #[error("the initrd of {bytes} bytes does not fit behind the kernel: give the VM more memory")]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
    },
    /// The zero page could not be written.
    #[error("can't write the kernel's boot parameters")]
    ZeroPage(#[source] Box<linux_loader::configurator::Error>),
    /// The command line is too long or holds characters that it can't.
    #[error("the command line is not valid")]
    Cmdline(#[source] cmdline::Error),
}

/// Loads `payload` into `memory`, the shared file of a VM of `bytes` bytes and `vcpus` vCPUs, and returns the
/// kernel's entry.
///
/// # Errors
/// [`Error`]: what does not fit or is not what it should be.
pub fn load(payload: &mut Payload, memory: &Arc<File>, bytes: u64, vcpus: u8) -> Result<Gpa, Error> {
    let pieces = ram_pieces(bytes).into_iter().map(|piece| {
        let length = usize::try_from(piece.bytes).unwrap_or(usize::MAX);
        (GuestAddress(piece.gpa.0), length, Some(FileOffset::from_arc(Arc::clone(memory), piece.offset)))
    });
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files(pieces).map_err(Error::Map)?;
    let kernel = kernel::load(&memory, &mut payload.kernel)?;
    let initrd =
        payload.initrd.as_mut().map(|file| kernel::load_initrd(&memory, file, &kernel, bytes)).transpose()?;
    kernel::load_cmdline(&memory, &payload.cmdline)?;
    let rsdp = acpi::write(&memory, vcpus)?;
    params::write(&memory, &kernel, initrd, payload.cmdline.len(), rsdp, bytes)?;
    params::write_reset_vector(&memory)?;
    params::write_entry_tables(&memory)?;
    Ok(kernel.entry)
}

/// Turns a failed write into an [`Error::Write`].
fn write(what: &'static str, gpa: Gpa) -> impl FnOnce(GuestMemoryError) -> Error {
    move |source| Error::Write { what, gpa, source }
}
