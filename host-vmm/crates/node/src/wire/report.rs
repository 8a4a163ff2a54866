//! What is told of a fork: its steps, and how it went.

use base::text::Reason;
use serde::{Deserialize, Serialize};
use types::{ForkStep, Requester, StepTiming};

/// Whether these may be the steps of one side of a fork: they come from a process in which a guest runs.
pub(super) fn is_timeline(steps: &[StepTiming]) -> bool {
    steps.len() <= ForkStep::ALL.len()
}

/// How a fork went.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Who has asked for it.
    pub asked_by: Requester,
    /// Number of the guest's request; 0 where an operator has asked.
    pub seq: u64,
    /// How many children it made; 0 where it failed.
    pub count: u32,
    /// The error code that whoever asked was told.
    pub code: u32,
    /// Why it failed.
    pub why: Option<Reason>,
    /// When the doorbell rang, or a vCPU began with an operator's fork: CLOCK_MONOTONIC of this host, in
    /// nanoseconds.
    pub rung_ns: u64,
    /// From then until that vCPU went on, in nanoseconds.
    pub pause_ns: u64,
    /// Failed forks before this one that were not reported, since there were too many.
    pub untold: u64,
    /// The parent's steps.
    pub steps: Vec<StepTiming>,
}
