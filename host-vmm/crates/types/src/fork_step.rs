//! The steps of a fork, and who asks for one.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use vmfork_abi::ErrorCode;

macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident $name:literal $code:ident;)+) => {
        /// A step of VM_fork.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum ForkStep { $($(#[$doc])* $step,)+ }

        impl ForkStep {
            /// All steps, in order.
            pub const ALL: &'static [Self] = &[$(Self::$step),+];

            /// Name of the step.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$step => $name,)+ }
            }

            /// What the guest is told when this step fails for no better reason.
            pub const fn code(self) -> ErrorCode {
                match self { $(Self::$step => ErrorCode::$code,)+ }
            }
        }
    };
}

steps! {
    /// Check the request.
    Validate "validate" Internal;
    /// Have the platform choose where the children go; it does so while the parent is being captured.
    Place "place" Place;
    /// Stop the other vCPUs; each saves its own state.
    Quiesce "quiesce" Quiesce;
    /// Complete the doorbell's exit.
    Complete "complete" Quiesce;
    /// Read the state.
    Capture "capture" Capture;
    /// Make the memory an image.
    Freeze "freeze" Freeze;
    /// Parent: give the state to the children. Child: wait for it, and unpack it.
    HandOver "hand-over" Freeze;
    /// Write the state into the VM that is to go on from it: a child's, or the parent's next one.
    Restore "restore" Internal;
    /// Parent: wait until all children are ready to run. Child: wait for the others.
    Launch "launch" Launch;
    /// Get ready to write the role.
    Signal "signal" Signal;
    /// Let the children run: the point of no return.
    Commit "commit" Internal;
    /// Write the role, and let the vCPUs go on.
    Thaw "thaw" Internal;
    /// Run until the first exit.
    FirstRun "first-run" Internal;
}

impl ForkStep {
    /// Whether a fault at this step can be asked for: that it fails, which no step behind the point of no
    /// return can; of the first run, that each copy's first vCPU runs later than the others.
    pub fn has_fault(self) -> bool {
        !matches!(self, Self::Commit | Self::Thaw)
    }
}

impl fmt::Display for ForkStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ForkStep {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().copied().find(|step| step.name() == name && step.has_fault());
        found.ok_or_else(|| format!("no step of a fork with a fault to ask for is called {name:?}"))
    }
}

/// Who asks for a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Requester {
    /// The parent's guest, by its doorbell.
    Guest,
    /// An operator, by the platform's API.
    Operator,
}

/// A step, and when it began and ended: CLOCK_MONOTONIC of this host, in nanoseconds.
pub type StepTiming = (ForkStep, u64, u64);
