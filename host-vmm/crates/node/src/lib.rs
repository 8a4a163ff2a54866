//! The process that holds one VM, from warm VM to its end. It links no network code, and this crate's dependencies must not.
//!
//! - [`zygote`]: the process from which all nodes are forked.
//! - `process`: the life of a node; `pages`, `rehearsal`: what makes its launch shorter; `sandbox`: what it may do.
//! - [`fork`]: VM_fork, a line a step; [`fork::rendezvous`] is where parent and children meet, and a [`fork::Standby`] may
//!   wait for it.
//! - `companion`, `alarm`: the thread of a node that speaks with the platform.
//! - [`wire`]: what platform, zygote and nodes say to each other.

mod alarm;
mod companion;
pub mod fork;
mod pages;
mod process;
mod rehearsal;
mod sandbox;
pub mod wire;
pub mod zygote;
