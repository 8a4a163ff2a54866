//! Errors as text.

use std::error::Error;

use crate::text::Reason;

/// The error and its causes, for a log: as a [`Reason`] has them.
pub fn chain(error: &dyn Error) -> String {
    Reason::of_error(error).into()
}
