//! `cargo xtask demo`.

use std::io::stdout;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cargo::{Executables, Workspace};
use crate::cli;
use crate::images::Assets;
use crate::kernel;
use crate::lab::Job;
use crate::probe::is_kvm_usable;
use crate::setup;
use crate::steps::{Steps, exit_code};

/// Builds everything, and runs the demo; returns its exit code.
pub(crate) fn run(steps: &mut Steps, arguments: &cli::Demo) -> Result<u8> {
    let workspace = Workspace::find()?;
    steps.quiet("setup", setup::run)?;
    let programs = steps.run("build", Executables::programs)?;
    let lean = kernel::wanted(steps, &workspace, arguments.kernel)?;
    let assets = Assets::build(steps, &workspace, &programs, lean.as_ref())?;
    let which = lean.map_or(Vec::new(), |_| vec!["--kernel".to_owned(), "lean".to_owned()]);
    let arguments_of_demo = [which.as_slice(), arguments.arguments.as_slice()].concat();
    if steps.quiet("probe", || is_kvm_usable(&programs.path("host-vmm")?))? {
        let demo = programs.path("demo")?;
        return steps.run("demo", || {
            let mut command = Command::new(&demo);
            let status = command.args(&arguments_of_demo).env("VMFORK_ASSETS", &assets.dir).status();
            Ok(exit_code(status.with_context(|| format!("can't run {}", demo.display()))?))
        });
    }
    eprintln!(
        "xtask: this machine's KVM can't run Linux guests (`host-vmm check` says why): \
         the demo runs in the lab"
    );
    steps.quiet("setup of the lab", setup::qemu)?;
    let command = [&["demo".to_owned()], arguments_of_demo.as_slice()].concat();
    let mut job = Job { command, files: Vec::new(), limit: arguments.limit.duration() };
    job.add_program("demo", &programs)?;
    steps.run("demo in the lab", || job.run(&workspace, &assets, stdout()))
}
