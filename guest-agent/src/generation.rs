//! How many forks lie between this VM and a booted one, without a system call.

use std::fs::File;
use std::io;

use vmfork_abi::device;

use crate::OpenError;
use crate::raw::SharedWord;

/// The page that the kernel module lets every member of its group read, mapped.
///
/// The number changes in every copy before the copy runs, whoever has asked for the fork, and never in a
/// parent. Whoever keeps what two VMs must not share, such as the state of a random generator, compares it
/// with the number that it had when that was made. This is a single load from memory, and any thread may make
/// it.
#[derive(Debug)]
pub struct GenerationPage {
    word: SharedWord,
}

/// Why the page can't be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// The device can't be opened.
    #[error("the generation can't be watched")]
    Open(#[source] OpenError),
    /// The page can't be mapped, for instance since the VMM has none.
    #[error("the generation's page of {} can't be mapped", device::PATH)]
    Map {
        /// What mmap(2) answered.
        source: io::Error,
    },
}

impl GenerationPage {
    /// Opens the device, and maps the page. It stays mapped until this is dropped, in copies of the VM too.
    ///
    /// # Errors
    ///
    /// [`GenerationError`] where there is no device, or none for this caller, or no page.
    pub fn map() -> Result<Self, GenerationError> {
        let device = File::open(device::PATH).map_err(OpenError::of_device).map_err(GenerationError::Open)?;
        Ok(Self { word: SharedWord::map(&device).map_err(|source| GenerationError::Map { source })? })
    }

    /// How many forks lie between this VM and a booted one; `u64::MAX` in a VM that has moved to a VMM that
    /// does not tell.
    pub fn get(&self) -> u64 {
        self.word.get()
    }

    /// Where the number is, for as long as this is mapped.
    pub(crate) fn address(&self) -> *const u64 {
        self.word.address()
    }
}
