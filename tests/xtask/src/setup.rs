//! Programs of the host that cargo can't provide.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use initramfs::kernel::tools::{self, Compiler, Tools};
use initramfs::packages::Packages;

use crate::cargo::Workspace;
use crate::steps::Steps;

/// Debian's package of QEMU, and the program in it that is the lab.
const QEMU_PACKAGE: &str = "qemu-system-x86";
pub(crate) const QEMU: &str = "qemu-system-x86_64";

/// Debian's package of etcd, and the program in it that platforms of a cluster find each other by.
const ETCD_PACKAGE: &str = "etcd-server";
const ETCD: &str = "etcd";

/// Makes sure that everything is there that this machine is sure to need.
pub(crate) fn run() -> Result<()> {
    for program in ["apt-get", "apt-cache", "apt-config", "dpkg-deb"] {
        if !is_installed(program) {
            bail!(
                "{program} is not installed: guest images are built from Debian's packages, so this needs \
                 Debian or one of its derivatives"
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
    let install = install(&[QEMU_PACKAGE]);
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

/// Makes sure that a kernel can be built with `compiler`.
pub(crate) fn kernel_tools(compiler: Compiler) -> Result<Tools> {
    match find_or_install(compiler) {
        // With new package lists, other packages may be chosen.
        Err(_) if is_root()? => {
            apt_get(&["update"])?;
            find_or_install(compiler)
        }
        result => result,
    }
}

fn find_or_install(compiler: Compiler) -> Result<Tools> {
    let packages = match Tools::find(compiler) {
        Err(tools::Error::Missing { packages }) => packages,
        result => return Ok(result?),
    };
    let install = install(&packages);
    if !is_root()? {
        let packages = packages.join(" ");
        bail!(
            "a kernel is built with {packages}, not installed here; this installs it: sudo apt-get {}",
            install.join(" ")
        );
    }
    apt_get(&install)?;
    Ok(Tools::find(compiler)?)
}

/// [`etcd`] as a step; without one, the tests that need one are skipped.
pub(crate) fn etcd_for_tests(steps: &mut Steps, workspace: &Workspace) -> Option<PathBuf> {
    steps.parts_if_possible("tests with an etcd", |steps| steps.quiet("setup of etcd", || etcd(workspace)))
}

/// The etcd for tests: this machine's own, or else Debian's, which is unpacked and not installed: an
/// installed one is a service that runs.
fn etcd(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(own) = find(ETCD) {
        return Ok(own);
    }
    let packages = Packages::open(&workspace.target.join("vmfork-cache"))?;
    // It needs no more of what it depends on than this machine has: the others are for its service.
    let deb = packages.alone(ETCD_PACKAGE)?;
    let program = packages.unpack(&deb)?.join("usr/bin").join(ETCD);
    if !program.is_file() {
        bail!("{ETCD_PACKAGE} {} has no {}", deb.version, program.display());
    }
    Ok(program)
}

/// Error by which /dev/kvm can't be used at all, if so.
pub(crate) fn kvm_error() -> Option<std::io::Error> {
    File::options().read(true).write(true).open("/dev/kvm").err()
}

fn is_installed(program: &str) -> bool {
    find(program).is_some()
}

/// Path of a program that is installed.
fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// True if packages can be installed.
pub(crate) fn is_root() -> Result<bool> {
    Ok(fs::metadata("/proc/self").context("can't read /proc/self")?.uid() == 0)
}

/// Arguments by which apt-get installs packages.
fn install(packages: &[impl AsRef<str>]) -> Vec<&str> {
    let packages = packages.iter().map(AsRef::as_ref);
    ["install", "--yes", "--no-install-recommends"].into_iter().chain(packages).collect()
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
