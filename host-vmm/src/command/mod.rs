//! What each command does.

mod asked;
mod cert;
mod check;
mod cluster;
mod cpu_profile;
mod daemon;
mod fork;
mod image;
mod logs;
mod ps;
mod run;
mod serve;
mod table;

pub use cert::cert;
pub use check::check;
pub use cluster::{clone, place, platforms};
pub use cpu_profile::cpu_profile;
pub use fork::fork;
pub use image::{image, spawn};
pub use logs::{logs, stop};
pub use ps::{ps, tree};
pub use run::run;
pub use serve::serve;
