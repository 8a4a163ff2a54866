//! Builds guest images (initramfs archives) from Debian packages, reproducibly and without root.
//!
//! The way from a package name to an image, in reading order:
//!
//! - [`packages`]: an apt of its own, with private state, resolves and downloads packages; apt's signatures
//!   vouch for them.
//! - [`kernel`]: the one place that pins the guest kernel, and what is taken when the mirror has dropped it.
//! - [`kernel::lean`]: a smaller kernel, and a module for it, built from Debian's sources.
//! - [`modules`]: which kernel modules a module needs, and how they are loaded.
//! - [`image`]: collects files and writes the archive; equal inputs give equal bytes, and are not built
//!   again.
//! - [`recipes`]: the images of this project.
#![forbid(unsafe_code)]

mod cache;
mod hash;
pub mod image;
pub mod kernel;
pub mod modules;
pub mod packages;
pub mod recipes;
