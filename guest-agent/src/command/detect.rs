//! `vmfork detect`: whether a fork would work from here, and by which route. Each is followed step by step up
//! to the first that fails.

use std::process::ExitCode;

use serde::Serialize;
use vmfork::{Fork, ForkError, Interface, OpenError, Via, Vmm, features};

use super::advice::advice;
use super::{CommandError, FAILURE, chain, open, print, print_json};

/// What was found out; `None` for what was not reached.
#[derive(Debug, Default, Serialize)]
struct Report {
    /// Whether a fork would work from here.
    works: bool,
    abi_version: Option<u32>,
    control_page_gpa: Option<u64>,
    doorbell_port: Option<u16>,
    /// Names of the features that the VMM has shown the guest at its boot, and behind them, in hexadecimal,
    /// the bits that have none.
    features: Option<Vec<String>>,
    /// Whether this caller can map the control page through /dev/mem.
    dev_mem: Option<bool>,
    /// Whether this caller can have the doorbell port.
    ioperm: Option<bool>,
    vm: Option<Fork>,
    /// The routes that were looked at, best first.
    routes: Vec<Looked>,
    /// The one that a fork takes.
    route: Option<Via>,
    /// Why that one.
    reason: Option<String>,
    /// Why a fork would not work.
    error: Option<String>,
    /// What to do about it.
    advice: Option<&'static str>,
}

/// What was found out about one route.
#[derive(Debug, Serialize)]
struct Looked {
    route: Via,
    /// Whether a fork would work by it.
    works: bool,
    /// What it lacks.
    error: Option<String>,
    /// What to do about it.
    advice: Option<&'static str>,
}

/// How far a route can be gone without a fork.
struct Followed {
    via: Via,
    vm: Option<Fork>,
    end: Result<(), CommandError>,
}

