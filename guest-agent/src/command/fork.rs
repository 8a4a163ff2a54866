//! `vmfork fork`: one fork, and in a child perhaps another program.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};

use nix::sys::termios;
use serde::Serialize;
use vmfork::{Fork, ForkError, ForkRequest, Role, Via};

use super::{CommandError, SUCCESS, chain, open, print, print_json};
use crate::cli::ForkArguments;

/// Exit status in a child.
const CHILD: u8 = 10;

/// What `--json` prints where there is no outcome.
#[derive(Debug, Serialize)]
struct Failure {
    /// The VM that this is in, where a fork was made after all.
    role: Option<String>,
    error: String,
    /// The VMM's code for its refusal, if it refused.
    code: Option<u32>,
}

pub(crate) fn run(arguments: &ForkArguments, via: Option<Via>) -> Result<ExitCode, CommandError> {
    let request = ForkRequest::new(&arguments.vm_type, arguments.count).map_err(CommandError::Request)?;
    let request = request.placed(arguments.place.into());
    let request = arguments.timeout.map_or(request, |timeout| request.with_timeout(timeout));
    drain_terminals().map_err(CommandError::Drain)?;
    let fork = match open(via).map_err(ForkError::Open).and_then(|vmm| vmm.fork(&request)) {
        Ok(fork) => fork,
        Err(error) => {
            if arguments.json {
                print_json(&Failure::from(&error))?;
            }
            return Err(CommandError::Fork(error));
        }
    };
    if let ([program, rest @ ..], Role::Child) = (arguments.command.as_slice(), fork.role) {
        return Err(execute(program, rest, &fork));
    }
    if arguments.json {
        print_json(&fork)?
    } else {
        print(&fork.to_string())?
    }
    Ok(ExitCode::from(exit_status(fork.role)))
}

/// Waits until the caller's terminals have sent what was written to them: what is still to be sent, every
/// copy would send.
fn drain_terminals() -> io::Result<()> {
    if io::stdout().is_terminal() {
        termios::tcdrain(io::stdout())?;
    }
    if io::stderr().is_terminal() {
        termios::tcdrain(io::stderr())?;
    }
    Ok(())
}

/// Becomes `program`; returns only if that fails.
fn execute(program: &OsString, arguments: &[OsString], fork: &Fork) -> CommandError {
    let source = process::Command::new(program).args(arguments).envs(fork.environment()).exec();
    CommandError::Execute { program: program.clone(), source }
}

fn exit_status(role: Role) -> u8 {
    match role {
        Role::Child => CHILD,
        Role::Parent | Role::Booted => SUCCESS,
    }
}

impl From<&ForkError> for Failure {
    fn from(error: &ForkError) -> Self {
        Self {
            role: error.role().map(|role| role.to_string()),
            error: chain(error),
            code: error.code().map(vmfork::ErrorCode::number),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmfork::{ErrorCode, IdentityError};

    use super::*;

    #[test]
    fn roles_have_an_exit_status() {
        assert_eq!(exit_status(Role::Parent), 0);
        assert_eq!(exit_status(Role::Child), 10);
    }

    #[test]
    fn a_refusal_prints_its_code() {
        let json = serde_json::to_string(&Failure::from(&ForkError::Refused(ErrorCode::Place))).unwrap();
        assert_eq!(
            json,
            r#"{"role":null,"error":"the VMM made no fork: no platform can take the children","code":10}"#
        );
    }

    #[test]
    fn an_incomplete_child_prints_that_it_is_one() {
        let source = IdentityError::MixSeed { source: std::io::Error::from_raw_os_error(libc::EPERM) };
        let json = serde_json::to_string(&Failure::from(&ForkError::Identity { role: Role::Child, source }))
            .unwrap();
        let expected = concat!(
            r#"{"role":"child","error":"this child is incomplete: "#,
            r#"the random seed can't be mixed into the kernel's pool: "#,
            r#"Operation not permitted (os error 1)","code":null}"#
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn a_command_that_fails_to_start_fails_as_in_a_shell() {
        let fails = |program: &str| {
            let program = OsString::from(program);
            let source = process::Command::new(&program).exec();
            CommandError::Execute { program, source }
        };
        assert_eq!(fails("/nonexistent").exit_status(), 127);
        assert_eq!(fails("/").exit_status(), 126);
        assert_eq!(fails("/").to_string(), "/ can't be executed");
    }
}
