//! The steps of a fork that can be made to fail.

use vmfork_abi::ErrorCode;

/// Name of each step for `--inject-fault`, in order, and what the guest is told when it fails.
pub const STEPS: [(&str, ErrorCode); 10] = [
    ("validate", ErrorCode::Internal),
    ("place", ErrorCode::Place),
    ("quiesce", ErrorCode::Quiesce),
    ("complete", ErrorCode::Quiesce),
    ("capture", ErrorCode::Capture),
    ("freeze", ErrorCode::Freeze),
    ("hand-over", ErrorCode::Freeze),
    ("restore", ErrorCode::Internal),
    ("launch", ErrorCode::Launch),
    ("signal", ErrorCode::Signal),
];

/// All of them, for `--inject-fault`.
pub fn all() -> String {
    STEPS.map(|(step, _)| step).join(",")
}
