//! `host-vmm`: parse, run, and print what went wrong.

use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use host_vmm::{
    cli::{Cli, Command},
    command, node,
};
use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("HOST_VMM_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = ignore_file_limit().and_then(|()| run(Cli::parse().command));
    result.unwrap_or_else(|error| {
        eprintln!("host-vmm: {error:#}");
        ExitCode::FAILURE
    })
}

/// Has a file that may not become longer be an error for whoever writes it, instead of the end of a platform with all its VMs.
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
