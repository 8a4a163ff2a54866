//! The parts of `cargo xtask test`, and which of them are asked for.

use anyhow::{Result, bail};

use super::programs::{ELSEWHERE, PROGRAMS, Program};
use crate::cargo::Executables;

/// Name of the part that is end-to-end tests in the lab.
const LAB: &str = "lab";

/// Parts that can be asked for by name, in the order in which they run, and what each does.
const PARTS: [(&str, &str); 10] = [
    ("tidy", "style, arrows between crates and modules: see docs/contributing.md"),
    ("supply", "licences, sources and use of dependencies"),
    ("format", "rustfmt"),
    ("clippy", "lints of all code"),
    ("docs", "links of doc comments"),
    ("unit", "tests beside the code, and examples in doc comments"),
    ("bare", "end-to-end tests on guests without an operating system"),
    ("guests", "end-to-end tests on Debian's kernel"),
    ("kmod", "end-to-end tests of the kernel module, on the lean kernel"),
    (
        LAB,
        "end-to-end tests in the lab, also where this machine's KVM would do: all, or those named beside it",
    ),
];

/// Tests and checks that are asked for: all, or some parts, and end-to-end tests by their names.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// Parts that are named.
    parts: Vec<&'static str>,
    /// Texts that the names of end-to-end tests contain; none is a part's name.
    texts: Vec<String>,
}

/// End-to-end tests of one program that are to be run.
#[derive(Debug)]
pub(super) struct Choice {
    pub(super) program: &'static Program,
    /// Each of them contains one of these; all do if there is none.
    pub(super) filters: Vec<String>,
    /// True if [`ELSEWHERE`] is among them.
    pub(super) has_elsewhere: bool,
}

/// All parts, a line each.
pub(super) fn list() -> String {
    PARTS.map(|(name, what)| format!("{name:<8}{what}\n")).concat()
}

impl Selection {
    pub(super) fn new(only: &[String]) -> Self {
        let mut selection = Self::default();
        for name in only {
            match PARTS.iter().find(|(part, _)| part == name) {
                Some((part, _)) => selection.parts.push(part),
                None => selection.texts.push(name.clone()),
            }
        }
        selection
    }

    /// True if the part `name` runs.
    pub(super) fn has(&self, name: &str) -> bool {
        self.parts.contains(&name) || self.parts.is_empty() && self.texts.is_empty()
    }

    /// True if end-to-end tests run in the lab whatever this machine can.
    pub(super) fn is_in_lab(&self) -> bool {
        self.parts.contains(&LAB)
    }

    /// True if all tests of `program` run: where it is named, or nothing is that says which tests.
    fn has_whole(&self, program: &Program) -> bool {
        let names_no_test =
            self.texts.is_empty() && !PROGRAMS.iter().any(|other| self.parts.contains(&other.name));
        self.has(program.name) || self.is_in_lab() && names_no_test
    }

    /// True if there may be end-to-end tests to run.
    pub(super) fn has_programs(&self) -> bool {
        !self.texts.is_empty() || PROGRAMS.iter().any(|program| self.has_whole(program))
    }

    /// The end-to-end tests to run, of what was built.
    pub(super) fn choose(&self, built: &Executables) -> Result<Vec<Choice>> {
        let listed = PROGRAMS.iter().map(|program| Ok((program, program.list(built)?)));
        self.choose_of(&listed.collect::<Result<Vec<_>>>()?)
    }

    fn choose_of(&self, listed: &[(&'static Program, Vec<String>)]) -> Result<Vec<Choice>> {
        let is_known =
            |text: &String| listed.iter().any(|(_, tests)| tests.iter().any(|test| test.contains(text)));
        if let Some(text) = self.texts.iter().find(|text| !is_known(text)) {
            bail!(
                "{text} is no part, and in no end-to-end test's name: \
                 `cargo xtask test --list` lists the parts"
            );
        }
        Ok(listed.iter().filter_map(|(program, tests)| self.choice(program, tests)).collect())
    }

    fn choice(&self, program: &'static Program, tests: &[String]) -> Option<Choice> {
        let is_whole = self.has_whole(program);
        let is_chosen = |test: &String| is_whole || self.texts.iter().any(|text| test.contains(text));
        let has_elsewhere = tests.iter().any(|test| test == ELSEWHERE && is_chosen(test));
        let filters = if is_whole { Vec::new() } else { self.texts.clone() };
        tests.iter().any(is_chosen).then_some(Choice { program, filters, has_elsewhere })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(only: &[&str]) -> Selection {
        Selection::new(&only.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
    }

    /// Programs chosen, with their filters, where each has two tests.
    fn chosen(only: &[&str]) -> Vec<(&'static str, String)> {
        let tests = |program: &Program| match program.name {
            "kmod" => vec!["module".to_owned(), ELSEWHERE.to_owned()],
            name => vec![format!("{name}::killed"), "clocks".to_owned()],
        };
        let listed: Vec<_> = PROGRAMS.iter().map(|program| (program, tests(program))).collect();
        let choices = selection(only).choose_of(&listed).unwrap();
        choices.iter().map(|choice| (choice.program.name, choice.filters.join(" "))).collect()
    }

    fn whole(name: &'static str) -> (&'static str, String) {
        (name, String::new())
    }

    #[test]
    fn everything_runs_where_nothing_is_asked_for() {
        let all = selection(&[]);
        assert!(PARTS.iter().all(|(part, _)| all.has(part)) && all.has_programs());
        assert_eq!(chosen(&[]), [whole("bare"), whole("guests"), whole("kmod")]);
        // In the lab is only what this machine can't run.
        assert!(!all.is_in_lab());
    }

    #[test]
    fn parts_run_as_a_whole() {
        let some = selection(&["clippy", "unit"]);
        assert!(some.has("clippy") && some.has("unit") && !some.has("tidy") && !some.has_programs());
        assert_eq!(chosen(&["clippy", "bare"]), [whole("bare")]);
        assert!(selection(&["bare"]).has_programs());
    }

    #[test]
    fn tests_are_named_by_a_part_of_their_names() {
        let killed = |name| (name, "killed".to_owned());
        assert!(!selection(&["killed"]).has("bare") && selection(&["killed"]).has_programs());
        assert_eq!(chosen(&["killed"]), [killed("bare"), killed("guests")]);
        assert_eq!(chosen(&["killed", "bare"]), [whole("bare"), killed("guests")]);
        assert_eq!(chosen(&["refuses_to_be_loaded"]).len(), 1);
        let listed: Vec<_> = PROGRAMS.iter().map(|program| (program, vec!["killed".to_owned()])).collect();
        assert!(selection(&["misspelt"]).choose_of(&listed).is_err());
    }

    #[test]
    fn the_lab_is_where_all_or_those_named_run() {
        assert!(selection(&["lab"]).is_in_lab() && selection(&["lab"]).has_programs());
        assert_eq!(chosen(&["lab"]), [whole("bare"), whole("guests"), whole("kmod")]);
        assert_eq!(chosen(&["lab", "guests"]), [whole("guests")]);
        assert_eq!(chosen(&["lab", "clocks"]).len(), 2);
    }
}
