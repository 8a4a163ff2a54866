//! What can be said on the command line.

use std::ffi::OsString;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use vmfork::{Placement, Via};
use vmfork_abi::{MAX_CHILDREN, VM_TYPE_BYTES, is_vm_type};

/// Forks the VM that this runs in.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    /// Route to the VMM. Without it, the device if there is one for the caller, else the doorbell.
    #[arg(long, global = true, env = "VMFORK_VIA", value_name = "ROUTE", value_parser = via())]
    pub(crate) via: Option<Via>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say whether a fork would work from here, by which route, and if not, why.
    ///
    /// Exit status: 0 if it would, 1 if not.
    Detect {
        /// Print one JSON object on one line.
        #[arg(long)]
        json: bool,
    },
    /// Fork this VM, and say which copy this is.
    ///
    /// Exit status: 0 in the parent, 10 in a child, 1 where the fork failed or the child is incomplete, 2 for
    /// wrong usage. With a command, a child becomes that command instead: 127 if it can't be found, 126 if it
    /// can't be executed.
    Fork(ForkArguments),
    /// Say who this VM is, without a fork.
    Status {
        /// Print one JSON object on one line.
        #[arg(long)]
        json: bool,
    },
    /// Print a line for each fork that this VM comes out of from now on, as parent or as child, whoever has
    /// asked for it.
    ///
    /// In a child, this goes on as in its parent. Needs the kernel module's device.
    Watch {
        /// Print one JSON object on each line.
        #[arg(long)]
        json: bool,

        /// End after so many lines.
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct ForkArguments {
    /// How many children to make.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = count())]
    pub(crate) count: u32,

    /// VM type of the children.
    #[arg(long = "type", value_name = "TYPE", default_value = "worker", value_parser = vm_type)]
    pub(crate) vm_type: String,

    /// Where the children are to run: on this VM's platform, on others, or wherever the VMM chooses.
    #[arg(long = "where", value_name = "PLACE", value_enum, default_value_t)]
    pub(crate) place: Place,

    /// How long to wait for this caller's turn before the fork is given up, in seconds, such as 0.5. Without
    /// it, for ever.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,

    /// Print one JSON object on one line.
    #[arg(long)]
    pub(crate) json: bool,

    /// Command that a child becomes, with VMFORK_ROLE, VMFORK_INDEX, VMFORK_COUNT, VMFORK_GENERATION,
    /// VMFORK_VM_ID, VMFORK_PARENT_ID, VMFORK_NAME and VMFORK_TYPE in its environment.
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

/// Where children are to run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Place {
    Local,
    Remote,
    #[default]
    Any,
}

impl From<Place> for Placement {
    fn from(place: Place) -> Self {
        match place {
            Place::Local => Self::Local,
            Place::Remote => Self::Remote,
            Place::Any => Self::Any,
        }
    }
}

fn count() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(1..=MAX_CHILDREN.into())
}

fn via() -> impl TypedValueParser<Value = Via> {
    PossibleValuesParser::new(Via::ALL.map(Via::name)).try_map(|name| name.parse())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn vm_type(text: &str) -> Result<String, String> {
    if is_vm_type(text) {
        Ok(text.to_owned())
    } else {
        Err(format!("a VM type is 1 to {VM_TYPE_BYTES} of a-z, 0-9 and -, with no - at either end"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn fork(arguments: &[&str]) -> Result<ForkArguments, ErrorKind> {
        match Cli::try_parse_from(["vmfork", "fork"].iter().chain(arguments))
            .map_err(|error| error.kind())?
            .command
        {
            Command::Fork(arguments) => Ok(arguments),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_fork_makes_one_worker_unless_told_otherwise() {
        let default = fork(&[]).unwrap();
        assert_eq!((default.count, default.vm_type.as_str(), default.json), (1, "worker", false));
        assert!(default.command.is_empty());
        assert_eq!(default.place, Place::Any);
        assert_eq!(fork(&["--where", "remote"]).unwrap().place, Place::Remote);
        let told = fork(&["--count", "4", "--type", "web", "--json", "--", "sh", "-c", "true"]).unwrap();
        assert_eq!((told.count, told.vm_type.as_str(), told.json), (4, "web", true));
        assert_eq!(told.command, ["sh", "-c", "true"]);
    }

    #[test]
    fn a_fork_waits_for_its_turn_for_ever_or_for_a_fraction_of_a_second() {
        assert_eq!(fork(&[]).unwrap().timeout, None);
        assert_eq!(fork(&["--timeout", "0.25"]).unwrap().timeout, Some(Duration::from_millis(250)));
        assert_eq!(fork(&["--timeout", "0"]).unwrap().timeout, Some(Duration::ZERO));
    }

    #[test]
    fn a_route_can_be_named_before_the_command_and_behind() {
        for arguments in [["--via", "device", "status"], ["status", "--via", "device"]] {
            let cli = Cli::try_parse_from(["vmfork"].iter().chain(&arguments)).unwrap();
            assert_eq!(cli.via, Some(Via::Device));
        }
    }

    #[test]
    fn what_no_vmm_would_take_is_wrong_usage() {
        for wrong in
            [["--count", "0"], ["--count", "1025"], ["--count", "-1"], ["--type", "Web"], ["--type", "-a"]]
        {
            assert!(fork(&wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(fork(&["--count", "1025"]).unwrap_err(), ErrorKind::ValueValidation);
        for wrong in [["--timeout", "soon"], ["--timeout", "NaN"], ["--timeout", "1e30"]] {
            assert_eq!(fork(&wrong).unwrap_err(), ErrorKind::ValueValidation, "{wrong:?}");
        }
        assert_eq!(fork(&["--via", "agent"]).unwrap_err(), ErrorKind::InvalidValue);
        assert!(fork(&["--timeout=-1"]).is_err());
        assert!(fork(&["--count", "1024"]).is_ok());
        assert!(fork(&["sh"]).is_err(), "a command needs -- in front of it");
    }
}
