//! What an x86 machine of ours looks like, as pure values: no file descriptors, no ioctls.

pub mod cpuid;
pub mod layout;
pub mod regs;
