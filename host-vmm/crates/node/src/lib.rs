//! The process that holds one VM, from warm VM to its end. It links no network code, and this crate's
//! dependencies must not.
//!
//! - [`zygote`]: the process from which all nodes are forked.
//! - `process`: the life of a node; `prefault`, `warm_up`: what makes its launch shorter; `sandbox`: what it
//!   may do.
//! - [`fork`]: VM_fork, a line a step; [`fork::rendezvous`] is where parent and children meet, and a
//!   [`fork::Standby`] may wait for it.
//! - `control_thread`, `delayed_wakeup`: the thread of a node that speaks with the platform.
//! - [`wire`]: what platform, zygote and nodes say to each other.

mod control_thread;
mod delayed_wakeup;
pub mod fork;
mod prefault;
mod process;
mod sandbox;
mod warm_up;
pub mod wire;
pub mod zygote;
