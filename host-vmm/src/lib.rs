//! A VMM on KVM whose guests fork themselves.
//!
//! # The life of a VM
//!
//! ```text
//!  host-vmm run                            zygote ──► node (a process for each VM)
//!  ┌──────────────┐                        ┌──────────────────────────────────────┐
//!  │ platform     │  Boot: kernel, initrd  │ machine::Shell   a VM of some shape, │
//!  │   pool       │ ─────────────────────► │   boot           without content     │
//!  │              │                        │ machine::run     its vCPUs, its exits│
//!  │              │                        │   doorbell rings                     │
//!  │              │  Fork: image's files   │ fork::Engine     place, stop, capture│
//!  │ fork         │ ◄───────────────────── │                  freeze, hand over ┐ │
//!  │              │                        ├─────────────────────── rendezvous ─┼─┤
//!  │              │  Copy: the same files  │ machine::Shell   a ready one       │ │
//!  │              │ ─────────────────────► │ fork::Child      take, restore   ◄─┘ │
//!  │              │                        │   commit                             │
//!  │ node         │  Running, Report       │ machine::run     from the doorbell on│
//!  └──────────────┘ ◄───────────────────── └──────────────────────────────────────┘
//! ```
//!
//! # The modules, in reading order
//!
//! - [`cli`], [`command`]: what an operator can ask for.
//! - [`platform`]: the process that keeps shells ready, launches the children of forks in them, and watches and ends nodes.
//! - [`api`]: how operators, and other platforms, ask a platform.
//! - [`cluster`]: several platforms as one.
//! - [`node`]: the process that holds one VM, from ready shell to its end; all are forked from the [zygote](node::zygote).
//! - [`wire`]: what these two say to each other.
//! - [`machine`]: one VM, built, run, stopped and saved; from [`boot`] for a new one.
//! - [`fork`]: VM_fork, a line a step; [`fork::rendezvous`] is where parent and children meet; a [`fork::Standby`] may wait for it.
//! - [`capsule`]: a captured VM as bytes, beside the files of its memory; [`capsule::compat`] says whether a platform can run it.
//! - [`memory`]: immutable images, and private views of them.
//! - [`devices`], [`kvm`], [`arch`]: what a machine consists of.
//! - [`text`]: text from elsewhere, cut and escaped where it comes in.
//! - [`output`]: standard output, standard error and event files, which never make a VM or a fork wait.

pub mod cli;
pub mod command;
pub mod platform;
