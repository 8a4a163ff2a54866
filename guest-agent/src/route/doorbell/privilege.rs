//! Whether the caller may give a copy its identity, asked while there is only one VM.

use std::io;

use crate::raw;

/// What the steps after the fork need, with the numbers of linux/capability.h.
const NEEDED: [(u32, &str); 3] = [
    // To credit the random seed and to set the host name.
    (21, "CAP_SYS_ADMIN"),
    // To run before the other tasks of the vCPU.
    (23, "CAP_SYS_NICE"),
    // To step the clock.
    (25, "CAP_SYS_TIME"),
];

/// Why the caller may not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrivilegeError {
    /// The kernel does not tell.
    #[error("the thread's capabilities can't be read")]
    Read {
        /// What capget(2) answered.
        source: io::Error,
    },
    /// The calling thread lacks a capability.
    #[error("the calling thread lacks {missing}")]
    Missing {
        /// Names of the missing capabilities, separated by commas.
        missing: String,
    },
}

/// Passes if the calling thread has every capability that a fork needs after the doorbell.
///
/// # Errors
///
/// [`PrivilegeError`], which names all that are missing.
pub(crate) fn check() -> Result<(), PrivilegeError> {
    let effective = raw::effective_capabilities().map_err(|source| PrivilegeError::Read { source })?;
    let missing = missing(effective);
    if missing.is_empty() { Ok(()) } else { Err(PrivilegeError::Missing { missing: missing.join(", ") }) }
}

/// Names of the needed capabilities that are not among the `effective` ones.
fn missing(effective: u64) -> Vec<&'static str> {
    NEEDED.iter().filter(|(number, _)| effective >> number & 1 == 0).map(|&(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_missing_capability_is_named() {
        assert_eq!(missing(u64::MAX), [""; 0]);
        assert_eq!(missing(0), ["CAP_SYS_ADMIN", "CAP_SYS_NICE", "CAP_SYS_TIME"]);
        assert_eq!(missing(!(1 << 25)), ["CAP_SYS_TIME"]);
    }
}
