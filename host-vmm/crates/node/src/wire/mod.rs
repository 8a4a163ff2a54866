//! The wire between the platform, its zygote and its nodes: what they say to each other, and how.

pub mod link;
mod protocol;
mod report;

pub use link::Link;
pub use protocol::{CopyOrder, ForkOrder, Prefetch, Spawn, Spawned, ToNode, ToPlatform};
pub use report::Report;

#[cfg(test)]
mod wire_test;

/// Descriptor of the zygote's end of its connection, from its start.
pub const LINK_FD: i32 = 3;

/// A node's end of its connection.
pub type NodeLink = Link<ToPlatform, ToNode>;

/// The platform's end of a connection to a node.
pub type PlatformLink = Link<ToNode, ToPlatform>;

/// The platform's end of the connection to its zygote.
pub type ZygoteLink = Link<Spawn, Spawned>;
