//! What every crate here may use, and what knows none of them.

pub(crate) mod clock;
pub(crate) mod descriptors;
pub(crate) mod error;
pub mod host_memory;
pub(crate) mod outage;
pub mod output;
pub(crate) mod random;
pub(crate) mod sync;
pub mod text;
pub(crate) mod threads;
pub(crate) mod units;
