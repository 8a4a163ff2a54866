//! Programs of the host that cargo can't provide.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Debian's package of QEMU, and the program in it that is the lab.
const QEMU_PACKAGE: &str = "qemu-system-x86";
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// Makes sure that everything is there that this machine is sure to need.
pub(crate) fn run() -> Result<()> {
    for program in ["apt-get", "apt-cache", "apt-config", "dpkg-deb"] {
        if !is_installed(program) {
            bail!(
                "{program} is not installed: guest images are built from Debian's packages, so this needs Debian or one of its derivatives"
            );
        }
    }
    // Without /dev/kvm it is plain already that the lab will be used.
    if kvm_error().is_some() { qemu() } else { Ok(()) }
}

/// Makes sure that the lab can run.
pub(crate) fn qemu() -> Result<()> {
    if is_installed(QEMU) {
        return Ok(());
    }
    let install = ["install", "--yes", "--no-install-recommends", QEMU_PACKAGE];
    if !is_root()? {
        bail!("{QEMU} is not installed; this installs it: sudo apt-get {}", install.join(" "));
    }
    // The package lists may be missing or old: then it takes new ones.
    if apt_get(&install).is_err() {
        apt_get(&["update"])?;
        apt_get(&install)?;
    }
    Ok(())
}

/// Why /dev/kvm can't be used at all, if so.
pub(crate) fn kvm_error() -> Option<std::io::Error> {
    File::options().read(true).write(true).open("/dev/kvm").err()
}

fn is_installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn is_root() -> Result<bool> {
    Ok(fs::metadata("/proc/self").context("can't read /proc/self")?.uid() == 0)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let line = format!("apt-get {}", arguments.join(" "));
    let mut command = Command::new("apt-get");
    let output = command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").output();
    let output = output.with_context(|| format!("can't run {line}"))?;
    if !output.status.success() {
        bail!("`{line}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
