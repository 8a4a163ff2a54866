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

pub(crate) use cert::cert;
pub(crate) use check::check;
pub(crate) use cluster::{clone, place, platforms};
pub(crate) use cpu_profile::cpu_profile;
pub(crate) use fork::fork;
pub(crate) use image::{image, spawn};
pub(crate) use logs::{logs, stop};
pub(crate) use ps::{ps, tree};
pub(crate) use run::run;
pub(crate) use serve::serve;
