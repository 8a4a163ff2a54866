//! Guest memory: immutable images, and each VM's private view of one.
//!
//! ```text
//!  boot                 first fork                       fork of a private view
//!  ┌────────────┐       ┌────────────┐                   ┌──────────────┐
//!  │ view       │       │ parent view│ private           │ parent view  │ unchanged
//!  └────┬───────┘       └────┬───────┘                   └────┬─────────┘
//!   shared              copy-on-write                     its dirty pages are written out
//!  ┌────┴───────┐       ┌────┴───────┐                   ┌────┴─────────┐
//!  │ memfd      │  ──►  │ image      │ frozen     ──►    │ image + delta│ frozen
//!  └────────────┘       └────┬───────┘                   └────┬─────────┘
//!                        copy-on-write                    copy-on-write
//!                       ┌────┴───────┐                   ┌────┴─────────┐
//!                       │ child view │ private           │ child view   │ private
//!                       └────────────┘                   └──────────────┘
//! ```
//!
//! A freshly booted VM's memory is a memfd mapped shared, so its pages are in the file already. Freezing it
//! forbids everybody to map the file writable again (F_SEAL_FUTURE_WRITE); once the parent has left its old
//! mapping behind, the platform seals the file, and the kernel lets nobody write to it (F_SEAL_WRITE). The
//! parent goes on as a private view of it, in another address range, and what it has left is taken down
//! ([`machine::VmSwitch`](crate::machine::VmSwitch)): nothing is copied. A VM that is a private view already
//! needs no switch: its dirty pages are written into a delta, which its children map over the rest. Where
//! there are many layers already, the next one takes in all but the lowest: no chain of forks is too long. A
//! VM that has had much copied goes on as a view of the new image, as its children do.
//!
//! A warm VM that stands by for a fork maps the lowest layer of the image to come, and makes the pages its
//! own that copies write to first ([`PremappedRam`], [`WorkingSet`]).

use std::io;

pub mod budget;
pub mod dirty;
pub mod faults;
mod guest_memory;
mod image;
mod mapping;
mod memfd;
mod premapped;
mod sealing;
mod working_set;

pub use budget::{Budget, Grant};
pub use dirty::PageMap;
pub use faults::Faults;
pub use guest_memory::{Changes, Delta, GuestMemory, Plan, Rebase};
pub use image::{Extent, Image, Layer, MAX_EXTENTS, MAX_LAYERS, Run};
pub use mapping::{Access, Mapping, populate};
pub use memfd::{
    check_unresizable, decide, decided, fillable, has_data, is_being_filled, is_frozen, is_sealed, read_only,
    seal, sealed, try_seal, unresizable, unsealed,
};
pub use premapped::PremappedRam;
pub use sealing::{SealRetry, seal_filled};
pub use working_set::WorkingSet;

use guest_memory::MAX_DELTA_FILES;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There are no addresses left for a mapping.
    #[error("this process has no {bytes} bytes of addresses left to map memory to")]
    Addresses {
        /// How many bytes of them were asked for.
        bytes: usize,
    },
    /// mmap failed.
    #[error("can't map {what} of {bytes} bytes")]
    Map {
        /// What was to be mapped.
        what: &'static str,
        /// Its size in bytes.
        bytes: usize,
        /// The system's reason.
        source: io::Error,
    },
    /// A memory file could not be made, grown, written or sealed.
    #[error("can't {operation} the memory file {name}")]
    File {
        /// What was tried.
        operation: &'static str,
        /// Which file.
        name: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel goes on refusing to seal a memory file.
    #[error("can't seal a memory file: some process has it mapped writable, or holds pages of it (EBUSY)")]
    Busy,
    /// A thread that copied memory panicked.
    #[error("a thread that copied memory failed")]
    Worker,
    /// Faults on missing pages can't be had, or dealt with.
    #[error("can't {operation} faults on missing pages")]
    Faults {
        /// What was tried.
        operation: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// The page map of this process could not be read.
    #[error("can't read the page map of the guest's memory")]
    PageMap(#[source] io::Error),
    /// A description of an image makes no sense.
    #[error("the image is not valid: {0}")]
    Invalid(&'static str),
}
