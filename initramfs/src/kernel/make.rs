//! Runs the kernel's own build.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use super::tools::{PATH, RUSTC, Tools};

/// How many lines of a build's output are shown when it fails.
const LAST_LINES: usize = 25;

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// make could not be started, or its output not be kept.
    #[error("can't run make in {}", tree.display())]
    Start {
        /// The kernel's tree.
        tree: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// make ended with an error.
    #[error("`make {goals}` in {} failed. The end of {}:\n{output}", tree.display(), log.display())]
    Failed {
        /// The kernel's tree.
        tree: PathBuf,
        /// What was to be made.
        goals: String,
        /// All of its output.
        log: PathBuf,
        /// The end of that.
        output: String,
    },
}

/// make in one kernel tree, always with the same settings.
#[derive(Debug)]
pub(super) struct Make<'a> {
    /// The kernel's tree: sources and objects, so that all paths in them are relative.
    pub(super) tree: &'a Path,
    /// Where its output goes.
    pub(super) log: &'a Path,
    pub(super) tools: &'a Tools,
    pub(super) bindgen: &'a Path,
}

impl Make<'_> {
    /// Makes `goals`, which may be settings too. `elsewhere` is a directory with further sources, if any.
    ///
    /// Neither time, user, host nor place of the build come into what is built.
    pub(super) fn run(&self, goals: &[&str], elsewhere: Option<&Path>) -> Result<(), Error> {
        let failed = |source| Error::Start { tree: self.tree.into(), source };
        let log = File::options().create(true).append(true).open(self.log).map_err(failed)?;
        let places =
            || [Some(self.tree), elsewhere].into_iter().flatten().map(|dir| format!("{}/=", dir.display()));
        let flags =
            |option: &str| places().map(|place| format!("{option}={place}")).collect::<Vec<_>>().join(" ");
        let jobs = thread::available_parallelism().map_or(1, usize::from);
        let mut make = Command::new("make");
        make.arg("-C")
            .arg(self.tree)
            .arg(format!("-j{jobs}"))
            .args(["ARCH=x86_64", "LOCALVERSION=", "KBUILD_BUILD_TIMESTAMP=@0"])
            .args(["KBUILD_BUILD_USER=vmfork", "KBUILD_BUILD_HOST=vmfork"])
            .args(["RUSTC", "HOSTRUSTC"].map(|variable| format!("{variable}={RUSTC}")))
            .arg("RUSTDOC=/usr/bin/rustdoc")
            .arg(format!("BINDGEN={}", self.bindgen.display()))
            .arg(format!("KCFLAGS={}", flags("-ffile-prefix-map")))
            .arg(format!("KRUSTFLAGS={}", flags("--remap-path-prefix")))
            .args(self.tools.setting())
            .args(goals);
        // The kernel's build takes many settings from its environment.
        make.env_clear().env("PATH", PATH).env("LC_ALL", "C").env("LIBCLANG_PATH", self.tools.libclang());
        make.stdout(log.try_clone().map_err(failed)?).stderr(log);
        if make.status().map_err(failed)?.success() {
            return Ok(());
        }
        let output = fs::read(self.log).map_err(failed)?;
        let output = last_lines(&String::from_utf8_lossy(&output));
        Err(Error::Failed { tree: self.tree.into(), goals: goals.join(" "), log: self.log.into(), output })
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}
