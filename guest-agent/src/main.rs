//! The command `vmfork`: forks the VM it runs in, and says which copy it is in.

mod cli;
mod command;

use std::process::ExitCode;

use clap::Parser;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Detect { json } => command::detect::run(json),
        Command::Fork(arguments) => command::fork::run(&arguments),
        Command::Status { json } => command::status::run(json),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("vmfork: {}", command::chain(&error));
        ExitCode::from(error.exit_status())
    })
}
