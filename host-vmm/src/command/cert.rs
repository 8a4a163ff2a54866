//! `host-vmm cert`: the certificates of a cluster.

use std::process::ExitCode;

use anyhow::Context;
use cluster::{
    certificates,
    principal::{Principal, Role},
};

use crate::cli::CertCommand;

/// Makes a CA, or issues a certificate, and says what to do with the files.
///
/// # Errors
/// Where a file can't be read or written, or is there already.
pub(crate) fn cert(command: &CertCommand) -> anyhow::Result<ExitCode> {
    match command {
        CertCommand::Init { dir, force } => {
            let ca = certificates::init(dir, *force)?;
            println!("{}  the cluster's CA, until {}", ca.certificate.display(), ca.until);
            println!("{}  its key: keep it here, for it makes members of the cluster", ca.key.display());
            println!("\nNext, for each platform: host-vmm cert issue NAME --dir {}", dir.display());
        }
        CertCommand::Issue { name, dir, operator, days, force } => {
            let role = if *operator { Role::Operator } else { Role::Platform };
            let principal = Principal::new(name, role).context("no such name can be given")?;
            let issued = certificates::issue(dir, &principal, *days, *force)?;
            println!(
                "{}  the certificate of {principal}, until {}",
                issued.certificate.display(),
                issued.until
            );
            println!("{}  its key", issued.key.display());
            println!("\nCopy to {principal}: these two, and {}", certificates::ca_certificate(dir).display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
