//! Progress: what is being done, how long it took, and what came of it. All of it goes to standard error.

use std::fmt;
use std::io::{IsTerminal, stderr};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// The steps of one run.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    done: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    name: &'static str,
    outcome: Outcome,
    /// Time that it took; `None` of one that was not begun.
    time: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    Skipped,
}

impl Steps {
    /// Runs a step that prints nothing itself.
    pub(crate) fn quiet<T>(&mut self, name: &'static str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        if !stderr().is_terminal() {
            return self.run(name, step);
        }
        let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}")?;
        let spinner = ProgressBar::new_spinner().with_style(style).with_message(name);
        spinner.enable_steady_tick(Duration::from_millis(100));
        self.timed(name, || {
            let result = step();
            spinner.finish_and_clear();
            result
        })
    }

    /// Runs a step whose own output is shown.
    pub(crate) fn run<T>(&mut self, name: &'static str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("==> {name}");
        self.timed(name, step)
    }

    /// [Runs](Self::run) a step without which others go on: if it fails, that is said, and there is `None`.
    pub(crate) fn part<T>(&mut self, name: &'static str, step: impl FnOnce() -> Result<T>) -> Option<T> {
        self.parts(name, |steps| steps.run(name, step))
    }

    /// Makes steps, up to the first that fails, without which others go on.
    pub(crate) fn parts<T>(
        &mut self,
        name: &'static str,
        steps: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Option<T> {
        self.parts_or(Outcome::Failed, name, steps)
    }

    /// [Steps](Self::parts) for which a machine may lack something: where they fail, they count as skipped.
    pub(crate) fn parts_if_possible<T>(
        &mut self,
        name: &'static str,
        steps: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Option<T> {
        self.parts_or(Outcome::Skipped, name, steps)
    }

    /// Counts a step as skipped, and says so.
    pub(crate) fn skip(&mut self, name: &'static str, why: impl fmt::Display) {
        eprintln!("xtask: SKIPPED: {name}: {why}");
        self.done.push(Step { name, outcome: Outcome::Skipped, time: None });
    }

    fn parts_or<T>(
        &mut self,
        outcome: Outcome,
        name: &'static str,
        steps: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Option<T> {
        let first = self.done.len();
        let error = match steps(self) {
            Ok(made) => return Some(made),
            Err(error) => error,
        };
        let what = if outcome == Outcome::Skipped { "SKIPPED on this machine" } else { "FAILED" };
        eprintln!("xtask: {what}: {name}: {error:#}");
        match self.done.iter_mut().skip(first).find(|step| step.outcome == Outcome::Failed) {
            Some(failed) => failed.outcome = outcome,
            None => self.done.push(Step { name, outcome, time: None }),
        }
        None
    }

    /// The exit code of a run that has gone on behind what failed. Where `no_skips`, what was skipped counts
    /// as failed.
    pub(crate) fn exit_code(&self, no_skips: bool) -> u8 {
        u8::from(self.count(Outcome::Failed) > 0 || no_skips && self.count(Outcome::Skipped) > 0)
    }

    fn count(&self, outcome: Outcome) -> usize {
        self.done.iter().filter(|step| step.outcome == outcome).count()
    }

    fn timed<T>(&mut self, name: &'static str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = step();
        let time = start.elapsed();
        let (outcome, what) =
            if result.is_ok() { (Outcome::Passed, "done in") } else { (Outcome::Failed, "failed after") };
        eprintln!("    {name}: {what} {}", seconds(time));
        self.done.push(Step { name, outcome, time: Some(time) });
        result
    }
}

/// All steps with their outcomes and times, a line each, and last a line that counts them.
impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Step { name, outcome, time } in &self.done {
            writeln!(f, "{outcome:<8}{:>9}  {name}", time.map_or_else(String::new, seconds))?;
        }
        writeln!(f, "{:<8}{:>9}", "total", seconds(self.done.iter().filter_map(|step| step.time).sum()))?;
        let [passed, failed, skipped] =
            [Outcome::Passed, Outcome::Failed, Outcome::Skipped].map(|outcome| self.count(outcome));
        writeln!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        })
    }
}

/// The exit code that a shell would give for `status`.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn fail<T>() -> Result<T> {
        bail!("it is broken")
    }

    /// The outcomes of all steps, in order.
    fn outcomes(steps: &Steps) -> Vec<(&'static str, Outcome)> {
        steps.done.iter().map(|step| (step.name, step.outcome)).collect()
    }

    #[test]
    fn what_fails_is_counted_and_others_go_on() {
        let mut steps = Steps::default();
        assert_eq!(steps.part("build", || Ok(1)), Some(1));
        assert_eq!(steps.part("tests", fail::<()>), None);
        assert_eq!(steps.part("more tests", || Ok(2)), Some(2));
        let (passed, failed) = (Outcome::Passed, Outcome::Failed);
        assert_eq!(outcomes(&steps), [("build", passed), ("tests", failed), ("more tests", passed)]);
        assert_eq!((steps.exit_code(false), steps.exit_code(true)), (1, 1));
    }

    #[test]
    fn steps_end_at_the_first_that_fails_which_is_counted_once() {
        let mut steps = Steps::default();
        let made = steps.parts("images", |steps| {
            steps.run("kernel", || Ok(()))?;
            steps.run("image", fail::<()>)?;
            steps.run("never", || Ok(()))
        });
        assert_eq!(made, None);
        assert_eq!(outcomes(&steps), [("kernel", Outcome::Passed), ("image", Outcome::Failed)]);
        // An error between two steps is one of them all.
        assert_eq!(
            steps.parts("more images", |steps| steps.run("kernel", || Ok(())).and_then(|()| fail::<()>())),
            None
        );
        assert_eq!(outcomes(&steps)[2..], [("kernel", Outcome::Passed), ("more images", Outcome::Failed)]);
        assert_eq!(steps.exit_code(false), 1);
    }

    #[test]
    fn what_a_machine_lacks_is_skipped_which_may_be_allowed_or_not() {
        let mut steps = Steps::default();
        assert_eq!(
            steps.parts_if_possible("tests with it", |steps| steps.run("setup of it", fail::<()>)),
            None
        );
        assert_eq!(
            steps.parts_if_possible("tests with that", |steps| steps.run("setup of that", || Ok(3))),
            Some(3)
        );
        steps.skip("tests", "nothing to test");
        let (passed, skipped) = (Outcome::Passed, Outcome::Skipped);
        assert_eq!(
            outcomes(&steps),
            [("setup of it", skipped), ("setup of that", passed), ("tests", skipped)]
        );
        assert_eq!((steps.exit_code(false), steps.exit_code(true)), (0, 1));
        assert_eq!((Steps::default().exit_code(false), Steps::default().exit_code(true)), (0, 0));
    }

    #[test]
    fn the_summary_names_each_step_and_counts_them_in_its_last_line() {
        let step =
            |name, outcome, time: Option<u64>| Step { name, outcome, time: time.map(Duration::from_millis) };
        let steps = Steps {
            done: vec![
                step("setup", Outcome::Passed, Some(120)),
                step("unit tests", Outcome::Failed, Some(102_450)),
                step("kernel module", Outcome::Skipped, None),
            ],
        };
        let expected = "passed      0.1 s  setup\n\
                        failed    102.5 s  unit tests\n\
                        skipped            kernel module\n\
                        total     102.6 s\n\
                        1 passed, 1 failed, 1 skipped\n";
        assert_eq!(steps.to_string(), expected);
    }
}
