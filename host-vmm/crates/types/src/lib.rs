//! Words that all processes of host-vmm share: the platform, the zygote, nodes, and the commands of
//! operators.
//!
//! - `shape`: how large a VM is.
//! - `identity`: who it is.
//! - `copy`, `locality`: the copies of a fork that are yet to be made, and where they are wanted.
//! - `fork_step`: the steps of a fork, how long each took, and who has asked for it.
//! - `exit_reason`: why a VM has ended.

#![forbid(unsafe_code)]

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
