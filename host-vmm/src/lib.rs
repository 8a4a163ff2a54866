//! A VMM on KVM whose guests fork themselves.
//!
//! # The life of a VM
//!
//! ```text
//!  host-vmm run                            host-vmm node (a process for each VM)
//!  ┌──────────────┐  Boot: kernel, initrd  ┌──────────────────────────────────────┐
//!  │ platform     │ ─────────────────────► │ machine::boot    a new VM            │
//!  │              │                        │ machine::run     its vCPUs, its exits│
//!  │              │  Fork: capsule         │   doorbell rings                     │
//!  │ launch       │ ◄───────────────────── │ fork::Engine     stop, capture,      │
//!  │              │                        │                  freeze              │
//!  │              │  Restore: capsule      ├──────────────────────────────────────┤
//!  │              │ ─────────────────────► │ machine::restore a copy, in a process│
//!  │              │                        │                  of its own          │
//!  │ serve        │  Commit, Go            │ machine::run     from the doorbell on│
//!  └──────────────┘                        └──────────────────────────────────────┘
//! ```
//!
//! # The modules, in reading order
//!
//! - [`cli`], [`command`]: what an operator can ask for.
//! - [`platform`]: the process that starts, watches and ends nodes, and launches the children of forks.
//! - [`node`]: the process that holds one VM.
//! - [`wire`]: what these two say to each other.
//! - [`machine`]: one VM, built, run, stopped and saved; from [`boot`] for a new one.
//! - [`fork`]: VM_fork, a line a step.
//! - [`capsule`]: a captured VM as files.
//! - [`memory`]: immutable images, and private views of them.
//! - [`devices`], [`kvm`], [`arch`]: what a machine consists of.

pub mod arch;
pub mod boot;
pub mod capsule;
pub mod cli;
mod clock;
pub mod command;
pub mod devices;
mod error;
pub mod fork;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod node;
pub mod platform;
mod sync;
pub mod wire;
