//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs the demo, the tests, the bench, or a command in the lab.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) task: Task,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// Fork a booted Linux guest with a warm application in it, and show what that took
    Demo(Demo),
    /// Check format and lints, and run all tests
    ///
    /// What fails does not keep the rest from being run. The last line counts the parts that passed, failed
    /// and were skipped. With CI=true in the environment, what is skipped counts as failed.
    Test(Test),
    /// Check style: arrows between crates and modules, columns, lengths, licences, dependencies
    ///
    /// It takes seconds. Each failure says where, what, and what to do.
    Tidy,
    /// Run what takes long: faults by the thousand, forks by the ten thousand
    ///
    /// These are end-to-end tests with more of what they do; `cargo xtask test` runs each with less of it.
    Soak(Soak),
    /// Measure what forks take on this machine's /dev/kvm, beside the floor that it sets
    ///
    /// Table, JSON and plots go to target/bench.
    Bench(Bench),
    /// Run a command in the lab: a machine, emulated by QEMU, that has a complete /dev/kvm
    ///
    /// There, host-vmm, vmfork, demo and bench are on PATH, and kernel and images in $VMFORK_ASSETS. Standard
    /// output and error both come back as standard output; the exit code comes back too. 124 is a time-out,
    /// 130 an interrupt.
    Lab(Lab),
    /// Build the guest images, and print their paths
    Image,
    /// Build the lean guest kernel and the kernel module, and print their paths
    ///
    /// The first time takes minutes; what was built is kept. Debian's compilers and sources are used.
    Kernel(Kernel),
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    #[command(flatten)]
    pub(crate) limit: Limit,
    /// Kernel that the guest boots: Debian's, or the lean one with the kernel module
    #[arg(long, value_enum, default_value_t)]
    pub(crate) kernel: Which,
    /// Passed on to the demo: --json, for example
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) arguments: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Which {
    #[default]
    Debian,
    /// As `cargo xtask kernel` builds it
    Lean,
    /// As `cargo xtask kernel --debug` does; it takes the place of the lean one
    Debug,
}

#[derive(Debug, Args)]
pub(crate) struct Kernel {
    /// Build a kernel that checks locks, memory and the like while it runs
    #[arg(long)]
    pub(crate) debug: bool,
    /// Build both a second time from scratch, elsewhere, and compare every byte
    #[arg(long)]
    pub(crate) verify: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Passed on to the bench: --quick, for example
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) arguments: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Test {
    #[command(flatten)]
    pub(crate) limit: Limit,
    /// Have things go wrong so often in each test in which they do at random
    #[arg(long, env = "VMFORK_ROUNDS")]
    pub(crate) rounds: Option<u32>,
    /// Test the kernel module with the debug kernel, which checks locks, memory and the like while it runs
    #[arg(long)]
    pub(crate) debug_kernel: bool,
    /// Run only this part, or the end-to-end tests whose names contain this; may be given again
    #[arg(long, value_name = "PART_OR_TEST")]
    pub(crate) only: Vec<String>,
    /// List the parts, and run nothing
    #[arg(long)]
    pub(crate) list: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Soak {
    /// Names of those to run
    #[arg(value_name = "NAME", required_unless_present = "list")]
    pub(crate) names: Vec<String>,
    /// List them with their numbers, and run nothing
    #[arg(long)]
    pub(crate) list: bool,
    /// Number of rounds or forks, in place of the number in the list
    #[arg(long)]
    pub(crate) number: Option<u32>,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

#[derive(Debug, Args)]
pub(crate) struct Lab {
    #[command(flatten)]
    pub(crate) limit: Limit,
    /// Kernel in $VMFORK_ASSETS; with "lean", there is that one beside Debian's, and images have the module
    #[arg(long, value_enum, default_value_t)]
    pub(crate) kernel: Which,
    /// Put a file of this machine into the lab; may be given again
    #[arg(long = "file", value_name = "HERE:THERE", value_parser = parse_file)]
    pub(crate) files: Vec<(PathBuf, String)>,
    /// Program to run, and its arguments
    #[arg(last = true, required = true)]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Limit {
    /// Seconds that one run of the lab may take
    #[arg(long, value_name = "SECONDS", default_value_t = 20 * 60)]
    timeout: u64,
}

impl Limit {
    pub(crate) fn duration(self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

fn parse_file(argument: &str) -> Result<(PathBuf, String), String> {
    match argument.split_once(':') {
        Some((here, there)) if there.starts_with('/') => Ok((here.into(), there.into())),
        _ => Err("not a path here, a colon, and an absolute path in the lab".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn demo_gets_its_arguments() {
        let Task::Demo(demo) = Cli::parse_from(["xtask", "demo", "--json", "--mem", "1G"]).task else {
            panic!()
        };
        assert_eq!(demo.arguments, ["--json", "--mem", "1G"]);
        assert_eq!(demo.kernel, Which::Debian);
        let line = ["xtask", "demo", "--kernel", "lean", "--json"];
        let Task::Demo(demo) = Cli::parse_from(line).task else { panic!() };
        assert_eq!((demo.kernel, demo.arguments), (Which::Lean, vec!["--json".to_owned()]));
    }

    #[test]
    fn tests_take_rounds_and_what_to_run() {
        let line =
            ["xtask", "test", "--rounds", "100", "--debug-kernel", "--only", "killed", "--only", "clippy"];
        let Task::Test(test) = Cli::parse_from(line).task else { panic!() };
        assert_eq!((test.rounds, test.debug_kernel), (Some(100), true));
        assert_eq!(test.only, ["killed", "clippy"]);
    }

    #[test]
    fn lab_takes_files_and_a_command() {
        let line = ["xtask", "lab", "--timeout", "5", "--file", "a.sh:/root/a.sh", "--", "sh", "-c", "true"];
        let Task::Lab(lab) = Cli::parse_from(line).task else { panic!() };
        assert_eq!(lab.files, [(PathBuf::from("a.sh"), "/root/a.sh".to_owned())]);
        assert_eq!(lab.command, ["sh", "-c", "true"]);
        assert_eq!(lab.limit.duration(), Duration::from_secs(5));
        assert!(Cli::try_parse_from(["xtask", "lab", "--file", "a.sh", "--", "true"]).is_err());
    }
}
