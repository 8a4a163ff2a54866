//! What all crates of host-vmm may use. It knows nothing of VMs.
//!
//! - [`error`], [`text`]: errors and other text, cut and escaped where it comes in.
//! - [`clock`], [`random`], [`units`], [`sync`]: the system's clocks and random bytes, sizes, locks.
//! - [`threads`]: threads that leave processors to those that run vCPUs.
//! - [`descriptors`], [`host_memory`]: how many files a process may have open, and how much memory a host
//!   has.
//! - [`output`], [`outage`]: output that never makes a VM or a fork wait, and reports of writes that fail.

pub mod clock;
pub mod descriptors;
pub mod error;
pub mod host_memory;
pub mod outage;
pub mod output;
pub mod random;
pub mod sync;
pub mod text;
pub mod threads;
pub mod units;
