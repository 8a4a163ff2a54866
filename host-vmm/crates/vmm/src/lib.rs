//! One VM, built, run, stopped and saved. It knows no fork, no network and no other process.
//!
//! - [`machine`]: the VM as a whole; start here.
//! - [`boot`]: the kernel, and what it is told.
//! - [`devices`]: the control page, the serial console, power.
//! - [`memory`]: immutable images, and private views of them.
//! - [`kvm`]: the only user of kvm-ioctls.
//! - [`arch`]: x86 as plain values.
//!
//! Nearly all unsafe code is in [`kvm`] and [`memory`].

pub mod arch;
pub mod boot;
pub mod devices;
pub mod kvm;
pub mod machine;
pub mod memory;
