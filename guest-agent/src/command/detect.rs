//! `vmfork detect`: whether a fork would work from here, found out step by step up to the first that fails.

use std::io::{self, ErrorKind};
use std::process::ExitCode;

use serde::Serialize;
use vmfork::{DetectError, Fork, ForkError, Interface, OpenError, Vmm};

use super::{CommandError, FAILURE, chain, print, print_json};

/// What was found out; `None` for what was not reached.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Whether a fork would work from here.
    works: bool,
    abi_version: Option<u32>,
    control_page_gpa: Option<u64>,
    doorbell_port: Option<u16>,
    /// Whether this caller can map the control page through /dev/mem.
    dev_mem: Option<bool>,
    /// Whether this caller can have the doorbell port.
    ioperm: Option<bool>,
    vm: Option<Fork>,
    /// Why a fork would not work.
    error: Option<String>,
    /// What to do about it.
    advice: Option<&'static str>,
}

pub(crate) fn run(json: bool) -> Result<ExitCode, CommandError> {
    let mut report = Report::default();
    match examine(&mut report) {
        Ok(()) => report.works = true,
        Err(error) => {
            report.advice = advice(&error);
            report.error = Some(chain(&error));
        }
    }
    if json {
        print_json(&report)?
    } else {
        print_lines(&report)?
    }
    Ok(if report.works { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

/// Goes as far towards a fork as can be gone without one.
fn examine(report: &mut Report) -> Result<(), CommandError> {
    let interface = Vmm::detect().map_err(|error| CommandError::Open(OpenError::Detect(error)))?;
    let Interface { abi_version, control_page_gpa, doorbell_port } = interface;
    report.abi_version = Some(abi_version);
    report.control_page_gpa = Some(control_page_gpa);
    report.doorbell_port = Some(doorbell_port);

    let opened = Vmm::open();
    report.dev_mem = Some(!matches!(opened, Err(OpenError::OpenMemory { .. } | OpenError::MapPage { .. })));
    let vmm = opened.map_err(CommandError::Open)?;
    report.vm = Some(vmm.status().map_err(CommandError::Status)?);

    let checked = vmm.check();
    report.ioperm = Some(!matches!(checked, Err(ForkError::Port { .. })));
    checked.map_err(CommandError::Fork)
}

/// What the caller can do about `error`, where there is something.
fn advice(error: &CommandError) -> Option<&'static str> {
    const RAW_IO: &str = "run this as root or with CAP_SYS_RAWIO; under kernel lockdown (Secure Boot) nobody may";
    let forbidden = |source: &io::Error| source.kind() == ErrorKind::PermissionDenied;
    Some(match error {
        CommandError::Open(OpenError::Detect(DetectError::NoVmm)) => "run this in a VM that host-vmm has launched",
        CommandError::Open(OpenError::Detect(DetectError::Version { .. }) | OpenError::Header { .. }) => {
            "use the vmfork and the host-vmm of one release"
        }
        CommandError::Open(OpenError::OpenMemory { source }) if source.kind() == ErrorKind::NotFound => {
            "mount devtmpfs on /dev; the kernel must be built with CONFIG_DEVMEM"
        }
        CommandError::Open(OpenError::OpenMemory { source } | OpenError::MapPage { source, .. })
        | CommandError::Fork(ForkError::Port { source, .. })
            if forbidden(source) =>
        {
            RAW_IO
        }
        CommandError::Fork(ForkError::Port { .. }) => "the kernel must be built with CONFIG_X86_IOPL_IOPERM",
        CommandError::Fork(ForkError::Privilege(_)) => "run this as root or with the capabilities named",
        CommandError::Fork(ForkError::OpenRandom { .. }) => "mount devtmpfs on /dev",
        _ => return None,
    })
}

fn print_lines(report: &Report) -> Result<(), CommandError> {
    let usable = |usable| if usable { "usable" } else { "not usable" };
    if let (Some(version), Some(gpa), Some(port)) = (report.abi_version, report.control_page_gpa, report.doorbell_port)
    {
        print(&format!("VMM: ABI version {version}, control page at {gpa:#x}, doorbell at port {port:#x}"))?;
    }
    if let Some(dev_mem) = report.dev_mem {
        print(&format!("/dev/mem: {}", usable(dev_mem)))?;
    }
    if let Some(vm) = &report.vm {
        print(&format!("this VM: {vm}"))?;
    }
    if let Some(ioperm) = report.ioperm {
        print(&format!("ioperm: {}", usable(ioperm)))?;
    }
    if report.works {
        return print("a fork would work from here");
    }
    let reason = report.error.as_deref().unwrap_or_default();
    eprintln!("vmfork: a fork would not work from here: {reason}");
    if let Some(advice) = report.advice {
        eprintln!("vmfork: {advice}");
    }
    Ok(())
}
