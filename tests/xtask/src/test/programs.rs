//! Programs of end-to-end tests, and how they run: on this machine, or in the lab.

use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::times::Times;
use crate::cargo::{Executables, Workspace};
use crate::images::Assets;
use crate::kernel::Kernel;
use crate::lab::{INTERRUPTED, Job};
use crate::probe::is_kvm_usable;
use crate::setup;
use crate::steps::Steps;

/// A program of end-to-end tests, from `tests/tests`.
#[derive(Debug)]
pub(crate) struct Program {
    /// Name of the program, and of its part.
    pub(crate) name: &'static str,
    pub(crate) step: &'static str,
    step_in_lab: &'static str,
    /// Number of its tests that run at a time. The lab has one processor. The timers of two tests' Linux
    /// guests, of 8 vCPUs and more in several copies, can take all of it.
    at_once_in_lab: &'static str,
    /// True if it needs a KVM that can run Linux guests; others need no more than one, however slow.
    pub(crate) of_linux: bool,
    /// True if it needs the lean kernel, and the module.
    pub(crate) of_lean_kernel: bool,
}

pub(crate) static PROGRAMS: [Program; 3] = [
    Program {
        name: "bare",
        step: "bare guests",
        step_in_lab: "bare guests in the lab",
        at_once_in_lab: "2",
        of_linux: false,
        of_lean_kernel: false,
    },
    Program {
        name: "guests",
        step: "Linux guests",
        step_in_lab: "Linux guests in the lab",
        at_once_in_lab: "1",
        of_linux: true,
        of_lean_kernel: false,
    },
    Program {
        name: "kmod",
        step: "kernel module",
        step_in_lab: "kernel module in the lab",
        at_once_in_lab: "1",
        of_linux: true,
        of_lean_kernel: true,
    },
];

/// The one test of `kmod` that runs in a QEMU of this machine, and nowhere else.
pub(super) const ELSEWHERE: &str = "where_no_host_vmm_is_it_refuses_to_be_loaded";

/// Reason for which a part is skipped that needs another one.
pub(super) const NEEDS: &str = "it needs what was not made";

/// Everything that the end-to-end tests need.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) workspace: Workspace,
    pub(crate) programs: Executables,
    pub(crate) tests: Executables,
    pub(crate) assets: Assets,
    /// True if the assets have the lean kernel.
    pub(crate) has_lean: bool,
    pub(crate) etcd: Option<PathBuf>,
}

/// Some tests of one program, and what they are told.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) program: &'static Program,
    /// Each test's name contains one of these; all run if there is none.
    pub(crate) filters: Vec<String>,
    /// Variables of the environment.
    pub(crate) variables: Vec<(&'static str, String)>,
}

impl Program {
    /// Names of its tests.
    pub(super) fn list(&self, built: &Executables) -> Result<Vec<String>> {
        let path = built.path(self.name)?;
        let output = Command::new(&path).args(["--list", "--format=terse"]).output();
        let output = output.with_context(|| format!("can't run {}", path.display()))?;
        if !output.status.success() {
            bail!("{} can't list its tests: {}", path.display(), output.status);
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    }
}

impl Built {
    /// Builds what is missing beside programs and tests.
    pub(crate) fn new(
        steps: &mut Steps,
        workspace: Workspace,
        (programs, tests): (Executables, Executables),
        lean: Option<&Kernel>,
        etcd: Option<PathBuf>,
    ) -> Option<Self> {
        let assets = steps.parts("images", |steps| Assets::build(steps, &workspace, &programs, lean))?;
        Some(Self { workspace, programs, tests, assets, has_lean: lean.is_some(), etcd })
    }

    /// True if this machine's KVM can run Linux guests; `None` if that can't be found out.
    pub(crate) fn is_kvm_usable(&self, steps: &mut Steps) -> Option<bool> {
        let probe = || is_kvm_usable(&self.programs.path("host-vmm")?);
        steps.parts("probe", |steps| steps.quiet("probe", probe))
    }

