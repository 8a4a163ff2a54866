//! What can be said on the command line.

use std::ffi::OsString;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use vmfork::Placement;
use vmfork_abi::{MAX_CHILDREN, VM_TYPE_BYTES, is_vm_type};

/// Forks the VM that this runs in.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say whether a fork would work from here, and if not, why.
    ///
    /// Exit status: 0 if it would, 1 if not.
    Detect {
        /// Print one JSON object on one line.
        #[arg(long)]
        json: bool,
    },
    /// Fork this VM, and say which copy this is.
    ///
    /// Exit status: 0 in the parent, 10 in a child, 1 where the fork failed or the child is incomplete, 2 for wrong
    /// usage. With a command, a child becomes that command instead: 127 if it can't be found, 126 if it can't be executed.
    Fork(ForkArguments),
    /// Say who this VM is, without a fork.
    Status {
        /// Print one JSON object on one line.
        #[arg(long)]
        json: bool,
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

    /// Print one JSON object on one line.
    #[arg(long)]
    pub(crate) json: bool,

    /// Command that a child becomes, with VMFORK_ROLE, VMFORK_INDEX, VMFORK_COUNT, VMFORK_GENERATION, VMFORK_VM_ID,
    /// VMFORK_PARENT_ID, VMFORK_NAME and VMFORK_TYPE in its environment.
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
        match Cli::try_parse_from(["vmfork", "fork"].iter().chain(arguments)).map_err(|error| error.kind())?.command {
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
    fn what_no_vmm_would_take_is_wrong_usage() {
        for wrong in [["--count", "0"], ["--count", "1025"], ["--count", "-1"], ["--type", "Web"], ["--type", "-a"]] {
            assert!(fork(&wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(fork(&["--count", "1025"]).unwrap_err(), ErrorKind::ValueValidation);
        assert!(fork(&["--count", "1024"]).is_ok());
        assert!(fork(&["sh"]).is_err(), "a command needs -- in front of it");
    }
}
