//! From user space alone: the control page through /dev/mem, and the doorbell by a port write.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use vmfork_abi::cpuid::Interface;
use vmfork_abi::{Identity, doorbell};

use crate::control_page::ControlPage;
use crate::raw::{DoorbellPort, SharedPage};
use crate::{ForkError, ForkRequest, OpenError};

/// The control page of this guest, mapped, and where its doorbell is.
#[derive(Debug)]
pub(crate) struct Doorbell {
    interface: Interface,
    page: ControlPage,
}

impl Doorbell {
    /// Maps the control page and checks that it is one.
    ///
    /// # Errors
    ///
    /// [`OpenError::OpenMemory`], [`OpenError::MapPage`] or [`OpenError::Header`].
    pub(crate) fn open(interface: Interface) -> Result<Self, OpenError> {
        let gpa = interface.control_page_gpa;
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_SYNC)
            .open("/dev/mem")
            .map_err(|source| OpenError::OpenMemory { source })?;
        let page = SharedPage::map(&memory, gpa).map_err(|source| OpenError::MapPage { gpa, source })?;
        let page = ControlPage::new(page).map_err(|source| OpenError::Header { gpa, source })?;
        Ok(Self { interface, page })
    }

    /// Who this VM is, unchecked.
    pub(crate) fn identity(&self) -> Identity {
        self.page.identity()
    }

    /// Lets the calling thread ring.
    ///
    /// # Errors
    ///
    /// [`ForkError::Port`] where the kernel forbids it.
    pub(crate) fn acquire_port(&self) -> Result<DoorbellPort, ForkError> {
        let port = self.interface.doorbell_port;
        DoorbellPort::acquire(self.interface).map_err(|source| ForkError::Port { port, source })
    }

    /// Asks for the fork, and returns the identity of the VM that this has returned in.
    ///
    /// # Errors
    ///
    /// Those of [`ControlPage::exchange`].
    pub(crate) fn fork(&self, port: &DoorbellPort, request: &ForkRequest) -> Result<Identity, ForkError> {
        self.page.exchange(request, || port.ring(doorbell::FORK))
    }
}
