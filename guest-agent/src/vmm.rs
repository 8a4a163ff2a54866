//! The VMM as a process in the guest reaches it.

use std::io;

use crate::route::doorbell::Doorbell;
use crate::{DetectError, Fork, HeaderError, OutcomeError};

/// The VMM that this guest runs on, reached by the one route there is: the doorbell.
#[derive(Debug)]
pub struct Vmm {
    pub(crate) route: Doorbell,
}

/// Why the VMM can't be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no VMM, or it is another version.
    #[error(transparent)]
    Detect(DetectError),
    /// /dev/mem is missing or not for this caller.
    #[error("/dev/mem can't be opened")]
    OpenMemory {
        /// What open(2) answered.
        source: io::Error,
    },
    /// The kernel does not let the control page be mapped.
    #[error("the control page at {gpa:#x} can't be mapped")]
    MapPage {
        /// Guest-physical address of the page.
        gpa: u64,
        /// What mmap(2) answered.
        source: io::Error,
    },
    /// The page is no control page of this ABI.
    #[error("there is no control page at {gpa:#x}")]
    Header {
        /// Guest-physical address of the page.
        gpa: u64,
        /// What its header says.
        source: HeaderError,
    },
}

impl Vmm {
    /// Detects the VMM and opens the route to it: CAP_SYS_RAWIO, and no kernel lockdown.
    ///
    /// # Errors
    ///
    /// [`OpenError`] where there is no such VMM, or its control page can't be had.
    pub fn open() -> Result<Self, OpenError> {
        let interface = Self::detect().map_err(OpenError::Detect)?;
        Ok(Self { route: Doorbell::open(interface)? })
    }

    /// Who this VM is, and how it came out of its latest fork, without asking for another.
    ///
    /// # Errors
    ///
    /// [`OutcomeError`] where the control page holds no possible identity, or list of copies.
    pub fn status(&self) -> Result<Fork, OutcomeError> {
        Fork::from_page(&self.route.account())
    }
}
