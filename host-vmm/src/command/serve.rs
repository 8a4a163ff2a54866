//! `host-vmm serve`: be a platform of a cluster, without a VM of its own.

use std::{process::ExitCode, sync::mpsc};

use anyhow::Context;
use base::output::say;
use platform::config::PlatformConfig;

use super::daemon::{Daemon, block_signals, on_signal, settings};
use crate::cli;

/// Runs a platform until a signal ends it.
///
/// # Errors
/// Where the configuration is not valid, or the platform can't be what it says.
pub(crate) fn serve(options: &cli::Serve) -> anyhow::Result<ExitCode> {
    let config = PlatformConfig::load(&options.config)?;
    // Before any thread starts.
    let signals = block_signals()?;
    let daemon = Daemon::start(settings(&config)?, config.api.as_deref(), Some(&config))?;
    let address = daemon.server.as_ref().and_then(platform::server::Server::address);
    let to = address.map_or_else(|| "this host".to_owned(), |address| format!("others at {address}"));
    say(format_args!("the platform {} of the cluster {} serves {to}", config.name, config.cluster));
    let (stop, stopped) = mpsc::channel();
    on_signal(signals, move |signal| {
        if stop.send(signal).is_err() {
            tracing::debug!("a signal came after the end");
        }
    })?;
    let signal = stopped.recv().context("signals can't be waited for")?;
    tracing::info!(%signal, "the platform is being stopped");
    daemon.platform.stop();
    daemon.platform.wait();
    Ok(ExitCode::SUCCESS)
}
