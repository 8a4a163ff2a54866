//! What a platform tells others of itself.

use std::{collections::BTreeMap, net::SocketAddr};

use serde::{Deserialize, Serialize};
use types::VmShape;
use utoipa::ToSchema;
use uuid::Uuid;

/// Most labels of a platform, most shapes of machines, and most images that it tells others of.
pub const MAX_LABELS: usize = 32;
/// Most shapes of machines for which a platform tells how many shells stand ready.
pub const MAX_SHAPES: usize = 32;
/// Most images that a platform tells others of.
pub const MAX_IMAGES: usize = 256;

/// A platform of a cluster, as others see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    /// Its name, unique in its cluster; of the form that a VM type has.
    pub name: String,
    /// Name of its cluster; of the same form.
    pub cluster: String,
    /// Where it serves the API for other platforms.
    #[schema(value_type = String)]
    pub address: SocketAddr,
    /// What the operator says of it, such as `zone = "north"`.
    pub labels: BTreeMap<String, String>,
    /// Name of the CPU profile that its guests are shown; empty where they are shown what its host has.
    pub cpu_profile: String,
    /// What it has to do at present.
    pub load: Load,
}

/// What a platform has to do, and what it has left.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Load {
    /// VMs that there are, or are about to be.
    pub vms: u32,
    /// Most VMs that there may be.
    pub max_vms: u32,
    /// Whether it takes no new VMs: it is being stopped, or its operator has said so.
    pub draining: bool,
    /// Processors that it may use.
    pub processors: u32,
    /// Share of time in which something waited for a processor lately (PSI, some, avg10), in thousandths.
    pub cpu_pressure_permille: u32,
    /// Share of time in which something waited for memory lately, likewise.
    pub memory_pressure_permille: u32,
    /// Memory of its host in bytes.
    pub memory_bytes: u64,
    /// What of it could be had without swapping, in bytes (MemAvailable).
    pub memory_available_bytes: u64,
    /// Ready shells, by the shape of their machine.
    pub ready: Vec<Ready>,
    /// Images that it has, the latest ones.
    pub images: Vec<Uuid>,
}

/// Ready shells of one shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ready {
    /// The shape.
    pub config: VmShape,
    /// How many.
    pub shells: u32,
}
