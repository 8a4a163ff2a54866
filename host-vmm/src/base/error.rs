//! Errors as text.

use std::error::Error;

use crate::base::text::Reason;

/// The error and its causes, for a log: as a [`Reason`] has them.
pub(crate) fn chain(error: &dyn Error) -> String {
    Reason::of_error(error).into()
}
