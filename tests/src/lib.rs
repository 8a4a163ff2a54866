//! End-to-end tests: `host-vmm` as its users run it, on real guests.
//!
//! - [`vmm`]: a running `host-vmm`, and what it reports.
//! - [`bare_guest`]: a guest without an operating system, that does what a test writes down.
//! - [`user_guest`]: a guest without an operating system that runs at CPL 3, for the bench, and for tests of
//!   many forks.
//! - [`faults`]: the steps of a fork that can be made to fail.
//! - [`cluster`]: several platforms, on one host or on several.
//! - [`etcd`]: what they may know each other by.
//! - [`network`]: hosts of their own, for platforms that are not to share one.
//! - [`peer`]: a platform that keeps others waiting.
//! - [`process`]: what a process has of the host's resources.
//! - [`proxy`]: a way between two platforms on which things go wrong.
//! - [`doorbell_guest`]: a guest without an operating system that turns to its VMM again and again, for the
//!   bench.
//! - [`fault_rounds`]: how often that happens, and where.
//! - [`state`]: a guest without an operating system that fills all of its registers, and looks whether they
//!   stay as they are.
//!
//! The Linux guests' side is the program `test-guest`; the demo is the program `demo`.

pub mod assets;
pub mod bare_guest;
pub mod clocks;
pub mod cluster;
pub mod doorbell_guest;
mod elf;
pub mod etcd;
pub mod fault_rounds;
pub mod faults;
pub mod network;
pub mod peer;
pub mod process;
pub mod proxy;
pub mod state;
pub mod user_guest;
pub mod vmm;
