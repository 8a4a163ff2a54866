//! When each step of a fork began and ended, and where it is made to fail for a test.

use base::{clock::monotonic_ns, text::Reason};
use types::{ForkStep, Requester, StepTiming};
use vmfork_abi::ErrorCode;

use super::Error;
use crate::wire::Report;

/// The steps of one side of a fork, as they happen.
#[derive(Debug)]
pub(super) struct Timeline {
    fault: Option<ForkStep>,
    steps: Vec<StepTiming>,
}

impl Timeline {
    /// One that is to fail at `fault`, where that is given.
    pub(super) fn new(fault: Option<ForkStep>) -> Self {
        Self { fault, steps: Vec::with_capacity(ForkStep::ALL.len()) }
    }

    /// Where the fork is to fail.
    pub(super) fn fault(&self) -> Option<ForkStep> {
        self.fault
    }

    /// Does a step, and takes its time. A fault strikes after the work is done: it has to be undone then.
    pub(super) fn step<T>(
        &mut self,
        step: ForkStep,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let result = self.time(step, work);
        if self.fault == Some(step) { result.and(Err(Error::Injected(step))) } else { result }
    }

    /// Does a step, and takes its time.
    pub(super) fn time<T>(&mut self, step: ForkStep, work: impl FnOnce() -> T) -> T {
        let _span = tracing::debug_span!("fork", %step).entered();
        let started_ns = monotonic_ns();
        let result = work();
        self.steps.push((step, started_ns, monotonic_ns()));
        result
    }

    /// The steps.
    pub(super) fn into_steps(self) -> Vec<StepTiming> {
        self.steps
    }

    /// What is told of the fork.
    pub(super) fn into_report(
        self,
        asked_by: Requester,
        seq: u64,
        rung_ns: u64,
        outcome: Result<u32, Error>,
    ) -> Report {
        let pause_ns = monotonic_ns().saturating_sub(rung_ns);
        let (count, code, why) = match outcome {
            Ok(count) => (count, ErrorCode::None, None),
            Err(error) => (0, error.code(), Some(Reason::of_error(&error))),
        };
        Report {
            asked_by,
            seq,
            count,
            code: code.number(),
            why,
            rung_ns,
            pause_ns,
            untold: 0,
            steps: self.steps,
        }
    }
}
