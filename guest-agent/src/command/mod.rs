//! The subcommands, and how each may end.

mod advice;
pub(crate) mod detect;
pub(crate) mod fork;
pub(crate) mod status;
pub(crate) mod watch;

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};

use serde::Serialize;
use vmfork::{ForkError, OpenError, RequestError, StatusError, Via, Vmm, WatchError};

const SUCCESS: u8 = 0;
/// Exit status of a failure.
const FAILURE: u8 = 1;
/// Exit status where a command can't be executed, as in shells.
const NOT_EXECUTABLE: u8 = 126;
/// Exit status where a command can't be found, as in shells.
const NOT_FOUND: u8 = 127;

/// Why a subcommand failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// A terminal did not take its output.
    #[error("can't wait for the terminal to send its output")]
    Drain(#[source] io::Error),
    #[error("the VMM can't be reached")]
    Open(#[source] OpenError),
    #[error(transparent)]
    Status(StatusError),
    #[error(transparent)]
    Request(RequestError),
    #[error(transparent)]
    Fork(ForkError),
    #[error(transparent)]
    Watch(WatchError),
    #[error("forks can be watched by the {} alone, and not by the {via}", Via::Device)]
    NoNotices { via: Via },
    #[error("{} can't be executed", program.display())]
    Execute { program: OsString, source: io::Error },
    #[error("the result can't be written")]
    Write(#[source] io::Error),
}

impl CommandError {
    /// Exit status of the program that ends with this error.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::Execute { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
            Self::Execute { .. } => NOT_EXECUTABLE,
            _ => FAILURE,
        }
    }
}

/// Opens this route to the VMM, or the best that there is.
fn open(via: Option<Via>) -> Result<Vmm, OpenError> {
    via.map_or_else(Vmm::open, Vmm::open_via)
}

/// The error and its causes, outermost first.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// Prints one line.
fn print(line: &str) -> Result<(), CommandError> {
    writeln!(io::stdout(), "{line}").map_err(CommandError::Write)
}

/// Prints one JSON object on one line.
fn print_json(object: &impl Serialize) -> Result<(), CommandError> {
    let line = serde_json::to_string(object).map_err(|error| CommandError::Write(error.into()))?;
    print(&line)
}
