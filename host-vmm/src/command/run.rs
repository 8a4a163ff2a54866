//! `host-vmm run`: boot a VM, and be the platform for it and its children.

use std::{
    fs::File,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use base::output::say;
use platform::{Boot, ConsoleInput, Platform, Settings, Terminal, config::PlatformConfig, read_keys};
use types::{ExitReason, VmShape};

use super::daemon::{self, Daemon, block_signals, create, on_signal};
use crate::cli;

/// What every kernel command line starts with: the console; a panic ends the VM at once; there is no PCI to
/// look for.
const CMDLINE: &str = "console=ttyS0 panic=-1 pci=off";

/// Exit code of a VM that was reset.
const RESET: u8 = 3;

/// Exit code where a signal ended the VMs: this and its number.
const SIGNALLED: u8 = 128;

/// The VMs were not stopped from outside.
const NOT_STOPPED: u8 = u8::MAX;

/// Boots a VM, and runs it and its children until all have ended.
///
/// # Errors
/// Where a file can't be used, or the VM can't be launched.
pub(crate) fn run(options: cli::Run) -> anyhow::Result<ExitCode> {
    let open = |what, path: &Path| {
        File::open(path).with_context(|| format!("can't open the {what} {}", path.display()))
    };
    let boot = Boot {
        config: VmShape { ram_bytes: options.mem, vcpus: options.cpus },
        prealloc: options.prealloc,
        name: options.name,
        kernel: open("kernel", &options.kernel)?,
        initrd: options.initrd.as_deref().map(|path| open("initrd", path)).transpose()?,
        cmdline: format!("{CMDLINE} {}", options.cmdline).trim_end().to_owned(),
        faults: options.inject_fault,
    };
    let config = options.config.as_deref().map(PlatformConfig::load).transpose()?;
    let settings = match &config {
        Some(config) => daemon::settings(config)?,
        None => Settings {
            log_dir: options.log_dir,
            events: options.events.as_deref().map(create).transpose()?,
            trace: options.trace.as_deref().map(create).transpose()?,
            max_vms: options.max_vms,
            max_pause: Duration::from_secs(options.max_pause),
            ready: options.ready,
            cpu_profile: daemon::check_profile(&options.cpu_profile)?,
            prefetches: !options.no_prefetch,
            limits: options.limits,
            keep: options.keep,
            image_memory: options.image_memory,
        },
    };
    let log_dir = settings.log_dir.clone();
    // Before any thread starts.
    let signals = block_signals()?;
    let socket = options.api.as_deref().or(config.as_ref().and_then(|config| config.api.as_deref()));
    let Daemon { platform, server } = Daemon::start(settings, socket, config.as_ref())?;
    let stopped = Arc::new(AtomicU8::new(NOT_STOPPED));
    on_signal(signals, {
        let (platform, stopped) = (Arc::clone(&platform), Arc::clone(&stopped));
        move |signal| {
            stopped.store(SIGNALLED + u8::try_from(signal as i32).unwrap_or(0), Ordering::SeqCst);
            platform.stop();
        }
    })?;
    // Dropped on every way out from here, which puts the terminal back.
    let terminal = Terminal::raw().context("can't switch the terminal to raw mode")?;
    if terminal.is_interactive() {
        say(format_args!("Ctrl-A x ends all VMs; consoles are logged in {}", log_dir.display()));
    }
    let input = platform.boot(boot)?;
    read_console(&platform, &stopped, terminal.is_interactive(), input)?;
    let end = platform.wait();
    drop(server);
    drop(terminal);
    Ok(exit_code(stopped.load(Ordering::SeqCst), end))
}

fn read_console(
    platform: &Arc<Platform>,
    stopped: &Arc<AtomicU8>,
    interactive: bool,
    input: ConsoleInput,
) -> anyhow::Result<()> {
    let platform = Arc::clone(platform);
    let stopped = Arc::clone(stopped);
    let read = move || {
        let quit = || {
            stopped.store(0, Ordering::SeqCst);
            platform.stop();
        };
        let mut is_told = false;
        let pass = |bytes: &[u8]| {
            // From a terminal, more may come that is for this program, and not for the VM.
            let sent = if interactive { input.try_send(bytes) } else { input.send(bytes).map(|()| true) };
            if let Ok(false) = sent
                && !std::mem::replace(&mut is_told, true)
            {
                tracing::warn!("the VM takes no more keys at present; what is typed is lost until it does");
            }
            sent.is_ok()
        };
        read_keys(interactive, pass, quit);
    };
    thread::Builder::new().name("keys".into()).spawn(read).context("can't start a thread")?;
    Ok(())
}

fn exit_code(stopped: u8, end: Option<ExitReason>) -> ExitCode {
    if stopped != NOT_STOPPED {
        return ExitCode::from(stopped);
    }
    match end {
        Some(ExitReason::PoweredOff | ExitReason::Stopped) => ExitCode::SUCCESS,
        Some(ExitReason::Reset) => ExitCode::from(RESET),
        Some(ExitReason::Broken(why) | ExitReason::SourceLost(why) | ExitReason::Unsealed(why)) => {
            say(format_args!("the VM can't go on: {why}"));
            ExitCode::FAILURE
        }
        Some(ExitReason::Orphaned) | None => {
            say(format_args!("the VM's node died"));
            ExitCode::FAILURE
        }
    }
}
