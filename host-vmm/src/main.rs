//! `host-vmm`: parse, run, and print what went wrong.
//!
//! - [`cli`]: what an operator can ask for.
//! - [`command`]: how it is done, a file for each operation.
//!
//! What they do it with is in the crates under `crates`, of which each uses those above it only:
//!
//! ```text
//!  base          clocks, descriptors, locks, text, output
//!  types         words that all processes share
//!  vmm  cluster  one VM; several platforms
//!  capsule  api  a captured VM as bytes; the API's types and client
//!  node          the process that holds one VM
//!  platform      one host
//! ```

#![forbid(unsafe_code)]

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use anyhow::Context;
use base::{
    output::{self, Messages, NodeMessages},
    text,
};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::EnvFilter;

mod cli;
mod command;

use cli::{Cli, Command};

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let result = ignore_file_limit().and_then(|()| log(&command)).and_then(|()| run(command));
    let code = result.unwrap_or_else(|error| {
        output::say(format_args!("{}", text::lines(&format!("{error:#}"))));
        ExitCode::FAILURE
    });
    output::end_messages();
    code
}

/// Has logs written to standard error. Nobody waits for who reads that: neither a platform and its VMs, nor
/// nodes, whose standard error the platform passes on.
fn log(command: &Command) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("HOST_VMM_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    // What it would say of messages that are left out would be written past all this.
    let logs = tracing_subscriber::fmt().with_env_filter(filter).log_internal_errors(false);
    if matches!(command, Command::Zygote(_)) {
        // It has one thread. The platform escapes what comes from it: colours too.
        logs.with_ansi(false).with_writer(|| NodeMessages).init();
        return Ok(());
    }
    output::take_messages().context("can't set up standard error")?;
    logs.with_ansi(io::stderr().is_terminal()).with_writer(|| Messages).init();
    Ok(())
}

/// Has a file that may not become longer be an error for whoever writes it, instead of the end of a platform
/// with all its VMs.
fn ignore_file_limit() -> anyhow::Result<()> {
    SigSet::from(Signal::SIGXFSZ).thread_block().context("can't block SIGXFSZ")
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(options) => command::run(*options),
        Command::Serve(options) => command::serve(&options),
        Command::Ps(options) => command::ps(&options),
        Command::Tree(options) => command::tree(&options),
        Command::Fork(options) => command::fork(&options),
        Command::Stop(options) => command::stop(&options),
        Command::Logs(options) => command::logs(&options),
        Command::Image(options) => command::image(&options.command),
        Command::Spawn(options) => command::spawn(&options),
        Command::Clone(options) => command::clone(&options),
        Command::Platforms(options) => command::platforms(&options),
        Command::Place(options) => command::place(&options),
        Command::Cert(options) => command::cert(&options.command),
        Command::Check(options) => command::check(&options),
        Command::CpuProfile(options) => command::cpu_profile(&options),
        Command::Zygote(options) => node::zygote::main(&options.cpu_profile).map(|()| ExitCode::SUCCESS),
    }
}
