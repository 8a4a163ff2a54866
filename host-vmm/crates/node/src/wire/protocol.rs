//! What the platform, its zygote, and the nodes say to each other. All of them are this program, from one
//! build.
//!
//! ```text
//!  parent node              platform                 warm VMs
//!                                              ◄──   Ready
//!  Announce, files   ──►   StandBy, files      ──►   (one of them)
//!  Fork              ──►   Copy                ──►   (become copies; parent and children meet)
//!                                              ◄──   Running
//!  Report            ──►                       ◄──   Launched
//! ```
//!
//! A fork that an operator asks for begins with the platform's `Fork` to the node, and the node says by
//! `Answer` what has come of it.
//!
//! What becomes of a fork is decided at the [rendezvous](crate::fork::rendezvous), without the platform.
//! Where the parent calls it off, it says `Abort`, and goes on when the platform has cleared everything away.

use std::time::Duration;

use base::text::Reason;
use serde::{Deserialize, Serialize};
use types::{ExitReason, ForkStep, Locality, StepTiming, VmIdentity, VmShape};
use vmm::memory::WorkingSet;

use vmfork_abi::ErrorCode;

use super::{Report, report::is_timeline};

/// From the platform to its zygote: start a warm VM. Files: the node's end of its connection, and where its
/// console writes to.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Spawn {
    /// The shape of the machine.
    pub config: VmShape,
    /// Whether its vCPUs are to have run nothing: they can become others than this host's then.
    pub is_cold: bool,
    /// Longest pause of its VM for a fork.
    pub max_pause: Duration,
}

/// From the zygote to the platform. Files: a handle to the process (pidfd).
#[derive(Debug, Serialize, Deserialize)]
pub enum Spawned {
    /// The warm VM's process has started.
    Process(u32),
    /// It could not be started.
    Failed(Reason),
}

/// What a copy does about the pages that it will write to first.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Prefetch {
    /// Nothing.
    None,
    /// Tell which they are.
    Record,
    /// Make those ready that a copy before it has told.
    Fill(WorkingSet),
}

/// A fork that is to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForkOrder {
    /// As the guest asks for it.
    Guest {
        /// The guest's number for it.
        seq: u64,
        /// How many children, from 1 to [`MAX_CHILDREN`](vmfork_abi::MAX_CHILDREN).
        count: u32,
        /// Under which type; a valid one.
        vm_type: String,
        /// Where the guest wants them.
        location: Locality,
    },
    /// As an operator asks for it, who has told the platform all that the parent need not know.
    Operator {
        /// How many children.
        count: u32,
    },
}

impl ForkOrder {
    /// How many children.
    pub fn count(&self) -> u32 {
        match self {
            Self::Guest { count, .. } | Self::Operator { count } => *count,
        }
    }
}

/// What a warm VM is to become.
#[derive(Debug, Serialize, Deserialize)]
pub struct CopyOrder {
    /// Who it is.
    pub identity: VmIdentity,
    /// Number of the guest's request that it comes from; 0 where an operator has asked.
    pub seq: u64,
    /// How many have to be ready until all of them run.
    pub arrivals: u32,
    /// Whether its memory is still being filled: it tells of pages that it lacks then.
    pub lazy: bool,
    /// What it does about its first writes.
    pub working_set: Prefetch,
    /// For tests: whether its first vCPU runs later than the others.
    pub first_vcpu_late: bool,
}

/// From the platform to a node.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToNode {
    /// Boot. Files: the kernel, and the initrd if there is one.
    Boot {
        /// Who it is.
        identity: VmIdentity,
        /// The kernel's command line.
        cmdline: String,
        /// Take all memory from the host at once.
        prealloc: bool,
        /// Steps at which its forks are to fail, one for each fork, in order.
        faults: Vec<ForkStep>,
    },
    /// Stand by for the next fork of a certain VM. Files: the wake event, the rendezvous, then those of the
    /// image.
    StandBy {
        /// What its copies write to first: to be made ready meanwhile.
        working_set: Option<WorkingSet>,
    },
    /// Become a copy. Files: the rendezvous, then those of the image; none for a warm VM that stands by for
    /// this fork.
    Copy(CopyOrder),
    /// Input for the console.
    Input(Vec<u8>),
    /// All of the memory is there that was still being filled.
    Whole,
    /// An operator asks for a fork.
    Fork {
        /// How many children.
        count: u32,
    },
    /// Nothing is left of the fork that was called off.
    Aborted {
        /// What the guest is told, where the platform knows better than the parent.
        code: u32,
        /// What the log is told.
        why: Reason,
    },
}

/// From a node to the platform.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToPlatform {
    /// The warm VM stands ready.
    Ready,
    /// The machine could not be built, or can't become what it should.
    Failed(Reason),
    /// What the copy lacks of a memory that is still being filled. Files: what tells of its faults
    /// (userfaultfd).
    Faults {
        /// Address of the memory in this process.
        start: u64,
    },
    /// The VM runs.
    Running {
        /// Whether its guest knows of a VM generation ID.
        generation_id: bool,
    },
    /// How the copy was launched, once it has come to its first exit.
    Launched {
        /// Number of the guest's request that it comes from; 0 where an operator has asked.
        seq: u64,
        /// Its steps.
        steps: Vec<StepTiming>,
    },
    /// The pages that the copy has written to until its first output.
    Touched(WorkingSet),
    /// What the next fork of this VM will come with. Files: a wake event, the rendezvous, then those of the
    /// image.
    Announce,
    /// Launch copies of this VM. Files: the rendezvous, then those of the image, unless they were announced.
    Fork {
        /// Which.
        order: ForkOrder,
        /// It comes with what was announced last.
        announced: bool,
        /// Fail at this step.
        fault: Option<ForkStep>,
    },
    /// Clear away what there is of the fork.
    Abort,
    /// What has come of the fork that an operator has asked for.
    Answer {
        /// An error code; 0 where it was made.
        code: u32,
        /// Why it failed.
        why: Reason,
    },
    /// How the fork went, after the VM went on.
    Report(Report),
    /// The VM has ended; the process is about to.
    Ended(ExitReason),
}

impl ToPlatform {
    /// Whether a node that keeps to the protocol can have built it. A guest may run in the process that it
    /// comes from.
    pub fn is_valid(&self) -> bool {
        match self {
            Self::Launched { steps, .. } => is_timeline(steps),
            Self::Touched(working_set) => working_set.is_valid(),
            Self::Answer { code, .. } => ErrorCode::from_number(*code).is_some(),
            Self::Report(report) => {
                is_timeline(&report.steps) && ErrorCode::from_number(report.code).is_some()
            }
            Self::Ready
            | Self::Failed(_)
            | Self::Faults { .. }
            | Self::Running { .. }
            | Self::Announce
            | Self::Fork { .. }
            | Self::Abort
            | Self::Ended(_) => true,
        }
    }

    /// What it is called where it is not as it should be.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Failed(_) => "Failed",
            Self::Faults { .. } => "Faults",
            Self::Running { .. } => "Running",
            Self::Launched { .. } => "Launched",
            Self::Touched(_) => "Touched",
            Self::Announce => "Announce",
            Self::Fork { .. } => "Fork",
            Self::Abort => "Abort",
            Self::Answer { .. } => "Answer",
            Self::Report(_) => "Report",
            Self::Ended(_) => "Ended",
        }
    }
}
