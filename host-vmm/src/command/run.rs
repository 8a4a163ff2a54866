//! `host-vmm run`: boot a VM, and be the platform for it and its children.

use std::{
    fs::File,
    io::stdin,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};

use crate::{
    api,
    arch::profile::Profile,
    cli, descriptors,
    kvm::Hypervisor,
    machine::{Config, End},
    platform::{Boot, ConsoleInput, Platform, Settings, Terminal, read_keys},
};

/// What every kernel command line starts with: the console; a panic ends the VM at once; there is no PCI to look for.
const CMDLINE: &str = "console=ttyS0 panic=-1 pci=off";

/// Exit code of a VM that was reset.
const RESET: u8 = 3;

/// Exit code where a signal ended the VMs: this and its number.
const SIGNALLED: u8 = 128;

/// The VMs were not stopped from outside.
const NOT_STOPPED: u8 = u8::MAX;

/// Files that a platform has open for each VM: its connection, its console, its process, its log, and what its next fork will come with,
/// which is more for a late generation.
const FILES_PER_VM: usize = 10;

/// Files that it has room for in any case.
const MIN_FILES: u64 = 256;

/// Boots a VM, and runs it and its children until all have ended.
///
/// # Errors
/// Where a file can't be used, or the VM can't be launched.
pub fn run(options: cli::Run) -> anyhow::Result<ExitCode> {
    let open =
        |what, path: &Path| File::open(path).with_context(|| format!("can't open the {what} {}", path.display()));
    let create = |path: &Path| File::create(path).with_context(|| format!("can't create {}", path.display()));
    let boot = Boot {
        config: Config { ram_bytes: options.mem, vcpus: options.cpus },
        prealloc: options.prealloc,
        name: options.name,
        kernel: open("kernel", &options.kernel)?,
        initrd: options.initrd.as_deref().map(|path| open("initrd", path)).transpose()?,
        cmdline: format!("{CMDLINE} {}", options.cmdline).trim_end().to_owned(),
        faults: options.inject_fault,
    };
    let log_dir = options.log_dir;
    let settings = Settings {
        log_dir: log_dir.clone(),
        events: options.events.as_deref().map(create).transpose()?,
        trace: options.trace.as_deref().map(create).transpose()?,
        max_vms: options.max_vms,
        ready: options.ready,
        cpu_profile: check_profile(&options.cpu_profile)?,
        prefetches: !options.no_prefetch,
        limits: options.limits,
        keep: options.keep,
    };
    // Before any thread starts: all of them are to leave the signals to the one that waits for them.
    let signals = block_signals()?;
    make_room(settings.max_vms)?;
    let platform = Platform::new(settings)?;
    let server = serve_api(&platform, options.api.as_deref())?;
    let stopped = Arc::new(AtomicU8::new(NOT_STOPPED));
    stop_on_signal(&platform, &stopped, signals)?;
    // Dropped on every way out from here, which puts the terminal back.
    let terminal = Terminal::raw().context("can't switch the terminal to raw mode")?;
    if terminal.is_interactive() {
        eprintln!("host-vmm: Ctrl-A x ends all VMs; consoles are logged in {}", log_dir.display());
    }
    let input = platform.boot(boot)?;
    read_console(&platform, &stopped, terminal.is_interactive(), input)?;
    let end = platform.wait();
    drop(server);
    drop(terminal);
    Ok(exit_code(stopped.load(Ordering::SeqCst), end))
}

/// The profile as text. Where it does not fit this host, that is told before anything is started.
fn check_profile(profile: &Profile) -> anyhow::Result<String> {
    if *profile != Profile::Host {
        profile.apply(&Hypervisor::open()?.supported_cpuid()?)?;
    }
    Ok(profile.to_text()?)
}

/// Serves the API. Where nobody has named a socket for it, the VM runs without it too.
fn serve_api(platform: &Arc<Platform>, socket: Option<&Path>) -> anyhow::Result<Option<api::Server>> {
    if let Some(path) = socket {
        let served = api::serve(platform, path);
        return served.map(Some).with_context(|| format!("can't serve the API on {}", path.display()));
    }
    let served = api::default_socket().and_then(|path| api::serve(platform, &path));
    Ok(served.inspect_err(|error| tracing::warn!(%error, "no API: `host-vmm ps` will not find these VMs")).ok())
}

fn block_signals() -> anyhow::Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM]);
    signals.thread_block().context("can't block signals")?;
    Ok(signals)
}

/// Makes room for the files that so many VMs need.
fn make_room(max_vms: usize) -> anyhow::Result<()> {
    let limit = descriptors::raise_limit().context("can't raise the limit of open files")?;
    let wanted = max_vms.saturating_mul(FILES_PER_VM) as u64;
    descriptors::make_room(&stdin(), wanted.max(MIN_FILES).min(limit)).context("can't make room for open files")
}

fn stop_on_signal(platform: &Arc<Platform>, stopped: &Arc<AtomicU8>, signals: SigSet) -> anyhow::Result<()> {
    let platform = Arc::clone(platform);
    let stopped = Arc::clone(stopped);
    let wait = move || match signals.wait() {
        Ok(signal) => {
            stopped.store(SIGNALLED + u8::try_from(signal as i32).unwrap_or(0), Ordering::SeqCst);
            platform.stop();
        }
        Err(errno) => tracing::error!(%errno, "signals can't be waited for"),
    };
    thread::Builder::new().name("signals".into()).spawn(wait).context("can't start a thread")?;
    Ok(())
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
        read_keys(interactive, |bytes| input.send(bytes).is_ok(), quit);
    };
    thread::Builder::new().name("keys".into()).spawn(read).context("can't start a thread")?;
    Ok(())
}

fn exit_code(stopped: u8, end: Option<End>) -> ExitCode {
    if stopped != NOT_STOPPED {
        return ExitCode::from(stopped);
    }
    match end {
        Some(End::PoweredOff) => ExitCode::SUCCESS,
        Some(End::Reset) => ExitCode::from(RESET),
        Some(End::Broken(why)) => {
            eprintln!("host-vmm: the VM can't go on: {why}");
            ExitCode::FAILURE
        }
        Some(End::Orphaned) | None => {
            eprintln!("host-vmm: the VM's node died");
            ExitCode::FAILURE
        }
    }
}
