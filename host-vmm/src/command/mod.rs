//! What each command does.

mod cert;
mod check;
mod image;
mod ps;
mod run;
mod table;

pub use cert::cert;
pub use check::check;
pub use image::{image, spawn};
pub use ps::{ps, tree};
pub use run::run;
