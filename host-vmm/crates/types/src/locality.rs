//! Where copies are wanted.

use serde::{Deserialize, Serialize};

/// Where copies of a VM are wanted, by its guest or by an operator.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Locality {
    /// Wherever the operator's rules say.
    #[default]
    Any,
    /// On its own platform.
    Local,
    /// On others.
    Remote,
}
