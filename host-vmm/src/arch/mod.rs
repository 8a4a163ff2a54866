//! What an x86 machine of ours looks like, as pure values: no file descriptors, no ioctls.

pub mod cpuid;
pub mod features;
pub mod layout;
pub mod leaf;
pub mod levels;
pub mod msr;
pub mod paging;
pub mod profile;
pub mod regs;
#[cfg(test)]
pub(crate) mod samples;
pub mod xstate;
