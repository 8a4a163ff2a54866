//! What the platform and a node say to each other. Both are this program, from one build.
//!
//! ```text
//!  parent node            platform                 child nodes
//!  Fork, capsule   ──►
//!                         Restore, capsule   ──►
//!                                            ◄──   Ready
//!                  ◄──    Launched
//!  Commit          ──►    Go                 ──►   (they run)
//!  Report          ──►
//! ```
//!
//! Until `Commit`, the children stand still. `Abort` instead of it, or a parent that is gone, ends them.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Report, Step};
use crate::machine::{Config, End, VmIdentity};

/// From the platform to a node.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToNode {
    /// Boot. Files: the kernel, and the initrd if there is one.
    Boot {
        /// The machine.
        config: Config,
        /// Who it is.
        identity: VmIdentity,
        /// The kernel's command line.
        cmdline: String,
        /// Steps at which its forks are to fail, one for each fork, in order.
        faults: Vec<Step>,
    },
    /// Become a copy, and wait. Files: a capsule's.
    Restore {
        /// Who it is.
        identity: VmIdentity,
        /// Number of the request that it comes from.
        seq: u64,
    },
    /// Run.
    Go,
    /// Input for the console.
    Input(Vec<u8>),
    /// The children are there, and wait.
    Launched(Vec<Uuid>),
    /// The fork failed on the platform's side; nothing of it is left.
    Refused {
        /// What the guest is told.
        code: u32,
        /// What the log is told.
        why: String,
    },
    /// All children of an aborted fork are gone.
    Aborted,
}

/// From a node to the platform.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToPlatform {
    /// The machine is built, and waits for `Go`.
    Ready,
    /// The machine could not be built.
    Failed(String),
    /// Launch copies of this VM. Files: a capsule's.
    Fork {
        /// How many.
        count: u32,
        /// Under which type.
        vm_type: String,
        /// Number of the guest's request.
        seq: u64,
        /// Fail at this step.
        fault: Option<Step>,
    },
    /// Let the children run.
    Commit,
    /// End the children.
    Abort,
    /// How the fork went, after the VM went on.
    Report(Report),
    /// The VM has ended; the process is about to.
    Ended(End),
}
