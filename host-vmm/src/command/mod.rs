//! What each command does.

mod cert;
mod check;
mod cpu_profile;
mod image;
mod ps;
mod run;
mod table;

pub use cert::cert;
pub use check::check;
pub use cpu_profile::cpu_profile;
pub use image::{image, spawn};
pub use ps::{ps, tree};
pub use run::run;
