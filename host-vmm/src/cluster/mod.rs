//! Several platforms as one: who they are, what they have to do, and where copies of VMs go.

pub mod certificates;
pub mod config;
pub mod load;
pub mod member;
pub mod membership;
pub mod peer;
pub mod placement;
pub mod tls;
