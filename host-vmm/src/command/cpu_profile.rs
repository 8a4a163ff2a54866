//! `host-vmm cpu-profile`: what hosts have in common, as a file for `host-vmm run --cpu-profile`.

use std::{fs, path::Path, process::ExitCode};

use anyhow::Context;
use vmm::{arch::profile::Subset, kvm::Hypervisor};

use crate::cli;

/// Prints this host's CPU profile, or what those in files have in common.
///
/// # Errors
/// Where a file can't be read or is no profile, or the profiles are of different makers' processors; without
/// files, where KVM can't be used.
pub(crate) fn cpu_profile(options: &cli::CpuProfile) -> anyhow::Result<ExitCode> {
    let mut subsets = options.files.iter().map(|path| read(path));
    let first = match subsets.next() {
        Some(subset) => subset?,
        None => Subset::of_host(&Hypervisor::open()?.supported_cpuid()?),
    };
    let common = subsets.try_fold(first, |common, subset| anyhow::Ok(common.intersection(&subset?)?))?;
    println!("{}", common.to_json()?);
    Ok(ExitCode::SUCCESS)
}

fn read(path: &Path) -> anyhow::Result<Subset> {
    let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    Subset::from_json(&text).with_context(|| format!("can't use {}", path.display()))
}
