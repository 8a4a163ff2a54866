//! What is told of a fork: its steps, and how it went.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use vmfork_abi::ErrorCode;

macro_rules! steps {
    ($($(#[$doc:meta])* $step:ident $name:literal $code:ident;)+) => {
        /// A step of VM_fork.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum Step { $($(#[$doc])* $step,)+ }

        impl Step {
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
    /// Stop the other vCPUs; each saves its own state.
    Quiesce "quiesce" Quiesce;
    /// Complete the doorbell's exit.
    Complete "complete" Quiesce;
    /// Read the state.
    Capture "capture" Capture;
    /// Make the memory an image.
    Freeze "freeze" Freeze;
    /// Pack state and image.
    Pack "pack" Freeze;
    /// Choose where the children go; a part of the launch.
    Place "place" Place;
    /// Launch the children.
    Launch "launch" Launch;
    /// Write the parent's role.
    Signal "signal" Signal;
    /// Let the children run: the point of no return.
    Commit "commit" Internal;
    /// Let the other vCPUs go on.
    Thaw "thaw" Internal;
}

impl Step {
    /// Whether a failure at this step can be asked for: behind the point of no return nothing can fail.
    pub fn can_fail(self) -> bool {
        !matches!(self, Self::Commit | Self::Thaw)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().copied().find(|step| step.name() == name && step.can_fail());
        found.ok_or_else(|| format!("no step of a fork that can be made to fail is called {name:?}"))
    }
}

/// How a fork went.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// How many children it made; 0 where it failed.
    pub count: u32,
    /// The error code that the guest was told.
    pub code: u32,
    /// Why it failed.
    pub why: Option<String>,
    /// When the doorbell rang: CLOCK_MONOTONIC of this host, in nanoseconds.
    pub rung_ns: u64,
    /// From the doorbell until the calling vCPU went on, in nanoseconds.
    pub pause_ns: u64,
    /// How long each step took, in nanoseconds.
    pub steps: Vec<(Step, u64)>,
}
