//! Clones: copies of a VM on another platform.
//!
//! ```text
//!  source                                                    target
//!  PUT    /v1/clones/ID             [`Order`]           ──►  keeps room for the copies
//!  PUT    /v1/clones/ID/capsule     header, description ──►  checks whether it can run them
//!                                              [`Missing`] ◄──  says which chunks of memory it lacks
//!  POST   /v1/clones/ID/chunks      those, on several   ──►  checks each against its digest
//!                                   connections
//!  POST   /v1/clones/ID/prepare                         ──►  launches the copies; they wait
//!  POST   /v1/clones/ID/commit                          ──►  they run
//!  DELETE /v1/clones/ID                                 ──►  nothing is left of it
//! ```
//!
//! A lazy clone is described without what is in its memory. Of that, only the chunks go first that are needed
//! at once, right behind the description; the copies are launched and committed as others are, and the
//! [rest](postcopy) is had from the source while they run:
//!
//! ```text
//!  target                                                    source
//!  POST   /v1/supplies/ID/chunks    [`Need`]            ──►  these chunks, as records
//!  GET    /v1/supplies/ID/manifest                      ──►  what all of it should be
//!  DELETE /v1/supplies/ID                               ──►  all is there
//! ```
//!
//! Two phases: until it has committed, a target undoes everything when it is told to, or when it hears
//! nothing of its source for the time of a lease. What was decided is [remembered](decisions) under the
//! clone's ID: who asks again, since an answer was lost, gets the same one. So no VM runs twice. Where the
//! source can't reach its target any more to commit, it asks until the lease is over by the target's clock as
//! well. A target that does not know the clone then says nothing of what became of it: the source reports
//! that it is not known whether the copies run.
//!
//! Neither side waits without an end: for each answer, and for all of it, a platform has its time, as it has
//! to launch the copies; and a source that has been given up asks for nothing more.

use std::{ops::Range, time::Duration};

use api::Copied;
use base::text::Reason;
use serde::{Deserialize, Serialize};
use types::CopySpec;
use utoipa::ToSchema;

mod decisions;
mod incoming;
mod incoming_memory;
#[cfg(test)]
mod json_test;
pub(crate) mod outgoing;
pub mod page_server;
pub mod postcopy;
mod rate_limiter;
pub mod source;
pub mod target;

pub use target::{Clones, Error};

/// How long a target waits for its source, once it has begun.
pub const LEASE: Duration = Duration::from_secs(20);

/// How long a source tries to commit: the lease, and time for a target that notices its end late.
const COMMIT_LIMIT: Duration = LEASE.saturating_mul(2);

/// Most ranges of chunks that a target names as missing: where there are more, it asks for what lies between
/// them too.
pub const MAX_RANGES: usize = 4096;

/// What a source asks a target for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Name of the source's platform.
    pub source: String,
    /// The copies.
    pub slots: Vec<CopySpec>,
    /// How many copies their fork makes, here and elsewhere.
    pub total: u32,
    /// Whether they are to run before all of their memory has come.
    #[serde(default)]
    pub lazy: bool,
}

/// What a target lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Missing {
    /// Numbers of chunks, in the order in which the description has them: from `start` on, up to the one
    /// before `end`.
    #[schema(value_type = Vec<Object>)]
    pub chunks: Vec<Range<u32>>,
}

impl Missing {
    /// Whether this can be: not too many ranges, none of them empty, one behind another.
    pub fn is_sound(&self) -> bool {
        let are_sorted = self.chunks.is_sorted_by(|one, next| one.end <= next.start);
        self.chunks.len() <= MAX_RANGES && are_sorted && self.chunks.iter().all(|range| !range.is_empty())
    }

    /// Whether a chunk is among them.
    pub fn has(&self, chunk: u32) -> bool {
        let behind = self.chunks.partition_point(|range| range.start <= chunk);
        self.chunks[..behind].last().is_some_and(|range| range.contains(&chunk))
    }
}

/// What a target needs of the memory of a lazy clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Need {
    /// Numbers of chunks: at most 64.
    pub chunks: Vec<u32>,
    /// Whether somebody waits for them: they go before others then.
    pub urgent: bool,
}

/// How far a clone is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "stage", rename_all = "kebab-case")]
pub enum Stage {
    /// There is room for it.
    Reserved,
    /// Its memory is on its way.
    Receiving,
    /// Its copies are being launched.
    Preparing,
    /// They wait until they may run.
    Prepared,
    /// They run, or have run.
    Committed {
        /// Who they are.
        vms: Vec<Copied>,
    },
    /// Nothing is left of it.
    Aborted {
        /// Why.
        #[schema(value_type = String)]
        why: Reason,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_be_is_missed() {
        let is_sound = |chunks: &[Range<u32>]| Missing { chunks: chunks.to_vec() }.is_sound();
        assert!(is_sound(&[]) && is_sound(&[0..1, 1..2, 5..u32::MAX]));
        assert!(!is_sound(&[0..2, 1..3]) && !is_sound(&[4..5, 0..1]) && !is_sound(&[3..3, 4..5]));
        let missing = Missing { chunks: vec![1..3, 7..8] };
        assert!((0..10).filter(|chunk| missing.has(*chunk)).eq([1, 2, 7]));
        let many = |count: u32| (0..count).map(|at| 2 * at..2 * at + 1).collect::<Vec<_>>();
        assert!(is_sound(&many(4096)) && !is_sound(&many(4097)));
    }
}
