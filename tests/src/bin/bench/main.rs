//! The bench: what a fork takes, beside the floor that the machine sets, in one run.
//!
//! Everything runs on this host's /dev/kvm with a bare guest at CPL 3, which a KVM that emulates guest kernel
//! code runs at full speed too. Figures that are compared are measured in turn. Times are those of VM exits,
//! taken by the process that runs the vCPU.

use std::{
    fs,
    io::{IsTerminal, stderr},
    path::PathBuf,
    process::{Command, ExitCode},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

mod clones;
mod doorbell;
mod firecracker;
mod floor;
mod measure;
mod plot;
mod session;
mod stats;
mod switch;
mod table;

use measure::Bench;

/// How long everything is left alone between two forks: the pool refills, the parent gets ready, what was
/// left is cleared away.
const REST: Duration = Duration::from_millis(45);

/// Measures forks, and the floor that the machine sets.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Cli {
    /// The main figures only, in less than a minute.
    #[arg(long)]
    quick: bool,
    /// Only the figures of one group.
    #[arg(long, value_name = "GROUP")]
    only: Option<measure::Group>,
    /// Restore the same guest with this Firecracker binary too, in turn with forks.
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Folder for table, JSON and plots.
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    out: PathBuf,
    /// Print the figures as one JSON array too, on the last line.
    #[arg(long)]
    json: bool,
    /// Launch so many VMs without a VMM, and print how long that took; the bench runs itself so.
    #[arg(long, value_name = "COUNT", hide = true)]
    floor_many: Option<usize>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if let Some(count) = cli.floor_many {
        let (all_ran, all_ended) = floor::many(count, 512 << 20)?;
        println!("{} {}", all_ran.as_secs_f64(), all_ended.as_secs_f64());
        return Ok(());
    }
    floor::keep_no_memory();
    let mut bench = Bench::new(cli.quick, cli.firecracker.clone(), Progress::new())?;
    bench.run(cli.only)?;
    let figures = bench.figures();
    print!("{}", table::table(&figures));
    fs::create_dir_all(&cli.out).with_context(|| format!("can't create {}", cli.out.display()))?;
    let write = |name: &str, content: String| {
        let path = cli.out.join(name);
        fs::write(&path, content).with_context(|| format!("can't write {}", path.display()))
    };
    let json = serde_json::to_string_pretty(&figures)?;
    write("summary.json", json)?;
    write("table.txt", table::table(&figures))?;
    plot::draw(&figures, &cli.out)?;
    println!("\nIn {}: table.txt, summary.json, and plots.", cli.out.display());
    if cli.json {
        println!("{}", serde_json::to_string(&figures)?);
    }
    Ok(())
}

/// Runs `floor::many` in a process of its own, which has one thread.
fn floor_many(count: usize) -> Result<(Duration, Duration)> {
    let output =
        Command::new(std::env::current_exe()?).arg("--floor-many").arg(count.to_string()).output()?;
    ensure!(output.status.success(), "the floor failed: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let mut seconds = text.split_whitespace().map(|word| word.parse().map(Duration::from_secs_f64));
    let mut next =
        || seconds.next().context("the floor printed no time")?.context("the floor printed no number");
    Ok((next()?, next()?))
}

/// What is being measured: a bar on a terminal, plain lines elsewhere.
#[derive(Debug)]
struct Progress(Option<ProgressBar>);

impl Progress {
    fn new() -> Self {
        Self(stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{msg:<40} {bar:30} {pos}/{len} {elapsed}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        }))
    }

    /// Says what is measured now, `steps` times.
    fn begin(&self, what: &str, steps: usize) {
        match &self.0 {
            Some(bar) => {
                bar.set_message(what.to_owned());
                bar.set_length(steps as u64);
                bar.set_position(0);
            }
            None => eprintln!("bench: {what}, {steps} times"),
        }
    }

    fn step(&self) {
        if let Some(bar) = &self.0 {
            bar.inc(1);
        }
    }

    fn done(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Lets the host come to rest between measurements that shake it up.
fn rest() {
    thread::sleep(Duration::from_millis(300));
}
