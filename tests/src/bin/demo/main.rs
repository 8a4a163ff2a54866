//! The demo: a real application in a Debian guest warms up, forks its VM, and each child answers from the
//! warm state.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, stderr},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};
use indicatif::ProgressBar;
use nix::sys::signal::Signal;
use serde_json::Value;
use vmfork_tests::{
    assets, process,
    vmm::{Running, Vmm, console_line, monotonic_ns},
};

mod expected;
mod figures;

use figures::{Child, Figures};

const PYTHON: &str = "/usr/bin/python3";
const APPLICATION: &str = "/usr/share/vmfork-demo/app.py";

/// Boots a Debian guest whose application forks it, and measures what that brings.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Cli {
    /// Number of children.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    children: u32,
    /// Guest memory.
    #[arg(long, default_value = "512M")]
    mem: String,
    /// The guest's kernel: Debian's, or the lean one with the kernel module.
    #[arg(long, value_enum, default_value_t)]
    kernel: Kernel,
    /// Print the figures as one JSON object too, on the last line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
enum Kernel {
    #[default]
    Debian,
    Lean,
}

impl Kernel {
    /// Boots the demo's guest with it.
    fn boot(self, program: &[&str]) -> Vmm {
        let boot = match self {
            Self::Debian => Vmm::linux,
            Self::Lean => Vmm::lean,
        };
        boot("python.cpio", program)
    }

    /// Its own name for its version, or that of its package.
    fn name(self) -> String {
        let file = match self {
            Self::Debian => "kernel.txt",
            Self::Lean => "lean/kernel.txt",
        };
        std::fs::read_to_string(assets::path(file)).unwrap_or_default().trim().to_owned()
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(figures) => {
            print!("{figures}");
            if cli.json {
                println!("{}", figures.to_json());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<Figures> {
    let kvm = kind_of_kvm();
    let progress = Progress::new();
    let kernel = cli.kernel.name();
    progress.say(&format!("booting {kernel}, Python and SQLite"));
    let children = cli.children.to_string();
    let started_ns = monotonic_ns();
    let mut running = cli.kernel.boot(&[PYTHON, APPLICATION, &children]).option("--mem", &cli.mem).start()?;
    let (ready_ns, ready) = wait_for_line(&mut running, "READY ")?;
    let completions = ready["completions"].as_u64().context("the application is ready, but knows nothing")?;
    progress.say(&format!("the application knows {completions} completions and forks its VM"));
    let children = wait_for_answers(&mut running, cli.children)?;
    let (rung_ns, pause_ns) = running.wait_for("a report of the fork", |event| {
        let forked = event["event"] == "forked" && event["code"] == 0;
        forked.then(|| Some((event["rung_ns"].as_u64()?, event["pause_ns"].as_u64()?))).flatten()
    })?;
    progress.done();
    running.signal(Signal::SIGTERM)?;
    running.end().context("the VMs could not be ended")?;
    let children = children.into_iter().map(|(answered_ns, name, private_kib, answer)| Child {
        name,
        first_answer: Duration::from_nanos(answered_ns.saturating_sub(rung_ns)),
        private_kib,
        answer,
    });
    Ok(Figures {
        kvm,
        kernel,
        mem: cli.mem.clone(),
        boot_to_ready: Duration::from_nanos(ready_ns.saturating_sub(started_ns)),
        parent_pause: Duration::from_nanos(pause_ns),
        children: children.collect(),
    })
}

/// Waits for an answer of each child, checks it, and looks how much memory the child has of its own at that
/// moment.
fn wait_for_answers(running: &mut Running, count: u32) -> anyhow::Result<Vec<(u64, String, u64, Value)>> {
    let texts = expected::read_texts(&assets::path("licenses"))?;
    let mut answers = BTreeMap::new();
    for _ in 0..count {
        let next = |event: &Value| {
            let (name, line) = console_line(event, "ANSWER ")?;
            let index = serde_json::from_str::<Value>(&line).ok()?["index"].as_u64()?;
            (!answers.contains_key(&index)).then(|| (index, event["t_ns"].as_u64(), name, line))
        };
        let (index, answered_ns, name, line) = running.wait_for("answer of another child", next)?;
        let node = running.node(&name)?;
        let private_kib = process::private_kib(node).with_context(|| format!("can't look at {name}"))?;
        let answer: Value = serde_json::from_str(&line)?;
        let right = expected::answer(&texts, index);
        ensure!(answer == right, "{name} answers {answer}, right is {right}");
        answers.insert(index, (answered_ns.context("an event without a time")?, name, private_kib, answer));
    }
    ensure!(answers.keys().copied().eq(1..=u64::from(count)), "answers of {:?} came", answers.keys());
    Ok(answers.into_values().collect())
}

/// Waits for a console line that starts with `prefix`: when it came, and the object behind the prefix.
fn wait_for_line(running: &mut Running, prefix: &str) -> anyhow::Result<(u64, Value)> {
    let (t_ns, line) = running.wait_for(&format!("line {prefix:?}"), |event| {
        Some((event["t_ns"].as_u64()?, console_line(event, prefix)?.1))
    })?;
    Ok((t_ns, serde_json::from_str(&line)?))
}

/// What the figures were measured on.
fn kind_of_kvm() -> String {
    let speed = assets::probe().kernel_code.map_or_else(
        || "unknown speed".to_owned(),
        |speed| format!("{} million instructions a second of guest kernel code", speed / 1_000_000),
    );
    if assets::in_lab() {
        format!("the lab: KVM nested in QEMU's software processor, no hardware virtualisation ({speed})")
    } else {
        format!("this host's KVM ({speed})")
    }
}

/// What is going on: a spinner on a terminal, plain lines elsewhere.
struct Progress(Option<ProgressBar>);

impl Progress {
    fn new() -> Self {
        Self(stderr().is_terminal().then(|| {
            let spinner = ProgressBar::new_spinner();
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        }))
    }

    fn say(&self, what: &str) {
        match &self.0 {
            Some(spinner) => spinner.set_message(what.to_owned()),
            None => eprintln!("demo: {what}"),
        }
    }

    fn done(&self) {
        if let Some(spinner) = &self.0 {
            spinner.finish_and_clear();
        }
    }
}
