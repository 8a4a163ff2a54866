//! How long each step of a fork took, and where it is made to fail for a test.

use std::time::{Duration, Instant};

use vmfork_abi::ErrorCode;

use super::Error;
use crate::{
    error::chain,
    wire::{Report, Step},
};

/// The steps of one fork as they happen.
#[derive(Debug)]
pub(super) struct Timeline {
    fault: Option<Step>,
    steps: Vec<(Step, u64)>,
}

impl Timeline {
    /// A fork that is to fail at `fault`, where that is given.
    pub(super) fn new(fault: Option<Step>) -> Self {
        Self { fault, steps: Vec::with_capacity(Step::ALL.len()) }
    }

    /// Where the fork is to fail.
    pub(super) fn fault(&self) -> Option<Step> {
        self.fault
    }

    /// Does a step, and takes its time. A fault strikes after the work is done: it has to be undone then.
    pub(super) fn step<T>(&mut self, step: Step, work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let _span = tracing::debug_span!("fork", %step).entered();
        let started = Instant::now();
        let result = work();
        self.steps.push((step, nanoseconds(started.elapsed())));
        if self.fault == Some(step) { result.and(Err(Error::Injected(step))) } else { result }
    }

    /// What is told of the fork.
    pub(super) fn into_report(self, rung_ns: u64, pause: Duration, outcome: Result<u32, Error>) -> Report {
        let (count, code, why) = match outcome {
            Ok(count) => (count, ErrorCode::None, None),
            Err(error) => (0, error.code(), Some(chain(&error))),
        };
        Report { count, code: code.number(), why, rung_ns, pause_ns: nanoseconds(pause), steps: self.steps }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
