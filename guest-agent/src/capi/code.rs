//! What the functions of the C interface return.

use std::ffi::{CStr, CString, c_int};
use std::sync::LazyLock;

use crate::{DetectError, ErrorCode, ForkError, GenerationError, OpenError, Role};

pub(super) const OK: c_int = 0;
pub(super) const EINVAL: c_int = -1;
pub(super) const ENOVMM: c_int = -2;
pub(super) const EVERSION: c_int = -3;
pub(super) const EACCESS: c_int = -4;
pub(super) const ENOANSWER: c_int = -5;
pub(super) const EPROTOCOL: c_int = -6;
pub(super) const EPARENT: c_int = -7;
pub(super) const ECHILD: c_int = -8;
pub(super) const ECOPIED: c_int = -9;
pub(super) const EDEADLINE: c_int = -10;
pub(super) const EINTERRUPTED: c_int = -11;
/// A refusal is this minus the number of its [`ErrorCode`].
pub(super) const REFUSED: c_int = -100;

/// What the codes mean, but for the refusals.
const TEXTS: [(c_int, &CStr); 12] = [
    (OK, c"success"),
    (EINVAL, c"an argument is NULL or out of range, or VMFORK_VIA names no route"),
    (ENOVMM, c"no VMM that can fork this machine"),
    (EVERSION, c"the VMM, or the kernel module, speaks another version of the interface"),
    (EACCESS, c"the caller may not fork this VM, or lacks something that a fork needs"),
    (ENOANSWER, c"the VMM did not answer"),
    (EPROTOCOL, c"the VMM's answer is not valid"),
    (EPARENT, c"the fork was made, but this parent could not finish it"),
    (ECHILD, c"this VM is a child without a complete identity"),
    (ECOPIED, c"this VM is a copy made by somebody else's fork"),
    (EDEADLINE, c"the deadline passed before it was this caller's turn"),
    (EINTERRUPTED, c"a signal came before it was this caller's turn"),
];

/// What each refusal means, at the index of its error code.
static REFUSALS: LazyLock<Vec<CString>> = LazyLock::new(|| {
    // No text of ours contains a NUL; one that did would come out empty.
    ErrorCode::ALL.iter().map(|code| CString::new(code.to_string()).unwrap_or_default()).collect()
});

pub(super) fn text(code: c_int) -> &'static CStr {
    let refusal = || REFUSALS.get(usize::try_from(REFUSED.checked_sub(code)?).ok()?).map(CString::as_c_str);
    let known = TEXTS.iter().find(|(number, _)| *number == code).map(|(_, text)| *text);
    known.or_else(refusal).unwrap_or(c"unknown code")
}

pub(super) fn detect_code(error: DetectError) -> c_int {
    match error {
        DetectError::NoVmm => ENOVMM,
        DetectError::Version { .. } => EVERSION,
    }
}

pub(super) fn open_code(error: &OpenError) -> c_int {
    match error {
        OpenError::Via(_) => EINVAL,
        OpenError::Detect(error) => detect_code(*error),
        OpenError::DeviceVersion { .. } => EVERSION,
        OpenError::Header { .. } => EPROTOCOL,
        OpenError::NoDevice { .. }
        | OpenError::DeviceForbidden { .. }
        | OpenError::OpenDevice { .. }
        | OpenError::AskDevice { .. }
        | OpenError::OpenMemory { .. }
        | OpenError::MapPage { .. } => EACCESS,
    }
}

pub(super) fn generation_code(error: &GenerationError) -> c_int {
    match error {
        GenerationError::Open(error) => open_code(error),
        GenerationError::Map { .. } => EACCESS,
    }
}

pub(super) fn fork_code(error: &ForkError) -> c_int {
    match error {
        ForkError::Open(error) => open_code(error),
        ForkError::UnknownAnswer { .. } | ForkError::Senseless => EPROTOCOL,
        ForkError::Lock(_)
        | ForkError::Privilege(_)
        | ForkError::OpenRandom { .. }
        | ForkError::Port { .. }
        | ForkError::ReadClock { .. }
        | ForkError::Device { role: None, .. }
        | ForkError::Raise { .. } => EACCESS,
        ForkError::NotAnswered { .. } | ForkError::Silent => ENOANSWER,
        ForkError::Refused(code) => {
            c_int::try_from(code.number()).map_or(EPROTOCOL, |number| REFUSED - number)
        }
        ForkError::Copied => ECOPIED,
        ForkError::DeadlinePassed => EDEADLINE,
        ForkError::Interrupted => EINTERRUPTED,
        ForkError::Outcome { .. }
        | ForkError::Identity { .. }
        | ForkError::Lower { .. }
        | ForkError::Device { role: Some(_), .. } => match error.role() {
            Some(Role::Child) => ECHILD,
            Some(Role::Parent) => EPARENT,
            Some(Role::Booted) | None => EPROTOCOL,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_text() {
        assert_eq!(text(OK), c"success");
        assert_eq!(text(ECHILD), c"this VM is a child without a complete identity");
        assert_eq!(text(REFUSED - 3), c"a fork of this VM is under way");
        let first_unknown = REFUSED - c_int::try_from(ErrorCode::ALL.len()).unwrap();
        for unknown in [1, -12, -99, first_unknown, c_int::MAX, c_int::MIN] {
            assert_eq!(text(unknown), c"unknown code", "{unknown}");
        }
    }

    #[test]
    fn errors_in_a_child_are_told_apart() {
        let source = || std::io::Error::from_raw_os_error(libc::EPERM);
        assert_eq!(fork_code(&ForkError::Lower { role: Role::Child, source: source() }), ECHILD);
        assert_eq!(fork_code(&ForkError::Lower { role: Role::Parent, source: source() }), EPARENT);
        assert_eq!(fork_code(&ForkError::Raise { source: source() }), EACCESS);
        assert_eq!(fork_code(&ForkError::Copied), ECOPIED);
        assert_eq!(fork_code(&ForkError::Device { role: None, source: source() }), EACCESS);
        assert_eq!(fork_code(&ForkError::Device { role: Some(Role::Child), source: source() }), ECHILD);
    }
}
