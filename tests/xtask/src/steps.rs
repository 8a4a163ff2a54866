//! Progress: what is being done, and how long it took. All of it goes to standard error.

use std::io::{IsTerminal, stderr};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

/// The steps of one run.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    done: Vec<(&'static str, Duration)>,
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

    /// All steps with their times, on one line.
    pub(crate) fn summary(&self) -> String {
        let total = self.done.iter().map(|(_, time)| time).sum();
        let each = self.done.iter().map(|(name, time)| format!("{name} {}", seconds(*time)));
        format!("{}; total {}", each.collect::<Vec<_>>().join(", "), seconds(total))
    }

    fn timed<T>(&mut self, name: &'static str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = step();
        let time = start.elapsed();
        let outcome = if result.is_ok() { "done in" } else { "failed after" };
        eprintln!("    {name}: {outcome} {}", seconds(time));
        self.done.push((name, time));
        result
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
    use super::*;

    #[test]
    fn summary_names_each_step_and_the_total() {
        let steps = Steps { done: vec![("setup", Duration::from_millis(120)), ("build", Duration::from_millis(2450))] };
        assert_eq!(steps.summary(), "setup 0.1 s, build 2.5 s; total 2.6 s");
    }
}
