//! Times of tests, and the slowest ones.
//!
//! The times are libtest's own (`--report-time`), which it offers on nightly toolchains; `RUSTC_BOOTSTRAP` in
//! a test program's environment has it offer them on stable ones too. The variable is set where test programs
//! run and nowhere else: it would change how packages are built. To tell times by when lines arrive would
//! need one test at a time, and guards in the tests themselves would be a line in each of hundreds. Where a
//! libtest takes neither, tests run without times.

use std::fmt;
use std::io::{self, IsTerminal, Read, Stdout, Write, stdout};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use crate::cargo::Executables;

/// Arguments that have a test program tell times, and the variable without which it refuses them.
const REPORT: [&str; 2] = ["-Zunstable-options", "--report-time"];
const ALLOW: (&str, &str) = ("RUSTC_BOOTSTRAP", "1");

/// Number of tests that are shown.
const SLOWEST: usize = 10;

/// Times of all tests so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Times {
    /// True if test programs tell times.
    are_told: bool,
    tests: Arc<Mutex<Vec<Test>>>,
}

#[derive(Debug, Clone, PartialEq)]
struct Test {
    /// Step in which it ran.
    step: &'static str,
    name: String,
    seconds: f64,
}

impl Times {
    /// Finds out by one of the test programs whether all of them tell times.
    pub(crate) fn probe(&mut self, built: &Executables) {
        self.are_told = built.first_test().is_some_and(tells_times);
    }

    /// Arguments for a test program.
    pub(crate) fn arguments(&self) -> &'static [&'static str] {
        if self.are_told { &REPORT } else { &[] }
    }

    /// Variable that a test program's environment needs for that.
    pub(crate) fn variable(&self) -> Option<(&'static str, &'static str)> {
        self.are_told.then_some(ALLOW)
    }

    /// Runs a command that runs tests, shows what it prints, and notes their times.
    pub(crate) fn watch(&self, step: &'static str, command: &mut Command) -> io::Result<ExitStatus> {
        if stdout().is_terminal() {
            command.args(["--color", "always"]);
        }
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut from = child.stdout.take().ok_or_else(|| io::Error::other("a pipe is missing"))?;
        let mut to = self.output(step);
        let mut buffer = [0; 4096];
        loop {
            match from.read(&mut buffer)? {
                0 => return child.wait(),
                length => to.write_all(&buffer[..length])?,
            }
            to.flush()?;
        }
    }

    /// Standard output, on which the tests of `step` are noted.
    pub(crate) fn output(&self, step: &'static str) -> Output<Stdout> {
        Output { shown: stdout(), step, line: Vec::new(), times: self.clone() }
    }

    fn note(&self, step: &'static str, line: &str) {
        if let Some((name, seconds)) = parse(line) {
            let mut tests = self.tests.lock().unwrap_or_else(PoisonError::into_inner);
            tests.push(Test { step, name: name.to_owned(), seconds });
        }
    }
}

/// The slowest tests, a line each, slowest first; nothing where no test was timed.
impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut tests = self.tests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tests.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        if !tests.is_empty() {
            writeln!(f, "slowest tests:")?;
        }
        tests.iter().take(SLOWEST).try_for_each(|Test { step, name, seconds }| {
            writeln!(f, "{:>17}  {step}: {name}", format!("{seconds:.1} s"))
        })
    }
}

/// Hands on what test programs print, and notes their times.
#[derive(Debug)]
pub(crate) struct Output<W> {
    shown: W,
    step: &'static str,
    /// Bytes of the last line, which has not ended.
    line: Vec<u8>,
    times: Times,
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.shown.write(bytes)?;
        for &byte in &bytes[..written] {
            if byte == b'\n' {
                self.times.note(self.step, &String::from_utf8_lossy(&self.line));
                self.line.clear();
            } else {
                self.line.push(byte);
            }
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.shown.flush()
    }
}

fn tells_times(program: &Path) -> bool {
    let mut command = Command::new(program);
    command.args(REPORT).arg("--list").env(ALLOW.0, ALLOW.1).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Name and time in a line such as `test forked::deep ... ok <1.250s>`.
fn parse(line: &str) -> Option<(&str, f64)> {
    let (name, outcome) = line.trim_end().strip_prefix("test ")?.split_once(" ... ")?;
    let (_, time) = outcome.strip_suffix("s>")?.rsplit_once('<')?;
    Some((name, time.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn a_line_has_a_name_and_a_time() {
        assert_eq!(parse("test forked::deep ... ok <1.250s>"), Some(("forked::deep", 1.25)));
        assert_eq!(parse("test a - should panic ... FAILED <0.001s>\r"), Some(("a - should panic", 0.001)));
        assert_eq!(parse("test a ... \u{1b}[32mok\u{1b}(B\u{1b}[m <12.000s>"), Some(("a", 12.0)));
        for line in
            ["test a ... ignored", "test a ... ok", "running 3 tests", "test result: ok. 3 passed <1s>"]
        {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn the_slowest_come_first() {
        let times = Times::default();
        assert_eq!(times.to_string(), "");
        let mut output = Output { shown: Vec::new(), step: "bare", line: Vec::new(), times: times.clone() };
        // Lines come in pieces.
        output.write_all(b"running 12 tests\ntest slow ... ok <2").unwrap();
        output.write_all(b".000s>\ntest slowest ... ok <31.040s>\n").unwrap();
        for number in 0..10 {
            writeln!(output, "test t{number} ... ok <0.{number}00s>").unwrap();
        }
        assert!(output.shown.starts_with(b"running 12 tests\ntest slow ... ok <2.000s>\n"));
        let shown = times.to_string();
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines.len(), 1 + SLOWEST);
        assert_eq!(lines[1..3], ["           31.0 s  bare: slowest", "            2.0 s  bare: slow"]);
    }

    #[test]
    fn a_test_program_of_this_toolchain_tells_times() {
        // This program is one.
        let program = env::current_exe().unwrap();
        let times = Times { are_told: tells_times(&program), ..Times::default() };
        let mut command = Command::new(&program);
        command.args(["--exact", "test::times::tests::a_line_has_a_name_and_a_time"]);
        let status = times.watch("own", command.args(times.arguments()).envs(times.variable())).unwrap();
        assert!(status.success());
        assert!(times.to_string().contains("own: test::times::tests::a_line_has_a_name_and_a_time"));
        assert!(!tells_times(Path::new("/nowhere")));
    }
}
