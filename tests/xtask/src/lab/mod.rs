//! The lab: a machine, emulated by QEMU, whose CPU has AMD's virtualisation with nested paging.
//!
//! It boots Debian's kernel with an initramfs of two parts: the lab's own image, which changes as rarely as
//! the kernel, and one made for the run, with the programs, the assets and the command. Nothing is mounted,
//! and there is no network.

mod qemu;
mod streams;

use std::env;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use initramfs::image::ImageBuilder;

use crate::cargo::{Executables, Workspace};
use crate::cli;
use crate::images::Assets;
use crate::kernel;
use crate::setup;
use crate::steps::Steps;

pub(crate) use self::qemu::INTERRUPTED;

/// Directory in the lab that `VMFORK_ASSETS` names.
const ASSETS: &str = "/lab/assets";

/// Directory of programs in the lab, on its PATH.
const BIN: &str = "/lab/bin";

/// Variables of this machine's environment that the command in the lab gets too.
const PASSED_ON: [&str; 2] = ["RUST_BACKTRACE", "RUST_LOG"];

/// One command to run in the lab.
#[derive(Debug)]
pub(crate) struct Job {
    /// The program, and its arguments.
    pub(crate) command: Vec<String>,
    /// Files of this machine, and where the lab has them.
    pub(crate) files: Vec<(PathBuf, String)>,
    /// Time that it may take.
    pub(crate) limit: Duration,
}

/// Builds everything, and runs the user's command.
pub(crate) fn command(steps: &mut Steps, arguments: &cli::Lab) -> Result<u8> {
    let workspace = Workspace::find()?;
    steps.quiet("setup", || setup::run().and_then(|()| setup::qemu()))?;
    let programs = steps.run("build", Executables::programs)?;
    let lean = kernel::wanted(steps, &workspace, arguments.kernel)?;
    let assets = Assets::build(steps, &workspace, &programs, lean.as_ref())?;
    let mut job = Job {
        command: arguments.command.clone(),
        files: arguments.files.clone(),
        limit: arguments.limit.duration(),
    };
    for program in ["demo", "bench"] {
        job.add_program(program, &programs)?;
    }
    steps.run("lab", || job.run(&workspace, &assets, io::stdout()))
}

impl Job {
    /// Puts a program of the workspace on the lab's PATH.
    pub(crate) fn add_program(&mut self, name: &str, programs: &Executables) -> Result<()> {
        self.files.push((programs.path(name)?, format!("{BIN}/{name}")));
        Ok(())
    }

    /// Runs it in a lab of its own with its output shown, and returns its exit code.
    pub(crate) fn run(
        &self,
        workspace: &Workspace,
        assets: &Assets,
        output: impl Write + Send + 'static,
    ) -> Result<u8> {
        let dir = workspace.target.join("lab");
        let mut initrd =
            tempfile::tempfile_in(&dir).with_context(|| format!("can't write in {}", dir.display()))?;
        let mut base =
            fs::File::open(&assets.lab).with_context(|| format!("can't read {}", assets.lab.display()))?;
        io::copy(&mut base, &mut initrd).context("can't copy the lab's image")?;
        self.payload(&assets.dir)?.write(&mut initrd)?;
        qemu::run(&assets.dir.join("vmlinuz"), &initrd, &dir, self.limit, output)
    }

    /// The part of the initramfs that is made for this run.
    fn payload(&self, assets: &Path) -> Result<ImageBuilder> {
        let mut image = ImageBuilder::default();
        add_files(&mut image, assets, ASSETS).with_context(|| format!("can't read {}", assets.display()))?;
        for program in ["host-vmm", "vmfork"] {
            image.symlink(&format!("{BIN}/{program}"), &format!("{ASSETS}/bin/{program}"));
        }
        for (here, there) in &self.files {
            image.file(there, 0o755, here);
        }
        image.bytes("/lab/command", 0o644, self.script());
        Ok(image)
    }

    fn script(&self) -> String {
        let set = PASSED_ON.iter().filter_map(|name| Some((name, env::var(name).ok()?)));
        let exports = set.map(|(name, value)| format!("export {name}={}\n", quote(&value)));
        let command = self.command.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" ");
        exports.chain([format!("{command}\n")]).collect()
    }
}

/// Adds all files below the directory `here`.
fn add_files(image: &mut ImageBuilder, here: &Path, there: &str) -> io::Result<()> {
    for entry in fs::read_dir(here)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let there = format!("{there}/{name}");
        if path.is_dir() {
            add_files(image, &path, &there)?;
        } else {
            image.file(&there, 0o755, &path);
        }
    }
    Ok(())
}

/// A word that the shell takes as it is.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_command_unchanged() {
        let command = ["echo", "it's", "$HOME", ""].map(str::to_owned).to_vec();
        let job = Job { command, files: Vec::new(), limit: Duration::ZERO };
        let script = job.script();
        assert_eq!(script.lines().last(), Some(r"'echo' 'it'\''s' '$HOME' ''"));
    }
}
