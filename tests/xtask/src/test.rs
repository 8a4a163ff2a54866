//! `cargo xtask test`.

use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::{env, io};

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Executables, Workspace};
use crate::cli;
use crate::images::Assets;
use crate::kernel;
use crate::lab::{INTERRUPTED, Job};
use crate::probe::is_kvm_usable;
use crate::setup;
use crate::steps::Steps;
use crate::tidy;

/// A program of end-to-end tests, from `tests/tests`.
struct Program {
    name: &'static str,
    step: &'static str,
    step_in_lab: &'static str,
    /// How many of its tests run at a time. The lab has one processor. The timers of two tests' Linux guests,
    /// of 8 vCPUs and more in several copies, can take all of it.
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

/// Why a part is skipped that needs another one.
const NEEDS: &str = "it needs what was not made";

/// What the end-to-end tests need.
struct Built {
    workspace: Workspace,
    programs: Executables,
    tests: Executables,
    assets: Assets,
    /// Whether the assets have the lean kernel.
    has_lean: bool,
    etcd: Option<PathBuf>,
}

/// Runs all checks and tests, also behind those that fail, and sums up. With CI=true in the environment, what
/// is skipped counts as failed.
pub(crate) fn run(steps: &mut Steps, arguments: &cli::Test) -> Result<u8> {
    let workspace = Workspace::find()?;
    check_sources(steps, &workspace);
    let end = match build(steps, workspace, arguments) {
        Some(built) => run_programs(steps, &built, arguments),
        None => {
            let programs = [&BARE].into_iter().chain(&LINUX);
            programs.for_each(|program| steps.skip(program.step, NEEDS));
            ControlFlow::Continue(())
        }
    };
    let no_skips = env::var_os("CI").is_some_and(|ci| ci == "true");
    let code = if end.is_break() { INTERRUPTED } else { steps.exit_code(no_skips) };
    if no_skips {
        eprintln!("xtask: CI=true: what is skipped counts as failed");
    }
    eprint!("{steps}");
    Ok(code)
}

fn check_sources(steps: &mut Steps, workspace: &Workspace) {
    steps.part("tidy", || tidy::check(workspace));
    steps.part("supply", || tidy::check_supply(workspace));
    steps.parts("setup", |steps| steps.quiet("setup", setup::run));
    steps.part("format", || {
        cargo::run(&["fmt", "--all", "--check"])?;
        // No package of the workspace: it is the kernel's Kbuild that builds it.
        let module = workspace.root.join("guest-kmod-rs/vmfork_main.rs");
        check(Path::new("rustfmt"), Command::new("rustfmt").arg("--check").arg(module).status())
    });
    steps.part("clippy", || cargo::run(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    steps.part("docs", check_docs);
}

/// Builds the documentation of all code. It is for those who read the code, so that it may link what is
/// private.
fn check_docs() -> Result<()> {
    let lints = OsStr::new("-D warnings -A rustdoc::private_intra_doc_links");
    cargo::run_with(
        &["doc", "--workspace", "--no-deps", "--document-private-items"],
        &[("RUSTDOCFLAGS", lints)],
    )
}

/// Builds everything, and runs the unit tests.
fn build(steps: &mut Steps, workspace: Workspace, arguments: &cli::Test) -> Option<Built> {
    let filter = arguments.filter.as_deref();
    let programs = steps.part("build", Executables::programs);
    let tests = steps.part("build of the tests", Executables::tests);
    let etcd = steps.parts_if_possible("tests with an etcd", |steps| {
        steps.quiet("setup of etcd", || setup::etcd(&workspace))
    });
    steps.part("unit tests", || {
        let others = ["test", "--release", "--no-fail-fast", "--workspace", "--exclude=vmfork-tests", "--"];
        let etcd = etcd.as_deref().map(|program| ("VMFORK_ETCD", program.as_os_str()));
        cargo::run_with(&[&others, filter.as_slice()].concat(), etcd.as_slice())
    });
    steps.part("unit tests of the tests", || {
        let own = ["test", "--release", "--no-fail-fast", "--package=vmfork-tests", "--lib", "--bins", "--"];
        cargo::run(&[&own, filter.as_slice()].concat())
    });
    let lean = kernel::for_tests(steps, &workspace, arguments.debug_kernel);
    let programs = programs?;
    let assets = steps.parts("images", |steps| Assets::build(steps, &workspace, &programs, lean.as_ref()))?;
    Some(Built { workspace, programs, tests: tests?, assets, has_lean: lean.is_some(), etcd })
}

/// Runs the programs of end-to-end tests; breaks off where they are interrupted.
fn run_programs(steps: &mut Steps, built: &Built, arguments: &cli::Test) -> ControlFlow<()> {
    let here =
        |program: &Program, etcd| here(&built.tests.path(program.name)?, arguments, &built.assets, etcd);
    if let Some(error) = setup::kvm_error() {
        eprintln!("xtask: tests on bare guests run in the lab alone: /dev/kvm can't be opened: {error}");
    } else {
        steps.part(BARE.step, || here(&BARE, built.etcd.as_deref()));
    }
    if built.has_lean && arguments.filter.as_deref().is_none_or(|filter| ELSEWHERE.contains(filter)) {
        let name = "kernel module without host-vmm";
        if steps.parts_if_possible(name, |steps| steps.quiet("setup of QEMU", setup::qemu)).is_some() {
            steps.part(name, || elsewhere(&built.tests, &built.assets));
        }
    }
    let (linux, without): (Vec<_>, Vec<_>) =
        LINUX.iter().partition(|program| built.has_lean || !program.of_lean_kernel);
    without.iter().for_each(|program| steps.skip(program.step, NEEDS));
    let is_usable = || is_kvm_usable(&built.programs.path("host-vmm")?);
    match steps.parts("probe", |steps| steps.quiet("probe", is_usable)) {
        Some(true) => {
            for program in linux {
                steps.part(program.step, || here(program, None));
            }
            ControlFlow::Continue(())
        }
        Some(false) => {
            eprintln!(
                "xtask: this machine's KVM can't run Linux guests (`host-vmm check` says why): \
                 they run in the lab"
            );
            run_in_lab(steps, built, arguments, &[&[&BARE], linux.as_slice()].concat())
        }
        None => {
            linux.iter().for_each(|program| steps.skip(program.step, NEEDS));
            ControlFlow::Continue(())
        }
    }
}

fn run_in_lab(
    steps: &mut Steps,
    built: &Built,
    arguments: &cli::Test,
    programs: &[&Program],
) -> ControlFlow<()> {
    if steps.parts("setup of the lab", |steps| steps.quiet("setup of the lab", setup::qemu)).is_none() {
        programs.iter().for_each(|program| steps.skip(program.step_in_lab, NEEDS));
        return ControlFlow::Continue(());
    }
    for program in programs {
        let mut is_interrupted = false;
        steps.part(program.step_in_lab, || {
            let mut job = job(program, arguments);
            job.add_program(program.name, &built.tests)?;
            let code = job.run(&built.workspace, &built.assets)?;
            is_interrupted = code == INTERRUPTED;
            if code == 0 { Ok(()) } else { bail!("{} in the lab ended with exit code {code}", program.name) }
        });
        if is_interrupted {
            return ControlFlow::Break(());
        }
    }
    ControlFlow::Continue(())
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
