//! Words that all processes share.

mod copy;
mod exit_reason;
mod fork_step;
mod identity;
mod locality;
mod shape;

pub use copy::{CopySpec, are_copies_of_fork};
pub use exit_reason::ExitReason;
pub use fork_step::{ForkStep, Requester, StepTiming};
pub use identity::{VmIdentity, new_id};
pub use locality::Locality;
pub use shape::{MAX_RAM_BYTES, MIN_RAM_BYTES, PAGE_BYTES, VmShape};
