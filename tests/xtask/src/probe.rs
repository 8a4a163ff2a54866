//! Places where guests can run: on this machine's KVM, or in the lab.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// Part of the answer of `host-vmm check --json`.
#[derive(Debug, Deserialize)]
struct Check {
    usable: bool,
}

/// True if `host_vmm` can run Linux guests on this machine.
pub(crate) fn is_kvm_usable(host_vmm: &Path) -> Result<bool> {
    let line = format!("{} check --json", host_vmm.display());
    let output = Command::new(host_vmm).args(["check", "--json"]).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("can't run `{line}`"))?;
    match serde_json::from_slice::<Check>(&output.stdout) {
        Ok(check) => Ok(check.usable),
        Err(error) => bail!("`{line}` ended with {}, and its answer can't be read: {error}", output.status),
    }
}
