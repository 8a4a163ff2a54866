//! What the tests run: programs, kernel and images, in the folder that `VMFORK_ASSETS` names; and what they
//! run on.

use std::{env, path::PathBuf, process::Command};

use serde::Deserialize;

/// A file of the assets, such as `bin/host-vmm`, `vmlinuz`, `minimal.cpio`.
///
/// # Panics
/// Where `VMFORK_ASSETS` is not set: `cargo xtask` does that.
pub fn path(name: &str) -> PathBuf {
    let folder =
        env::var_os("VMFORK_ASSETS").expect("VMFORK_ASSETS is not set: run the tests by `cargo xtask test`");
    PathBuf::from(folder).join(name)
}

/// Whether this runs in the lab, where everything is known to work.
pub fn in_lab() -> bool {
    env::var_os("VMFORK_LAB").is_some()
}

/// What `host-vmm check` found out.
#[derive(Debug, Clone, Deserialize)]
pub struct Probe {
    /// Linux guests can run.
    pub usable: bool,
    /// Instructions a second of guest kernel code.
    pub kernel_code: Option<u64>,
    /// Hypercalls reach the VMM.
    pub hypercall: bool,
}

/// Asks `host-vmm check`.
///
/// # Panics
/// Where it does not answer.
pub fn probe() -> Probe {
    let output =
        Command::new(path("bin/host-vmm")).args(["check", "--json"]).output().expect("host-vmm check runs");
    serde_json::from_slice(&output.stdout).expect("host-vmm check --json prints JSON")
}
