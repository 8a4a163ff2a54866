//! `cargo xtask bench`.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::{Executables, Workspace};
use crate::cli;
use crate::images::install;
use crate::setup;
use crate::steps::{Steps, exit_code};

/// Builds what the bench measures, and runs it on this machine's /dev/kvm; returns its exit code.
pub(crate) fn run(steps: &mut Steps, arguments: &cli::Bench) -> Result<u8> {
    let workspace = Workspace::find()?;
    if let Some(error) = setup::kvm_error() {
        bail!("the bench measures this machine's KVM, and /dev/kvm can't be opened: {error}");
    }
    let programs = steps.run("build", Executables::programs)?;
    let out = workspace.target.join("bench");
    install(&programs.path("host-vmm")?, &out.join("bin/host-vmm"))?;
    let bench = programs.path("bench")?;
    steps.run("bench", || {
        let mut command = Command::new(&bench);
        command.arg("--out").arg(&out).args(&arguments.arguments).env("VMFORK_ASSETS", &out);
        Ok(exit_code(command.status().with_context(|| format!("can't run {}", bench.display()))?))
    })
}
