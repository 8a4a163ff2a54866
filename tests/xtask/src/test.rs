//! `cargo xtask test`.

use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Executables, Workspace};
use crate::cli;
use crate::images::Assets;
use crate::kernel;
use crate::lab::Job;
use crate::probe::is_kvm_usable;
use crate::setup;
use crate::steps::Steps;

/// A program of end-to-end tests, from `tests/tests`.
struct Program {
    name: &'static str,
    step: &'static str,
    step_in_lab: &'static str,
    /// How many of its tests run at a time. The lab has one processor. The timers of two tests' Linux guests, of 8 vCPUs and more in several
    /// copies, can take all of it.
    at_once_in_lab: &'static str,
    /// It needs the lean kernel, and the module.
    of_lean_kernel: bool,
}

/// What needs no more than a KVM, however slow.
const BARE: Program = Program {
    name: "bare",
    step: "bare guests",
    step_in_lab: "bare guests in the lab",
    at_once_in_lab: "2",
    of_lean_kernel: false,
};

/// What needs a KVM that can run Linux guests.
const LINUX: [Program; 2] = [
    Program {
        name: "guests",
        step: "Linux guests",
        step_in_lab: "Linux guests in the lab",
        at_once_in_lab: "1",
        of_lean_kernel: false,
    },
    Program {
        name: "kmod",
        step: "kernel module",
        step_in_lab: "kernel module in the lab",
        at_once_in_lab: "1",
        of_lean_kernel: true,
    },
];

/// The one test of `kmod` that runs in a QEMU of this machine, and nowhere else.
const ELSEWHERE: &str = "where_no_host_vmm_is_it_refuses_to_be_loaded";

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
    steps.run("format", || {
        cargo::run(&["fmt", "--all", "--check"])?;
        // No package of the workspace: it is the kernel's Kbuild that builds it.
        let module = workspace.root.join("guest-kmod-rs/vmfork_main.rs");
        check(Path::new("rustfmt"), Command::new("rustfmt").arg("--check").arg(module).status())
    })?;
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
    let lean = kernel::for_tests(steps, &workspace, arguments.debug_kernel)?;
    let lean = lean
        .inspect_err(|error| eprintln!("xtask: SKIPPED on this machine: tests of the kernel module. {error:#}"))
        .ok();
    let assets = Assets::build(steps, &workspace, &programs, lean.as_ref())?;

    if let Some(error) = setup::kvm_error() {
        eprintln!("xtask: SKIPPED on this machine: tests on bare guests. /dev/kvm can't be opened: {error}");
    } else {
        steps.run(BARE.step, || here(&tests.path(BARE.name)?, arguments, &assets, etcd.as_deref()))?;
    }
    if lean.is_some() && filter.is_none_or(|filter| ELSEWHERE.contains(filter)) {
        match steps.quiet("setup of QEMU", setup::qemu) {
            Ok(()) => steps.run("kernel module without host-vmm", || elsewhere(&tests, &assets))?,
            Err(error) => {
                eprintln!("xtask: SKIPPED on this machine: the kernel module without host-vmm. {error:#}");
            }
        }
    }
    let mut linux = LINUX.iter().filter(|tests| lean.is_some() || !tests.of_lean_kernel);
    if steps.quiet("probe", || is_kvm_usable(&programs.path("host-vmm")?))? {
        return linux.try_for_each(|program| {
            steps.run(program.step, || here(&tests.path(program.name)?, arguments, &assets, None))
        });
    }
    eprintln!("xtask: this machine's KVM can't run Linux guests (`host-vmm check` says why): they run in the lab");
    steps.quiet("setup of the lab", setup::qemu)?;
    for program in [&BARE].into_iter().chain(linux) {
        let mut job = job(program, arguments);
        job.add_program(program.name, &tests)?;
        steps.run(program.step_in_lab, || match job.run(&workspace, &assets)? {
            0 => Ok(()),
            code => bail!("{} in the lab ended with exit code {code}", program.name),
        })?;
    }
    Ok(())
}

/// Runs [`ELSEWHERE`].
fn elsewhere(tests: &Executables, assets: &Assets) -> Result<()> {
    let program = tests.path("kmod")?;
    let mut command = Command::new(&program);
    let status = command.args(["--exact", ELSEWHERE]).env("VMFORK_ASSETS", &assets.dir).status();
    check(&program, status)
}

/// A test program, as it is run in the lab.
fn job(program: &Program, arguments: &cli::Test) -> Job {
    let rounds = arguments.rounds.map(|rounds| ["env".to_owned(), format!("VMFORK_ROUNDS={rounds}")]);
    let test = [program.name, "--test-threads", program.at_once_in_lab, "--skip", ELSEWHERE]
        .into_iter()
        .chain(arguments.filter.as_deref());
    let command = rounds.into_iter().flatten().chain(test.map(str::to_owned)).collect();
    Job { command, files: Vec::new(), limit: arguments.limit.duration() }
}

/// Runs a test program on this machine, which may need an etcd.
fn here(program: &Path, arguments: &cli::Test, assets: &Assets, etcd: Option<&Path>) -> Result<()> {
    let mut command = Command::new(program);
    let etcd = etcd.map(|program| ("VMFORK_ETCD", program));
    let rounds = arguments.rounds.map(|rounds| ("VMFORK_ROUNDS", rounds.to_string()));
    command.args(["--skip", ELSEWHERE]).args(&arguments.filter);
    check(program, command.env("VMFORK_ASSETS", &assets.dir).envs(etcd).envs(rounds).status())
}

/// Passes if a test program has ended well.
fn check(program: &Path, status: io::Result<ExitStatus>) -> Result<()> {
    let status = status.with_context(|| format!("can't run {}", program.display()))?;
    if !status.success() {
        bail!("{} failed: {status}", program.display());
    }
    Ok(())
}
