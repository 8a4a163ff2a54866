//! What the demo and the tests work with: kernel, guest images, programs.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use initramfs::image::ImageBuilder;
use initramfs::kernel::Kernel;
use initramfs::packages::Packages;
use initramfs::recipes;

use crate::cargo::{Executables, Workspace};
use crate::lab;
use crate::steps::Steps;

/// Everything that was built, and where it is.
#[derive(Debug)]
pub(crate) struct Assets {
    /// The directory that `VMFORK_ASSETS` names.
    pub(crate) dir: PathBuf,
    /// The lab's own image.
    pub(crate) lab: PathBuf,
}

/// Builds the images and prints where they are.
pub(crate) fn command(steps: &mut Steps) -> Result<u8> {
    let workspace = Workspace::find()?;
    let programs = steps.run("build", Executables::programs)?;
    let assets = Assets::build(steps, &workspace, &programs)?;
    for name in ["vmlinuz", "minimal.cpio", "python.cpio"] {
        println!("{}", assets.dir.join(name).display());
    }
    Ok(0)
}

impl Assets {
    /// Builds what is missing or no longer as its inputs are.
    pub(crate) fn build(steps: &mut Steps, workspace: &Workspace, programs: &Executables) -> Result<Self> {
        let (assets, notice) = steps.quiet("images", || Self::build_quietly(workspace, programs))?;
        if let Some(notice) = notice {
            eprintln!("xtask: {notice}");
        }
        Ok(assets)
    }

    /// Builds, and returns what to tell the user about the kernel.
    fn build_quietly(workspace: &Workspace, programs: &Executables) -> Result<(Self, Option<String>)> {
        let packages = Packages::open(&workspace.target.join("vmfork-cache"))?;
        let kernel = Kernel::fetch(&packages)?;
        let dir = workspace.target.join("assets");
        install(&kernel.vmlinuz, &dir.join("vmlinuz"))?;
        fs::write(dir.join("kernel.txt"), format!("{} {}\n", kernel.deb.package, kernel.deb.version))
            .with_context(|| format!("can't write kernel.txt in {}", dir.display()))?;
        for program in ["host-vmm", "vmfork"] {
            install(&programs.path(program)?, &dir.join("bin").join(program))?;
        }
        copy_licenses(&recipes::licenses(&packages)?, &dir.join("licenses"))?;

        let guest = workspace.target.join("guest");
        let vmfork = strip(&programs.path("vmfork")?, &guest)?;
        let test_guest = strip(&programs.path("test-guest")?, &guest)?;
        recipes::minimal(&packages)?
            .file("/usr/bin/vmfork", 0o755, &vmfork)
            .file("/usr/bin/test-guest", 0o755, &test_guest)
            .build(&dir, "minimal")?;
        let mut python = recipes::python(&packages)?;
        add_demo(&mut python, &workspace.root.join("tests/demo"))?;
        python.file("/usr/bin/vmfork", 0o755, &vmfork).build(&dir, "python")?;
        let lab = lab::image(&packages, &kernel)?.build(&workspace.target.join("lab"), "lab")?.path;
        Ok((Self { dir, lab }, kernel.notice()))
    }
}

/// Adds the demo's application: the Python files in `dir`.
fn add_demo(image: &mut ImageBuilder, dir: &Path) -> Result<()> {
    for path in files_in(dir)? {
        if let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".py")) {
            image.file(&format!("/usr/share/vmfork-demo/{name}"), 0o644, &path);
        }
    }
    Ok(())
}

/// Makes `to` hold the same texts as guests have. Links to texts, which stand for "the newest version", are left out.
fn copy_licenses(from: &Path, to: &Path) -> Result<()> {
    for path in files_in(from)?.into_iter().filter(|path| !path.is_symlink()) {
        let name = path.file_name().unwrap_or_default();
        install(&path, &to.join(name))?;
    }
    Ok(())
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>());
    entries.with_context(|| format!("can't read {}", dir.display()))
}

/// Writes a copy of `program` without symbols and line tables to `dir`: they are four fifths of what guests would load.
fn strip(program: &Path, dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| format!("can't create {}", dir.display()))?;
    let stripped = dir.join(program.file_name().unwrap_or_default());
    let output = Command::new("strip").arg("-o").args([&stripped, program]).output();
    let output = output.context("can't run strip: install the package binutils")?;
    if !output.status.success() {
        bail!("strip can't read {}: {}", program.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(stripped)
}

/// Puts a copy of `from` at `to` in one step, since a program at `to` may be running.
pub(crate) fn install(from: &Path, to: &Path) -> Result<()> {
    let copy = || {
        let dir = to.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        let mode = fs::metadata(from)?.permissions().mode();
        let permissions = Permissions::from_mode(mode);
        let mut new = tempfile::Builder::new().permissions(permissions).tempfile_in(dir)?;
        io::copy(&mut fs::File::open(from)?, &mut new)?;
        new.persist(to)?;
        io::Result::Ok(())
    };
    copy().with_context(|| format!("can't copy {} to {}", from.display(), to.display()))
}
