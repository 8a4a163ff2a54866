//! `host-vmm check`: what works on this host, in plain words.

use std::process::ExitCode;

use base::error::chain;
use serde::Serialize;
use vmm::kvm::probe::{self, Findings, ProbeError};

use super::table::json;
use crate::cli;

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Linux guests can run and fork here.
    usable: bool,
    /// Guest kernel code: instructions a second; null where it can't run, or not fast enough.
    kernel_code: Option<u64>,
    /// Guest user code, likewise.
    user_code: Option<u64>,
    /// A guest kernel can fork by hypercall.
    hypercall: bool,
    /// Why not even a small guest could be tried.
    error: Option<String>,
    /// What to do.
    advice: &'static str,
}

impl Report {
    fn new(probed: Result<Findings, ProbeError>) -> Self {
        match probed {
            Ok(findings) => {
                let Findings { kernel_code, user_code, hypercall, .. } = findings;
                let usable = findings.is_usable();
                let advice = match (usable, user_code, hypercall) {
                    (true, _, true) => "Linux guests run here.",
                    (true, _, false) => {
                        "Linux guests run here, and fork by the port; for the hypercall, a newer host kernel is needed (5.14 or later)."
                    }
                    (false, Some(_), _) => EMULATED,
                    (false, None, _) => {
                        "This KVM runs no guest code. Load kvm_intel or kvm_amd, and switch on virtualisation in the firmware, or nested virtualisation in the host of this virtual machine."
                    }
                };
                Self { usable, kernel_code, user_code, hypercall, error: None, advice }
            }
            Err(error) => Self {
                usable: false,
                kernel_code: None,
                user_code: None,
                hypercall: false,
                error: Some(chain(&error)),
                advice: "Guests need KVM: a processor with VT-x or AMD-V, switched on in the firmware, the kernel modules kvm and kvm_intel or kvm_amd, and access to /dev/kvm. In a virtual machine, its host has to allow nested virtualisation. Until then, `cargo xtask lab` runs guests in software.",
            },
        }
    }

    fn print(&self) {
        if let Some(error) = &self.error {
            println!("{:<18} {error}", "/dev/kvm");
        } else {
            let speed = |speed: Option<u64>| match speed {
                Some(speed) => format!("runs, {} million instructions a second", speed / 1_000_000),
                None => "does not run, or takes minutes for what should take a second".to_owned(),
            };
            println!("{:<18} {}", "guest kernel code", speed(self.kernel_code));
            println!("{:<18} {}", "guest user code", speed(self.user_code));
            println!(
                "{:<18} {}",
                "hypercall",
                if self.hypercall { "reaches the VMM" } else { "does not reach the VMM" }
            );
        }
        println!("\n{}", self.advice);
    }
}

const EMULATED: &str = "This KVM has no hardware virtualisation behind it: it runs guest user code, but emulates guest kernel code, too slowly to boot anything. Run on a host with VT-x or AMD-V (in a virtual machine: with nested virtualisation), or in software, by `cargo xtask lab`.";

/// Probes /dev/kvm and tells what works. The exit code says whether Linux guests run here.
///
/// # Errors
/// Where the report can't be printed.
pub(crate) fn check(options: &cli::Check) -> anyhow::Result<ExitCode> {
    let report = Report::new(probe::probe());
    if options.json {
        println!("{}", json(&report)?);
    } else {
        report.print();
    }
    Ok(if report.usable { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
