//! The VMM as a process in the guest reaches it.

use std::io;

use crate::route::doorbell::Doorbell;
use crate::{DetectError, Fork, ForkError, ForkRequest, HeaderError, OutcomeError};

/// The VMM that this guest runs on, reached by the one route there is: the doorbell.
#[derive(Debug)]
pub struct Vmm {
    route: Doorbell,
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
        Ok(Self { route: Doorbell::open()? })
    }

    /// Who this VM is, and how it came out of its latest fork, without asking for another.
    ///
    /// # Errors
    ///
    /// [`OutcomeError`] where the control page holds no possible identity, or list of copies.
    pub fn status(&self) -> Result<Fork, OutcomeError> {
        Fork::from_account(&self.route.account())
    }

    /// Goes through a fork but for the doorbell, to tell whether the calling thread could fork this VM.
    ///
    /// # Errors
    ///
    /// What [`Vmm::fork`] would return without asking the VMM.
    pub fn check(&self) -> Result<(), ForkError> {
        self.route.check()
    }

    /// Forks this VM, and returns in the parent and in every child.
    ///
    /// Callers in one guest are served one after another, and after an operator who forks this VM; see [`ForkError::Copied`] for those that
    /// wait. A child's random pool, host name and clock are its own before this returns, and before any other task of the calling vCPU runs.
    /// Tasks on other vCPUs are not held back.
    ///
    /// The caller needs CAP_SYS_RAWIO for the doorbell, CAP_SYS_NICE to run first, CAP_SYS_ADMIN for seed and host name, and CAP_SYS_TIME.
    ///
    /// # Errors
    ///
    /// [`ForkError`], in the caller's VM or in a copy: see [`ForkError::role`].
    pub fn fork(&self, request: &ForkRequest) -> Result<Fork, ForkError> {
        self.route.fork(request)
    }
}
