//! The process that holds one VM.

mod alarm;
mod companion;
pub mod fork;
mod pages;
mod process;
mod rehearsal;
mod sandbox;
pub mod wire;
pub mod zygote;
