//! `cargo xtask soak`: what runs long, by hand. Each is some end-to-end tests with more of what they do.

use std::ops::ControlFlow;

use anyhow::{Context, Result, bail};

use crate::cargo::{Executables, Workspace};
use crate::cli;
use crate::kernel;
use crate::lab::INTERRUPTED;
use crate::setup;
use crate::steps::Steps;
use crate::test::{Built, PROGRAMS, Run, Times, in_lab};

/// One thing that runs long.
#[derive(Debug)]
struct Soak {
    name: &'static str,
    what: &'static str,
    /// Programs, and texts of which each of their tests' names contains one.
    tests: &'static [(&'static str, &'static [&'static str])],
    /// Variable by which the tests take a number, and the number.
    number: (&'static str, u32),
}

const ROUNDS: &str = "VMFORK_ROUNDS";

const SOAKS: [Soak; 6] = [
    Soak {
        name: "network",
        what: "connections cut, changed, stalled and unplugged at random while copies are sent",
        tests: &[(
            "bare",
            &[
                "clones::wherever_the_connection_is_cut",
                "clones::whatever_is_changed_on_the_way",
                "clones::faults::",
                "clones::partition::whenever_a_cable_is_pulled",
            ],
        )],
        number: (ROUNDS, 1000),
    },
    Soak {
        name: "killed",
        what: "platforms, etcds and processes of a fork killed at random",
        tests: &[(
            "bare",
            &[
                "clones::killed::",
                "clones::etcd::whenever_an_etcd_is_killed",
                "left_behind::whoever_is_killed",
            ],
        )],
        number: (ROUNDS, 1000),
    },
    Soak {
        name: "full",
        what: "platforms that have no more room, memory, files or processes for a copy",
        tests: &[("bare", &["clones::full::"])],
        number: (ROUNDS, 1000),
    },
    Soak {
        name: "forks",
        what: "forks of one VM, after which nothing is left behind",
        tests: &[("bare", &["left_behind::thousands_of_forks"])],
        number: ("VMFORK_TEST_FORKS", 10_000),
    },
    Soak {
        name: "clocks",
        what: "forks after which each vCPU's clocks are looked at, on Debian's kernel",
        tests: &[("guests", &["no_clock_of_any_vcpu_goes_back"])],
        number: (ROUNDS, 50),
    },
    Soak {
        name: "kmod-clocks",
        what: "the same on the lean kernel, with the module",
        tests: &[("kmod", &["no_clock_of_any_vcpu_goes_back"])],
        number: (ROUNDS, 50),
    },
];

/// Runs what is asked for, or lists what there is.
pub(crate) fn run(steps: &mut Steps, arguments: &cli::Soak) -> Result<u8> {
    if arguments.list {
        print!("{}", list());
        return Ok(0);
    }
    let soaks = arguments.names.iter().map(|name| find(name)).collect::<Result<Vec<_>>>()?;
    let runs =
        soaks.into_iter().map(|soak| soak.runs(arguments.number)).collect::<Result<Vec<_>>>()?.concat();
    let workspace = Workspace::find()?;
    steps.quiet("setup", setup::run)?;
    let etcd = setup::etcd_for_tests(steps, &workspace);
    let built =
        (steps.run("build", Executables::programs)?, steps.run("build of the tests", Executables::tests)?);
    let needs_lean = runs.iter().any(|run| run.program.of_lean_kernel);
    let lean = needs_lean.then(|| kernel::for_tests(steps, &workspace, false)).flatten();
    if needs_lean && lean.is_none() {
        bail!("the lean kernel and its module could not be built");
    }
    let mut times = Times::default();
    times.probe(&built.1);
    let built = Built::new(steps, workspace, built, lean.as_ref(), etcd).context("there are no images")?;
    let is_usable = built.is_kvm_usable(steps).context("`host-vmm check` gave no answer")?;
    let has_kvm = setup::kvm_error().is_none();
    let (here, elsewhere): (Vec<Run>, Vec<Run>) =
        runs.into_iter().partition(|run| is_usable || has_kvm && !run.program.of_linux);
    here.iter().for_each(|run| run.here(steps, &built, &times));
    let end = if elsewhere.is_empty() {
        ControlFlow::Continue(())
    } else {
        in_lab(steps, &built, &elsewhere, &times, arguments.limit.duration())
    };
    eprint!("{times}{steps}");
    Ok(if end.is_break() { INTERRUPTED } else { steps.exit_code(false) })
}

fn find(name: &str) -> Result<&'static Soak> {
    let found = SOAKS.iter().find(|soak| soak.name == name);
    found.with_context(|| format!("there is no soak {name}: `cargo xtask soak --list` lists them"))
}

/// All of them, a line each.
fn list() -> String {
    let line = |Soak { name, what, number: (variable, number), .. }: &Soak| {
        format!("{name:<13}{what} ({variable}={number})\n")
    };
    SOAKS.iter().map(line).collect()
}

impl Soak {
    /// Tests to run, with `number` in place of the table's.
    fn runs(&self, number: Option<u32>) -> Result<Vec<Run>> {
        let (variable, own) = self.number;
        let run = |(name, filters): &(&str, &[&str])| {
            let program = PROGRAMS.iter().find(|program| program.name == *name);
            let program =
                program.with_context(|| format!("{} has tests of {name}, which is no program", self.name))?;
            let filters = filters.iter().map(|&filter| filter.to_owned()).collect();
            Ok(Run { program, filters, variables: vec![(variable, number.unwrap_or(own).to_string())] })
        };
        self.tests.iter().map(run).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn each_has_a_name_of_its_own_and_tests_of_a_program() {
        let names: BTreeSet<_> = SOAKS.iter().map(|soak| soak.name).collect();
        assert_eq!(names.len(), SOAKS.len());
        assert!(SOAKS.iter().all(|soak| soak.runs(None).is_ok()));
        assert_eq!(list().lines().count(), SOAKS.len());
        assert!(find("forks").is_ok() && find("spoons").is_err());
    }

    #[test]
    fn the_tests_are_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests");
        for (name, filter) in SOAKS
            .iter()
            .flat_map(|soak| soak.tests)
            .flat_map(|(name, filters)| filters.iter().map(move |filter| (*name, *filter)))
        {
            let mut path: Vec<_> = filter.split("::").collect();
            let test = path.pop().unwrap();
            let file = root.join(name).join(path.join("/"));
            let files = [file.join("mod.rs"), file.with_extension("rs"), root.join(format!("{name}.rs"))];
            let text = files.iter().find_map(|file| fs::read_to_string(file).ok());
            let text = text.unwrap_or_else(|| panic!("{filter} is in no file of {name}"));
            assert!(text.contains(&format!("fn {test}")), "{name} has no test {filter}");
        }
    }

    #[test]
    fn another_number_takes_the_place_of_its_own() {
        let soak = find("forks").unwrap();
        let number = |given| soak.runs(given).unwrap().remove(0).variables.remove(0).1;
        assert_eq!((number(None), number(Some(3))), ("10000".to_owned(), "3".to_owned()));
    }
}
