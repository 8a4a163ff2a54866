//! What each command does.

mod check;
mod run;

pub use check::check;
pub use run::run;
