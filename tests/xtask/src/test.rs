//! `cargo xtask test`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Executables, Workspace};
use crate::cli;
use crate::images::Assets;
use crate::lab::Job;
use crate::probe::is_kvm_usable;
use crate::setup;
use crate::steps::Steps;

/// Runs all checks and tests, up to the first that fails.
pub(crate) fn run(steps: &mut Steps, arguments: &cli::Test) -> Result<u8> {
    let result = run_steps(steps, arguments);
    eprintln!("xtask: {}", steps.summary());
    result.map(|()| 0)
}

fn run_steps(steps: &mut Steps, arguments: &cli::Test) -> Result<()> {
    let workspace = Workspace::find()?;
    let filter = arguments.filter.as_deref();
    steps.quiet("setup", setup::run)?;
    steps.run("format", || cargo::run(&["fmt", "--all", "--check"]))?;
    steps.run("clippy", || cargo::run(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    let programs = steps.run("build", Executables::programs)?;
    let tests = steps.run("build of the tests", Executables::tests)?;
    let etcd = steps.quiet("setup of etcd", || setup::etcd(&workspace));
    let etcd =
        etcd.inspect_err(|error| eprintln!("xtask: SKIPPED on this machine: tests with an etcd. {error:#}")).ok();
    steps.run("unit tests", || {
        let others = ["test", "--release", "--workspace", "--exclude=vmfork-tests", "--"];
        let etcd = etcd.as_deref().map(|program| ("VMFORK_ETCD", program));
        cargo::run_with(&[&others, filter.as_slice()].concat(), etcd)?;
        let own = ["test", "--release", "--package=vmfork-tests", "--lib", "--bins", "--"];
        cargo::run(&[&own, filter.as_slice()].concat())
    })?;
    let assets = Assets::build(steps, &workspace, &programs)?;

    if let Some(error) = setup::kvm_error() {
        eprintln!("xtask: SKIPPED on this machine: tests on bare guests. /dev/kvm can't be opened: {error}");
    } else {
        steps.run("bare guests", || here(&tests.path("bare")?, arguments, &assets, etcd.as_deref()))?;
    }
    if steps.quiet("probe", || is_kvm_usable(&programs.path("host-vmm")?))? {
        return steps.run("Linux guests", || here(&tests.path("guests")?, arguments, &assets, None));
    }
    eprintln!("xtask: this machine's KVM can't run Linux guests (`host-vmm check` says why): they run in the lab");
    steps.quiet("setup of the lab", setup::qemu)?;
    // The lab has one processor. The timers of two tests' Linux guests, of 8 vCPUs and more in several copies, can take all of it.
    for (name, at_once, step) in [("bare", "2", "bare guests in the lab"), ("guests", "1", "Linux guests in the lab")] {
        let rounds = arguments.rounds.map(|rounds| ["env".to_owned(), format!("VMFORK_ROUNDS={rounds}")]);
        let test = [name, "--test-threads", at_once].into_iter().chain(filter).map(str::to_owned);
        let command = rounds.into_iter().flatten().chain(test).collect();
        let mut job = Job { command, files: Vec::new(), limit: arguments.limit.duration() };
        job.add_program(name, &tests)?;
        steps.run(step, || match job.run(&workspace, &assets)? {
            0 => Ok(()),
            code => bail!("{name} in the lab ended with exit code {code}"),
        })?;
    }
    Ok(())
}

/// Runs a test program on this machine, which may need an etcd.
fn here(program: &Path, arguments: &cli::Test, assets: &Assets, etcd: Option<&Path>) -> Result<()> {
    let mut command = Command::new(program);
    let etcd = etcd.map(|program| ("VMFORK_ETCD", program));
    let rounds = arguments.rounds.map(|rounds| ("VMFORK_ROUNDS", rounds.to_string()));
    let status = command.args(&arguments.filter).env("VMFORK_ASSETS", &assets.dir).envs(etcd).envs(rounds).status();
    let status = status.with_context(|| format!("can't run {}", program.display()))?;
    if !status.success() {
        bail!("{} failed: {status}", program.display());
    }
    Ok(())
}
