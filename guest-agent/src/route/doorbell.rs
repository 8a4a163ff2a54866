//! From user space alone: the control page through /dev/mem, and the doorbell by a port write.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use vmfork_abi::cpuid::Interface;
use vmfork_abi::{Identity, PAGE_BYTES, doorbell};

use crate::control_page::{Account, ControlPage};
use crate::raw::{DoorbellPort, SharedMemory};
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
        let map = |bytes| {
            let memory = SharedMemory::map(&memory, gpa, bytes).map_err(|source| OpenError::MapPage { gpa, source })?;
            ControlPage::new(memory).map_err(|source| OpenError::Header { gpa, source })
        };
        // The page says how much there is behind it.
        let page = map(PAGE_BYTES)?;
        let needed_bytes = page.needed_bytes();
        Ok(Self { interface, page: if needed_bytes > PAGE_BYTES { map(needed_bytes)? } else { page } })
    }

    /// Who this VM is, unchecked.
    pub(crate) fn identity(&self) -> Identity {
        self.page.identity()
    }

    /// Who this VM is, and how it came out of its latest fork, unchecked.
    pub(crate) fn account(&self) -> Account {
        self.page.account()
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

    /// Asks for the fork, and returns what the page says of the VM that this has returned in.
    ///
    /// # Errors
    ///
    /// Those of [`ControlPage::exchange`].
    pub(crate) fn fork(&self, port: &DoorbellPort, request: &ForkRequest) -> Result<Account, ForkError> {
        self.page.exchange(request, || port.ring(doorbell::FORK))
    }
}
