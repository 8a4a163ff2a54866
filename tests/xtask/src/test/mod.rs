//! `cargo xtask test`.

mod parts;
mod programs;
mod times;

use std::env;
use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use self::parts::{Choice, Selection};
use self::programs::NEEDS;
use crate::cargo::{self, Executables, Workspace};
use crate::cli;
use crate::kernel;
use crate::lab::INTERRUPTED;
use crate::setup;
use crate::steps::Steps;
use crate::tidy;

pub(crate) use self::programs::{Built, PROGRAMS, Run, in_lab};
pub(crate) use self::times::Times;

/// Variable by which cargo has a program run test programs. It gives them a variable of their own.
const RUNNER: &str = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";

/// Runs all checks and tests that are asked for, also behind those that fail, and sums up. With CI=true in
/// the environment, what is skipped counts as failed.
pub(crate) fn run(steps: &mut Steps, arguments: &cli::Test) -> Result<u8> {
    if arguments.list {
        print!("{}", parts::list());
        return Ok(0);
    }
    let workspace = Workspace::find()?;
    let selection = Selection::new(&arguments.only);
    check_sources(steps, &workspace, &selection);
    let mut times = Times::default();
    let end = run_tests(steps, workspace, arguments, &selection, &mut times);
    let no_skips = env::var_os("CI").is_some_and(|ci| ci == "true");
    let code = if end.is_break() { INTERRUPTED } else { steps.exit_code(no_skips) };
    if no_skips {
        eprintln!("xtask: CI=true: what is skipped counts as failed");
    }
    eprint!("{times}{steps}");
    Ok(code)
}

fn check_sources(steps: &mut Steps, workspace: &Workspace, selection: &Selection) {
    let mut part = |name, check: &dyn Fn() -> Result<()>| {
        if selection.has(name) {
            steps.part(name, check);
        }
    };
    part("tidy", &|| tidy::check(workspace));
    part("supply", &|| tidy::check_supply(workspace));
    part("format", &|| {
        cargo::run(&["fmt", "--all", "--check"])?;
        // No package of the workspace: it is the kernel's Kbuild that builds it.
        let module = workspace.root.join("guest-kmod-rs/vmfork_main.rs");
        programs::check(Path::new("rustfmt"), Command::new("rustfmt").arg("--check").arg(module).status())
    });
    part("clippy", &|| cargo::run(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    part("docs", &check_docs);
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

/// Builds what the tests that are asked for need, and runs them; breaks off where they are interrupted.
fn run_tests(
    steps: &mut Steps,
    workspace: Workspace,
    arguments: &cli::Test,
    selection: &Selection,
    times: &mut Times,
) -> ControlFlow<()> {
    let end = ControlFlow::Continue(());
    if !selection.has("unit") && !selection.has_programs() {
        return end;
    }
    steps.parts("setup", |steps| steps.quiet("setup", setup::run));
    let etcd = setup::etcd_for_tests(steps, &workspace);
    let build = |steps: &mut Steps| {
        steps.part("build", Executables::programs).zip(steps.part("build of the tests", Executables::tests))
    };
    let built = selection.has_programs().then(|| build(steps)).flatten();
    if let Some((_, tests)) = &built {
        times.probe(tests);
    }
    if selection.has("unit") {
        run_unit_tests(steps, etcd.as_deref(), times);
    }
    if !selection.has_programs() {
        return end;
    }
    let choices =
        built.as_ref().and_then(|(_, tests)| steps.parts("choice of tests", |_| selection.choose(tests)));
    let (Some(built), Some(choices)) = (built, choices) else {
        PROGRAMS.iter().for_each(|program| steps.skip(program.step, NEEDS));
        return end;
    };
    let needs_lean = choices.iter().any(|choice| choice.program.of_lean_kernel);
    let lean = needs_lean.then(|| kernel::for_tests(steps, &workspace, arguments.debug_kernel)).flatten();
    let Some(built) = Built::new(steps, workspace, built, lean.as_ref(), etcd) else {
        choices.iter().for_each(|choice| steps.skip(choice.program.step, NEEDS));
        return end;
    };
    run_programs(steps, &built, &choices, arguments, selection.is_in_lab(), times)
}

/// Runs the tests beside the code, and those in doc comments.
fn run_unit_tests(steps: &mut Steps, etcd: Option<&Path>, times: &mut Times) {
    const TEST: [&str; 3] = ["test", "--release", "--no-fail-fast"];
    const OTHERS: [&str; 2] = ["--workspace", "--exclude=vmfork-tests"];
    const OWN: [&str; 3] = ["--package=vmfork-tests", "--lib", "--bins"];
    let Some(built) = steps.part("build of the unit tests", Executables::unit_tests) else { return };
    times.probe(&built);
    let mut run = |step: &'static str, which: &[&str], etcd: Option<&Path>| {
        steps.part(step, || {
            let mut command = cargo::command(&[&TEST, which, &["--"], times.arguments()].concat());
            command.envs(etcd.map(|etcd| ("VMFORK_ETCD", etcd)));
            command.envs(times.variable().map(|(name, value)| (RUNNER, format!("env {name}={value}"))));
            programs::check(Path::new("cargo"), times.watch(step, &mut command))
        });
    };
    run("unit tests", &[&OTHERS, ["--tests"].as_slice()].concat(), etcd);
    run("unit tests of the tests", &OWN, None);
    // rustdoc reads the arguments of these itself, and has no variable of its own to allow them.
    let doc = [&TEST, OTHERS.as_slice(), &["--doc"]].concat();
    steps.part("examples in doc comments", || cargo::run(&doc));
}

/// Runs the programs of end-to-end tests; breaks off where they are interrupted.
fn run_programs(
    steps: &mut Steps,
    built: &Built,
    choices: &[Choice],
    arguments: &cli::Test,
    in_lab_alone: bool,
    times: &Times,
) -> ControlFlow<()> {
    let variables: Vec<_> =
        arguments.rounds.iter().map(|rounds| ("VMFORK_ROUNDS", rounds.to_string())).collect();
    let (runs, without): (Vec<&Choice>, Vec<&Choice>) =
        choices.iter().partition(|choice| built.has_lean || !choice.program.of_lean_kernel);
    without.iter().for_each(|choice| steps.skip(choice.program.step, NEEDS));
    let has_elsewhere = runs.iter().any(|choice| choice.has_elsewhere);
    let run = |choice: &Choice| Run {
        program: choice.program,
        filters: choice.filters.clone(),
        variables: variables.clone(),
    };
    let runs: Vec<Run> = runs.into_iter().map(run).collect();
    let limit = arguments.limit.duration();
    if in_lab_alone {
        return in_lab(steps, built, &runs, times, limit);
    }
    let (linux, bare): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.program.of_linux);
    if let Some(error) = setup::kvm_error() {
        eprintln!("xtask: tests on bare guests run in the lab alone: /dev/kvm can't be opened: {error}");
    } else {
        bare.iter().for_each(|run| run.here(steps, built, times));
    }
    if has_elsewhere {
        built.elsewhere(steps, times);
    }
    match built.is_kvm_usable(steps) {
        Some(true) => linux.iter().for_each(|run| run.here(steps, built, times)),
        Some(false) => {
            eprintln!(
                "xtask: this machine's KVM can't run Linux guests (`host-vmm check` says why): \
                 they run in the lab"
            );
            return in_lab(steps, built, &runs, times, limit);
        }
        None => linux.iter().for_each(|run| steps.skip(run.program.step, NEEDS)),
    }
    ControlFlow::Continue(())
}
