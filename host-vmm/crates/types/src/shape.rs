//! The shape of a VM.

use serde::{Deserialize, Serialize};

/// Size of a page in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Smallest guest memory in bytes: the boot structures and a small kernel.
pub const MIN_RAM_BYTES: u64 = 16 << 20;

/// Largest guest memory in bytes.
pub const MAX_RAM_BYTES: u64 = 1 << 40;

/// What a machine is built as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct VmShape {
    /// Guest memory in bytes, a multiple of the page size.
    pub ram_bytes: u64,
    /// Number of vCPUs, at least 1.
    pub vcpus: u8,
}
