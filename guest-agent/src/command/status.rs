//! `vmfork status`: who this VM is, without a fork.

use std::process::ExitCode;

use vmfork::Via;

use super::{CommandError, open, print, print_json};

pub(crate) fn run(json: bool, via: Option<Via>) -> Result<ExitCode, CommandError> {
    let vmm = open(via).map_err(CommandError::Open)?;
    let status = vmm.status().map_err(CommandError::Status)?;
    if json {
        print_json(&status)?
    } else {
        print(&status.to_string())?
    }
    Ok(ExitCode::SUCCESS)
}
