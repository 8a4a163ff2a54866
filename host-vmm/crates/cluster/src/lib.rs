//! Several platforms as one: who they are, what they have to do, and where copies of VMs go.
//!
//! ```text
//!  certificates, tls, principal who may speak with whom
//!  settings      how the others are found
//!  membership    who there is: by an etcd, or a list
//!  member, load  what they tell of themselves
//!  placement     where copies go: pure
//! ```

#![forbid(unsafe_code)]

pub mod certificates;
pub mod load;
pub mod member;
pub mod membership;
pub mod placement;
pub mod principal;
pub mod settings;
pub mod tls;
