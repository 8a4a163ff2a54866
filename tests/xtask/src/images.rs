//! Assets that the demo and the tests work with: kernel, guest images, programs.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use initramfs::image::{self, ImageBuilder};
use initramfs::kernel::{Kernel as DebianKernel, module};
use initramfs::packages::Packages;
use initramfs::recipes;

use crate::cargo::{Executables, Workspace};
use crate::kernel::Kernel;
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
    let assets = Assets::build(steps, &workspace, &programs, None)?;
    for name in ["vmlinuz", "minimal.cpio", "python.cpio"] {
        println!("{}", assets.dir.join(name).display());
    }
    Ok(0)
}

impl Assets {
    /// Builds what is missing or no longer as its inputs are; `lean` is the kernel that guests can boot
    /// beside Debian's, if any.
    pub(crate) fn build(
        steps: &mut Steps,
        workspace: &Workspace,
        programs: &Executables,
        lean: Option<&Kernel>,
    ) -> Result<Self> {
        let (assets, notice) = steps.quiet("images", || Self::build_quietly(workspace, programs, lean))?;
        if let Some(notice) = notice {
            eprintln!("xtask: {notice}");
        }
        Ok(assets)
    }

    /// Builds, and returns what to tell the user about the kernel.
    fn build_quietly(
        workspace: &Workspace,
        programs: &Executables,
        lean: Option<&Kernel>,
    ) -> Result<(Self, Option<String>)> {
        let packages = Packages::open(&workspace.target.join("vmfork-cache"))?;
        let kernel = DebianKernel::fetch(&packages)?;
        let dir = workspace.target.join("assets");
        install_kernel(&kernel.vmlinuz, &format!("{} {}", kernel.deb.package, kernel.deb.version), &dir)?;
        install_lean(lean, &dir.join("lean"))?;
        for program in ["host-vmm", "vmfork"] {
            install(&programs.path(program)?, &dir.join("bin").join(program))?;
        }
        copy_licenses(&recipes::licenses(&packages)?, &dir.join("licenses"))?;

        let guest = workspace.target.join("guest");
        let vmfork = strip(&programs.path("vmfork")?, &guest)?;
        let [test_guest, kmod_guest] =
            ["test-guest", "kmod-guest"].map(|name| strip(&programs.path(name)?, &guest));
        let mut minimal = recipes::minimal(&packages)?;
        add_module(&mut minimal, lean);
        minimal.file("/usr/bin/vmfork", 0o755, &vmfork).file("/usr/bin/test-guest", 0o755, &test_guest?);
        minimal.file("/usr/bin/kmod-guest", 0o755, &kmod_guest?);
        minimal.build(&dir, "minimal")?;
        let mut python = recipes::python(&packages)?;
        add_module(&mut python, lean);
        add_demo(&mut python, &workspace.root.join("tests/demo"))?;
        python.file("/usr/bin/vmfork", 0o755, &vmfork).build(&dir, "python")?;
        let lab = lab_image(&packages, &kernel)?.build(&workspace.target.join("lab"), "lab")?.path;
        Ok((Self { dir, lab }, kernel.notice()))
    }
}

/// The lab's own image.
fn lab_image(packages: &Packages, kernel: &DebianKernel) -> Result<ImageBuilder, image::Error> {
    let mut image = recipes::base(packages)?;
    image.bytes("/init", 0o755, include_str!("lab/init.sh"));
    image.modules(kernel, &["kvm-amd"])?;
    Ok(image)
}

/// Puts a kernel into `dir`, with a line that says what it is.
fn install_kernel(vmlinuz: &Path, what: &str, dir: &Path) -> Result<()> {
    install(vmlinuz, &dir.join("vmlinuz"))?;
    fs::write(dir.join("kernel.txt"), format!("{what}\n"))
        .with_context(|| format!("can't write kernel.txt in {}", dir.display()))
}

/// Makes `dir` hold the lean kernel and its module, and nothing where there are none.
fn install_lean(lean: Option<&Kernel>, dir: &Path) -> Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("can't remove {}", dir.display()))?;
    }
    let Some(Kernel { lean, module }) = lean else { return Ok(()) };
    let what = format!("{} from {} {}", lean.release, lean.source.package, lean.source.version);
    install_kernel(&lean.vmlinuz, &what, dir)?;
    module.iter().try_for_each(|module| install(module, &dir.join(module.file_name().unwrap_or_default())))
}

/// Adds the kernel module where `/init` looks for it.
fn add_module(image: &mut ImageBuilder, lean: Option<&Kernel>) {
    if let Some(Kernel { lean, module: Some(module) }) = lean {
        image.file(&format!("/lib/modules/{}/extra/{}.ko", lean.release, module::NAME), 0o644, module);
    }
}

/// Adds the demo's application: the Python files in `dir`.
fn add_demo(image: &mut ImageBuilder, dir: &Path) -> Result<()> {
    for path in files_in(dir)? {
        if let Some(name) =
            path.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".py"))
        {
            image.file(&format!("/usr/share/vmfork-demo/{name}"), 0o644, &path);
        }
    }
    Ok(())
}

/// Makes `to` hold the same texts as guests have. Links to texts, which stand for "the newest version", are
/// left out.
fn copy_licenses(from: &Path, to: &Path) -> Result<()> {
    for path in files_in(from)?.into_iter().filter(|path| !path.is_symlink()) {
        let name = path.file_name().unwrap_or_default();
        install(&path, &to.join(name))?;
    }
    Ok(())
}

fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>());
    entries.with_context(|| format!("can't read {}", dir.display()))
}

/// Writes a copy of `program` without symbols and line tables to `dir`: they are four fifths of what guests
/// would load.
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
