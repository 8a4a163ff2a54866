//! The command `vmfork`: forks the VM it runs in, and says which copy it is in.

mod cli;
mod command;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let Cli { via, command } = Cli::parse();
    let outcome = match command {
        Command::Detect { json } => command::detect::run(json, via),
        Command::Fork(arguments) => command::fork::run(&arguments, via),
        Command::Status { json } => command::status::run(json, via),
        Command::Watch { json, count } => command::watch::run(json, count, via),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("vmfork: {}", command::chain(&error));
        ExitCode::from(error.exit_status())
    })
}
