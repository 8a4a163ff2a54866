//! The VM generation ID: 16 random bytes in a page that the guest can only read, and an interrupt when they
//! change.
//!
//! Linux (5.18 and later, where it has the driver) reseeds its random generator then, in copies that its
//! guest has not asked for, too.

use std::sync::Arc;

use base::random;

use super::{ControlPage, Device, Error};
use crate::{arch::layout::GENERATION_ID_GSI, kvm::VmHandle};

/// Size of an ID in bytes.
pub const GENERATION_ID_BYTES: usize = 16;

/// The VM generation ID of a VM.
#[derive(Debug)]
pub(super) struct GenerationId {
    /// Whether the guest was told at its boot of the ID, and of its interrupt.
    is_known: bool,
}

impl GenerationId {
    /// A first ID, for a guest that is about to boot.
    ///
    /// # Errors
    /// [`Error::Random`] or [`Error::Memory`].
    pub(super) fn power_on(page: &ControlPage) -> Result<Self, Error> {
        page.write_generation_id(&draw()?)?;
        Ok(Self { is_known: true })
    }

    /// Another ID for a copy, with its interrupt, where the guest knows of one. Where it was booted by a
    /// program of before there was one, the interrupt would be nobody's.
    ///
    /// The interrupt is pending when the copy's first vCPU begins to run: VM and vCPUs have their state by
    /// now.
    ///
    /// # Errors
    /// [`Error::Random`], [`Error::Memory`] or [`Error::Kvm`].
    pub(super) fn restore(is_known: bool, page: &ControlPage, vm: &Arc<VmHandle>) -> Result<Self, Error> {
        if is_known {
            page.write_generation_id(&draw()?)?;
            vm.get().pulse(GENERATION_ID_GSI)?;
        }
        Ok(Self { is_known })
    }

    /// Whether the guest knows of it.
    pub(super) fn is_known(&self) -> bool {
        self.is_known
    }
}

/// No access to it has an exit, and nothing changes it, so that it needs no seat.
impl Device for GenerationId {
    const NAME: &'static str = "generation-id";
    const VERSION: u32 = 1;
    type State = bool;

    fn save(&self) -> Result<bool, Error> {
        Ok(self.is_known)
    }
}

/// Draws an ID: random bytes that, unlike the VM's ID, its guest's kernel alone is told.
fn draw() -> Result<[u8; GENERATION_ID_BYTES], Error> {
    let mut id = [0; GENERATION_ID_BYTES];
    random::fill(&mut id).map_err(Error::Random)?;
    Ok(id)
}
