//! Why a VM ended.

use base::text::Reason;
use serde::{Deserialize, Serialize};

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest reset itself: a reboot, or a panic with `panic=-1`.
    Reset,
    /// The VM can't go on; the text says why.
    Broken(Reason),
    /// Its platform went away.
    Orphaned,
    /// The rest of its memory can't be had from where it was cloned; the text says why.
    SourceLost(Reason),
    /// The image that it shares with its parent or its copies could still be changed; the text says why.
    Unsealed(Reason),
    /// An operator has stopped it.
    Stopped,
}
