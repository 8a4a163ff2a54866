//! Several platforms as one: who they are, what they have to do, and where copies of VMs go.

pub mod certificates;
pub mod load;
pub mod member;
pub mod peer;
pub mod placement;
pub mod tls;
