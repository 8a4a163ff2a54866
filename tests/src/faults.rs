//! The steps of a fork that can be made to fail.

use vmfork_abi::ErrorCode;

/// Name of each step for `--inject-fault`, in order, and what the guest is told when it fails.
pub const STEPS: [(&str, ErrorCode); 9] = [
    ("validate", ErrorCode::Internal),
    ("quiesce", ErrorCode::Quiesce),
    ("complete", ErrorCode::Quiesce),
    ("capture", ErrorCode::Capture),
    ("freeze", ErrorCode::Freeze),
    ("pack", ErrorCode::Freeze),
    ("place", ErrorCode::Place),
    ("launch", ErrorCode::Launch),
    ("signal", ErrorCode::Signal),
];

/// All of them, for `--inject-fault`.
pub fn all() -> String {
    STEPS.map(|(step, _)| step).join(",")
}