    /// Runs [`ELSEWHERE`], if QEMU is here.
    pub(super) fn elsewhere(&self, steps: &mut Steps, times: &Times) {
        const NAME: &str = "kernel module without host-vmm";
        if steps.parts_if_possible(NAME, |steps| steps.quiet("setup of QEMU", setup::qemu)).is_none() {
            return;
        }
        steps.part(NAME, || {
            let program = self.tests.path("kmod")?;
            let mut command = Command::new(&program);
            command.args(["--exact", ELSEWHERE]).args(times.arguments()).envs(times.variable());
            check(&program, times.watch(NAME, command.env("VMFORK_ASSETS", &self.assets.dir)))
        });
    }
}

impl Run {
    /// Runs the tests on this machine.
    pub(crate) fn here(&self, steps: &mut Steps, built: &Built, times: &Times) {
        let step = self.program.step;
        steps.part(step, || {
            let program = built.tests.path(self.program.name)?;
            let mut command = Command::new(&program);
            command.args(["--skip", ELSEWHERE]).args(&self.filters).args(times.arguments());
            command.env("VMFORK_ASSETS", &built.assets.dir);
            command.envs(self.variables.iter().map(|(name, value)| (name, value))).envs(times.variable());
            let etcd = built.etcd.as_deref().map(|etcd| ("VMFORK_ETCD", etcd));
            check(&program, times.watch(step, command.envs(etcd)))
        });
    }

    /// Runs the tests in a lab of their own; breaks off where that is interrupted.
    fn alone_in_lab(
        &self,
        steps: &mut Steps,
        built: &Built,
        times: &Times,
        limit: Duration,
    ) -> ControlFlow<()> {
        let mut is_interrupted = false;
        let step = self.program.step_in_lab;
        steps.part(step, || {
            let mut job = Job { command: self.command_in_lab(times), files: Vec::new(), limit };
            job.add_program(self.program.name, &built.tests)?;
            let code = job.run(&built.workspace, &built.assets, times.output(step))?;
            is_interrupted = code == INTERRUPTED;
            if code == 0 {
                Ok(())
            } else {
                bail!("{} in the lab ended with exit code {code}", self.program.name)
            }
        });
        if is_interrupted { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// The test program as the lab runs it.
    fn command_in_lab(&self, times: &Times) -> Vec<String> {
        let Program { name, at_once_in_lab, .. } = self.program;
        let variables = self.variables.iter().map(|(name, value)| format!("{name}={value}"));
        let allow = times.variable().map(|(name, value)| format!("{name}={value}"));
        let words = [name, "--test-threads", at_once_in_lab, "--skip", ELSEWHERE].map(str::to_owned);
        let report = times.arguments().iter().map(|&word| word.to_owned());
        let tests = self.filters.iter().cloned().chain(report);
        ["env".to_owned()].into_iter().chain(variables).chain(allow).chain(words).chain(tests).collect()
    }
}

/// Runs each of `runs` in a lab of its own; breaks off where one is interrupted.
pub(crate) fn in_lab(
    steps: &mut Steps,
    built: &Built,
    runs: &[Run],
    times: &Times,
    limit: Duration,
) -> ControlFlow<()> {
    if steps.parts("setup of the lab", |steps| steps.quiet("setup of the lab", setup::qemu)).is_none() {
        runs.iter().for_each(|run| steps.skip(run.program.step_in_lab, NEEDS));
        return ControlFlow::Continue(());
    }
    runs.iter().try_for_each(|run| run.alone_in_lab(steps, built, times, limit))
}

/// Passes if a program has ended well.
pub(super) fn check(program: &Path, status: io::Result<ExitStatus>) -> Result<()> {
    let status = status.with_context(|| format!("can't run {}", program.display()))?;
    if !status.success() {
        bail!("{} failed: {status}", program.display());
    }
    Ok(())
}
