//! The kernel's sources: what is taken of them for a build, and what is left of them for modules.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Directories of which a build reads nothing but `Makefile` and `Kconfig`, which are everywhere. They are
/// two thirds of all.
const UNREAD: [&str; 33] = [
    "arch/alpha",
    "arch/arc",
    "arch/arm",
    "arch/arm64",
    "arch/csky",
    "arch/hexagon",
    "arch/loongarch",
    "arch/m68k",
    "arch/microblaze",
    "arch/mips",
    "arch/nios2",
    "arch/openrisc",
    "arch/parisc",
    "arch/powerpc",
    "arch/riscv",
    "arch/s390",
    "arch/sh",
    "arch/sparc",
    "arch/um",
    "arch/xtensa",
    "drivers/accel",
    "drivers/gpu",
    "drivers/hwmon",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/scsi",
    "drivers/staging",
    "drivers/usb",
    "sound",
    "tools/testing",
];

/// Endings of files in them that are left out.
const SOURCES: [&str; 6] = ["c", "h", "S", "dts", "dtsi", "json"];

/// What modules are built from: `make -C TREE M=DIR modules` reads nothing else.
const KEPT: [&str; 9] = [
    ".config",
    "Makefile",
    "Module.symvers",
    "arch/x86/Makefile",
    "arch/x86/include",
    "include",
    "rust",
    "scripts",
    "tools/objtool/objtool",
];

/// Why a tree could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// tar could not be started.
    #[error("can't run tar to unpack {}", tarball.display())]
    Start {
        /// The archive of sources.
        tarball: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// tar ended with an error.
    #[error("tar can't unpack {}: {output}", tarball.display())]
    Failed {
        /// The archive of sources.
        tarball: PathBuf,
        /// What tar said.
        output: String,
    },
    /// What is not needed any more could not be removed.
    #[error("can't remove what is not needed of {}", path.display())]
    Prune {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Unpacks what a build reads of `tarball` into the empty directory `tree`.
pub(super) fn unpack(tarball: &Path, tree: &Path) -> Result<(), Error> {
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--file").arg(tarball).arg("--directory").arg(tree);
    tar.args(["--strip-components=1", "--no-same-owner", "--exclude=*/Documentation/*/*"]);
    for dir in UNREAD {
        tar.args(SOURCES.map(|ending| format!("--exclude=*/{dir}/*.{ending}")));
    }
    let output = tar.output().map_err(|source| Error::Start { tarball: tarball.into(), source })?;
    if !output.status.success() {
        let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Failed { tarball: tarball.into(), output });
    }
    Ok(())
}

/// Removes all of `tree` that modules don't need.
pub(super) fn prune(tree: &Path) -> Result<(), Error> {
    prune_below(tree, "")
}

/// Goes through `dir`, which is `inner` (ending in a slash) below the tree.
fn prune_below(dir: &Path, inner: &str) -> Result<(), Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Prune { path, source }
    };
    for entry in fs::read_dir(dir).map_err(failed(dir))? {
        let entry = entry.map_err(failed(dir))?;
        let path = entry.path();
        let name = format!("{inner}{}", entry.file_name().to_string_lossy());
        if KEPT.contains(&name.as_str()) {
            continue;
        }
        let below = format!("{name}/");
        if KEPT.iter().any(|kept| kept.starts_with(&below)) {
            prune_below(&path, &below)?;
        } else if entry.file_type().map_err(failed(&path))?.is_dir() {
            fs::remove_dir_all(&path).map_err(failed(&path))?;
        } else {
            fs::remove_file(&path).map_err(failed(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, files: &[&str]) {
        for file in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
    }

    fn listing(root: &Path) -> Vec<String> {
        let output = Command::new("find").arg(root).args(["-type", "f", "-printf", "%P\n"]).output().unwrap();
        let mut files: Vec<_> =
            String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect();
        files.sort();
        files
    }

    #[test]
    fn makefiles_are_unpacked_and_unread_sources_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let taken =
            ["Documentation/Kconfig", "arch/arm/crypto/Kconfig", "drivers/gpu/Makefile", "drivers/net/tun.c"];
        let left_out = ["Documentation/rust/index.rst", "arch/arm/kernel/setup.c", "drivers/gpu/drm/drm.h"];
        write(
            &dir.path().join("linux-1"),
            &[taken, [left_out[0], left_out[1], left_out[2], "kernel/fork.c"]].concat(),
        );
        let tarball = dir.path().join("linux.tar");
        let tar =
            Command::new("tar").arg("-C").arg(dir.path()).arg("-cf").arg(&tarball).arg("linux-1").status();
        assert!(tar.unwrap().success());
        let tree = dir.path().join("tree");
        fs::create_dir(&tree).unwrap();
        unpack(&tarball, &tree).unwrap();
        assert_eq!(listing(&tree), [taken.as_slice(), &["kernel/fork.c"]].concat());
    }

    #[test]
    fn modules_keep_what_they_need() {
        let dir = tempfile::tempdir().unwrap();
        let kept = ["Makefile", "arch/x86/include/asm/page.h", "include/linux/fs.h", "tools/objtool/objtool"];
        write(
            dir.path(),
            &[kept, ["vmlinux", "arch/x86/kernel/setup.o", "kernel/fork.o", "tools/objtool/elf.o"]].concat(),
        );
        prune(dir.path()).unwrap();
        assert_eq!(listing(dir.path()), kept);
    }
}
