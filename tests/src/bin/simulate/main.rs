//! The simulation: placement of copies over a cluster, by the code that places real ones.
//!
//! Platforms of three sizes are filled to three quarters by the policy itself, with views of the cluster that
//! are always true. Then forks arrive at a few platforms at random, as often as copies end, and are placed by
//! what their platform knows of the others: all of it, or what it was told at most a second ago, or five.
//! Meanwhile others place copies too. A platform that has become full lets copies bounce, and says so; they
//! are placed again then, a few times at most.

use std::{
    io::{IsTerminal, stderr},
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use clap::Parser;
use cluster::placement::Policy;
use indicatif::{ProgressBar, ProgressStyle};

mod load;
mod report;
mod run;

use run::{Setup, simulate};

/// How old what a platform knows of others may be.
const VIEW_AGES: [Duration; 3] = [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(5)];

/// Simulates placement over the platforms of a cluster.
#[derive(Debug, Parser)]
#[command(name = "simulate")]
struct Cli {
    /// How many platforms there are.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    platforms: u32,
    /// How many forks there are once the cluster is filled; each makes 1 to 8 copies.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    forks: u32,
    /// Chance begins with this number: the same one gives the same forks.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Only one policy: local, least-loaded, spread, pack or pinned.
    #[arg(long, value_name = "POLICY")]
    policy: Option<Policy>,
    /// Print one JSON array instead of a table.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("simulate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let policies = Policy::ALL.into_iter().map(|(_, policy)| policy);
    let policies = policies.filter(|policy| cli.policy.is_none_or(|only| only == *policy));
    let setups: Vec<Setup> =
        policies.flat_map(|policy| VIEW_AGES.map(|view_age| setup(cli, policy, view_age))).collect();
    let bar = progress(setups.len() as u64 * u64::from(cli.forks));
    let mut outcomes = Vec::new();
    for setup in &setups {
        bar.set_message(format!("{}, views {} s old", setup.policy, setup.view_age.as_secs()));
        outcomes.push(simulate(setup, || bar.inc(1))?);
    }
    bar.finish_and_clear();
    if cli.json {
        println!("{}", serde_json::to_string(&outcomes)?);
    } else {
        print!("{}", report::table(&outcomes));
    }
    Ok(())
}

fn setup(cli: &Cli, policy: Policy, view_age: Duration) -> Setup {
    Setup { platforms: cli.platforms, forks: cli.forks, seed: cli.seed, policy, view_age }
}

/// A bar on a terminal, and nothing elsewhere.
fn progress(steps: u64) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:<30} {bar:30} {pos}/{len} {elapsed}");
    ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        let cli = Cli::parse_from(["simulate", "--policy", "spread", "--platforms", "10000"]);
        assert_eq!((cli.policy, cli.platforms), (Some(Policy::Spread), 10_000));
        for bad in [["--policy", "even"], ["--platforms", "0"], ["--platforms", "10001"], ["--forks", "0"]] {
            assert!(Cli::try_parse_from(["simulate"].iter().chain(&bad)).is_err(), "{bad:?}");
        }
    }
}
