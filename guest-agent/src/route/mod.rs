//! How a request reaches the VMM, and how its answer comes back.

pub(crate) mod doorbell;
