//! One VM.

pub mod arch;
pub mod boot;
pub mod devices;
pub mod kvm;
pub mod machine;
pub mod memory;