pub(crate) fn run(json: bool, via: Option<Via>) -> Result<ExitCode, CommandError> {
    let routes =
        Via::ALL.into_iter().filter(|&route| via.is_none_or(|via| via == route)).map(Followed::of).collect();
    let report = Report::of(via, Vmm::detect().ok(), routes, open(via).map(|vmm| vmm.via()));
    if json {
        print_json(&report)?
    } else {
        print_lines(&report)?
    }
    Ok(if report.works { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

impl Followed {
    /// Goes as far towards a fork as can be gone without one.
    fn of(via: Via) -> Self {
        let mut vm = None;
        let mut follow = || {
            let vmm = Vmm::open_via(via).map_err(CommandError::Open)?;
            vm = Some(vmm.status().map_err(CommandError::Status)?);
            vmm.check().map_err(CommandError::Fork)
        };
        let end = follow();
        Self { via, vm, end }
    }

    fn looked(&self) -> Looked {
        let error = self.end.as_ref().err();
        let what = |error: &CommandError| match error {
            CommandError::Open(error) => chain(error),
            error => chain(error),
        };
        Looked {
            route: self.via,
            works: error.is_none(),
            error: error.map(what),
            advice: error.and_then(advice),
        }
    }
}

impl Report {
    /// The report where these `routes` were followed, and a fork `takes` one of them.
    fn of(
        asked: Option<Via>,
        interface: Option<Interface>,
        routes: Vec<Followed>,
        takes: Result<Via, OpenError>,
    ) -> Self {
        let end_of = |via| routes.iter().find(|followed| followed.via == via).map(|followed| &followed.end);
        let (dev_mem, ioperm) = end_of(Via::Doorbell).map_or((None, None), parts_of_doorbell);
        let mut report = Self {
            abi_version: interface.map(|interface| interface.abi_version),
            control_page_gpa: interface.map(|interface| interface.control_page_gpa),
            doorbell_port: interface.map(|interface| interface.doorbell_port),
            features: interface.map(|interface| feature_names(interface.features)),
            dev_mem,
            ioperm,
            routes: routes.iter().map(Followed::looked).collect(),
            ..Self::default()
        };
        let taken = match takes {
            Ok(via) => via,
            Err(error) => {
                report.fail(&CommandError::Open(error));
                return report;
            }
        };
        report.route = Some(taken);
        report.reason = Some(reason(asked, taken, end_of(Via::Device)));
        if let Some(Followed { vm, end, .. }) = routes.into_iter().find(|followed| followed.via == taken) {
            report.vm = vm;
            report.works = end.is_ok();
            end.err().iter().for_each(|error| report.fail(error));
        }
        report
    }

    fn fail(&mut self, error: &CommandError) {
        self.error = Some(chain(error));
        self.advice = advice(error);
    }
}

/// The features of a word as texts.
fn feature_names(word: u64) -> Vec<String> {
    let unknown = Some(features::unknown(word)).filter(|&bits| bits != 0);
    let unknown = unknown.map(|bits| format!("{bits:#x}"));
    features::names(word).map(str::to_owned).chain(unknown).collect()
}

/// Whether /dev/mem and the port can be used, as far as that is known from where the doorbell's route ends.
fn parts_of_doorbell(end: &Result<(), CommandError>) -> (Option<bool>, Option<bool>) {
    match end {
        Ok(()) => (Some(true), Some(true)),
        Err(CommandError::Fork(ForkError::Port { .. })) => (Some(true), Some(false)),
        Err(CommandError::Fork(_)) => (Some(true), Some(true)),
        Err(CommandError::Open(OpenError::OpenMemory { .. } | OpenError::MapPage { .. })) => {
            (Some(false), None)
        }
        Err(CommandError::Open(OpenError::Header { .. }) | CommandError::Status(_)) => (Some(true), None),
        Err(_) => (None, None),
    }
}

/// Why a fork takes this route, where the device's one ends so.
fn reason(asked: Option<Via>, taken: Via, device: Option<&Result<(), CommandError>>) -> String {
    match (asked, taken, device) {
        (Some(_), ..) => "it was asked for".to_owned(),
        (None, Via::Doorbell, Some(Err(CommandError::Open(error)))) => error.to_string(),
        _ => "it is there, and open to this caller".to_owned(),
    }
}

fn print_lines(report: &Report) -> Result<(), CommandError> {
    if let (Some(version), Some(gpa), Some(port)) =
        (report.abi_version, report.control_page_gpa, report.doorbell_port)
    {
        print(&format!("VMM: ABI version {version}, control page at {gpa:#x}, doorbell at port {port:#x}"))?;
    }
    match report.features.as_deref() {
        None => {}
        Some([]) => print("features: the VMM does not say")?,
        Some(names) => print(&format!("features: {}", names.join(", ")))?,
    }
    for Looked { route, error, .. } in &report.routes {
        match error {
            None => print(&format!("{route}: usable"))?,
            Some(error) => print(&format!("{route}: not usable: {error}"))?,
        }
    }
    if let Some(vm) = &report.vm {
        print(&format!("this VM: {vm}"))?;
    }
    if let (Some(route), Some(reason)) = (report.route, &report.reason) {
        print(&format!("a fork takes the {route}: {reason}"))?;
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

#[cfg(test)]
mod tests {
    use std::io;

    use vmfork::DetectError;

    use super::*;

    fn refused(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    fn followed(via: Via, end: Result<(), CommandError>) -> Followed {
        Followed { via, vm: None, end }
    }

    fn no_device() -> Followed {
        followed(Via::Device, Err(CommandError::Open(OpenError::NoDevice { source: refused(libc::ENOENT) })))
    }

    fn forbidden() -> OpenError {
        OpenError::DeviceForbidden { source: refused(libc::EACCES) }
    }

    #[test]
    fn without_a_module_the_doorbell_is_taken_and_the_report_says_why() {
        let report =
            Report::of(None, None, vec![no_device(), followed(Via::Doorbell, Ok(()))], Ok(Via::Doorbell));
        assert!(report.works && report.error.is_none());
        assert_eq!((report.dev_mem, report.ioperm), (Some(true), Some(true)));
        assert_eq!(
            (report.route, report.reason.as_deref()),
            (Some(Via::Doorbell), Some("there is no /dev/vmfork"))
        );
        let [device, doorbell] = report.routes.as_slice() else { panic!("two routes: {report:?}") };
        let error = "there is no /dev/vmfork: No such file or directory (os error 2)";
        assert_eq!((device.works, device.error.as_deref(), doorbell.works), (false, Some(error), true));
    }

    #[test]
    fn features_are_told_by_name_and_unknown_ones_by_their_bits() {
        let told = |features| {
            let interface =
                Interface { abi_version: 1, control_page_gpa: 0xd000_0000, doorbell_port: 0x560, features };
            Report::of(None, Some(interface), vec![no_device()], Ok(Via::Device)).features.unwrap()
        };
        assert_eq!(
            told(features::COPIES | features::ASKER | 3 << 62),
            ["copies", "asker", "0xc000000000000000"]
        );
        assert_eq!(told(features::LOCATION), ["location"]);
        assert_eq!(told(1 << 63), ["0x8000000000000000"]);
        // As in a guest that was booted before there was this word.
        assert!(told(0).is_empty());
        assert_eq!(Report::of(None, None, vec![no_device()], Ok(Via::Device)).features, None);
    }

    #[test]
    fn with_a_module_the_device_is_taken_whatever_the_doorbell_lacks() {
        let privilege = ForkError::Port { port: 0x560, source: refused(libc::EPERM) };
        let routes =
            vec![followed(Via::Device, Ok(())), followed(Via::Doorbell, Err(CommandError::Fork(privilege)))];
        let report = Report::of(None, None, routes, Ok(Via::Device));
        assert!(report.works && report.error.is_none() && report.advice.is_none());
        assert_eq!((report.dev_mem, report.ioperm), (Some(true), Some(false)));
        assert_eq!(report.reason.as_deref(), Some("it is there, and open to this caller"));
    }

    #[test]
    fn whoever_may_use_neither_is_told_of_the_group() {
        let memory = OpenError::OpenMemory { source: refused(libc::EACCES) };
        let routes = vec![
            followed(Via::Device, Err(CommandError::Open(forbidden()))),
            followed(Via::Doorbell, Err(CommandError::Open(memory))),
        ];
        let report = Report::of(None, None, routes, Err(forbidden()));
        assert!(!report.works && report.route.is_none());
        assert_eq!((report.dev_mem, report.ioperm), (Some(false), None));
        let error = "the VMM can't be reached: /dev/vmfork is for root and the members of its group: \
                     Permission denied (os error 13)";
        assert_eq!(report.error.as_deref(), Some(error));
        assert!(report.advice.unwrap().contains("group"));
    }

    #[test]
    fn a_route_that_is_asked_for_is_the_only_one() {
        let routes =
            vec![followed(Via::Doorbell, Err(CommandError::Open(OpenError::Detect(DetectError::NoVmm))))];
        let report =
            Report::of(Some(Via::Doorbell), None, routes, Err(OpenError::Detect(DetectError::NoVmm)));
        assert_eq!((report.works, report.routes.len(), report.dev_mem), (false, 1, None));
        let report =
            Report::of(Some(Via::Device), None, vec![followed(Via::Device, Ok(()))], Ok(Via::Device));
        assert_eq!((report.reason.as_deref(), report.dev_mem), (Some("it was asked for"), None));
    }
}
