//! What each command does.

mod check;
mod ps;
mod run;

pub use check::check;
pub use ps::{ps, tree};
pub use run::run;
