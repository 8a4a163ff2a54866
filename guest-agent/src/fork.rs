//! How a fork ends: which VM this is, or why there is no other.

use std::io;

use vmfork_abi::{ErrorCode, Role, device};

use crate::route::RawReport;
use crate::route::doorbell::RANDOM_PATH;
use crate::{Fork, IdentityError, LockError, OpenError, OutcomeError, PrivilegeError};

/// Why a fork was not made, or why this VM must not go on after it; [`ForkError::role`] tells which.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForkError {
    /// The VMM can't be reached.
    #[error("the VMM can't be reached")]
    Open(#[source] OpenError),
    /// The guest-wide lock can't be had.
    #[error("the fork lock can't be taken")]
    Lock(#[source] LockError),
    /// Another caller's fork made this VM while this caller waited for its turn, or an operator's before its
    /// request was served. The request is the parent's to make: were it made here too, forks would multiply.
    #[error("this VM is a copy made by somebody else's fork")]
    Copied,
    /// It was not this caller's turn before its deadline
    /// ([`ForkRequest::with_timeout`](crate::ForkRequest::with_timeout)).
    #[error("the deadline passed before it was this caller's turn")]
    DeadlinePassed,
    /// A signal came while this caller waited for its turn.
    #[error("a signal came before it was this caller's turn")]
    Interrupted,
    /// The caller could not give a copy its identity.
    #[error("the caller may not set up a copy")]
    Privilege(#[source] PrivilegeError),
    /// The kernel's random pool can't be reached.
    #[error("{RANDOM_PATH} can't be opened or read")]
    OpenRandom {
        /// What open(2) or read(2) answered.
        source: io::Error,
    },
    /// The kernel does not let this thread ring the doorbell.
    #[error("the doorbell port {port:#x} can't be used")]
    Port {
        /// The port.
        port: u16,
        /// What ioperm(2) answered.
        source: io::Error,
    },
    /// The monotonic clock can't be read.
    #[error("the monotonic clock can't be read")]
    ReadClock {
        /// What clock_gettime(2) answered.
        source: io::Error,
    },
    /// Other tasks of this vCPU could run in a copy before its identity is complete.
    #[error("the calling thread can't be raised to the highest real-time priority")]
    Raise {
        /// What the scheduler's system call answered.
        source: io::Error,
    },
    /// The VMM did not look at the request: it is busy with another's, or gone. Callers of this library wait
    /// for each other, and come to no such end.
    #[error(
        "the VMM did not answer request {seq}, the last it answered is {last}: if the VMM is there, look for \
         a program that rings without waiting for its turn, such as one with an older vmfork"
    )]
    NotAnswered {
        /// Number of this request.
        seq: u64,
        /// Number in the response.
        last: u64,
    },
    /// The VMM did not look at the kernel module's request.
    #[error("the VMM did not answer the kernel module")]
    Silent,
    /// The VMM said no, and why.
    #[error("the VMM made no fork: {0}")]
    Refused(ErrorCode),
    /// The VMM's answer makes no sense in this version of the ABI.
    #[error("the VMM answered with status {status} and error {error}, which mean nothing together")]
    UnknownAnswer {
        /// A number that should be a [`vmfork_abi::Status`].
        status: u32,
        /// A number that should be an [`ErrorCode`].
        error: u32,
    },
    /// The VMM's answer makes no sense to the kernel module, and does not say that there was a fork.
    #[error("the VMM's answer makes no sense to the kernel module")]
    Senseless,
    /// The kernel module failed.
    #[error("{} has not forked this VM", device::PATH)]
    Device {
        /// Which VM this is, where there was a fork all the same.
        role: Option<Role>,
        /// What the ioctl answered.
        source: io::Error,
    },
    /// The fork was made, but the VMM left this VM no possible identity, or list of copies.
    #[error("the fork left this VM without a valid identity")]
    Outcome {
        /// The role, where that much could be read.
        role: Option<Role>,
        /// What is wrong.
        source: OutcomeError,
    },
    /// The fork was made, but this VM did not become who it is.
    #[error("this {role} is incomplete")]
    Identity {
        /// Which VM this is.
        role: Role,
        /// The step that failed.
        source: IdentityError,
    },
    /// The fork was made, but the calling thread still runs above all others.
    #[error("the calling thread in this {role} can't be put back to its old priority")]
    Lower {
        /// Which VM this is.
        role: Role,
        /// What sched_setscheduler(2) answered.
        source: io::Error,
    },
}

impl ForkError {
    /// Which VM this error is in, where a fork was made; `None` where none was, or the VMM's answer does not
    /// say.
    ///
    /// A worker must not run in a child with an error: it can share random numbers, name or time with other
    /// VMs.
    pub fn role(&self) -> Option<Role> {
        match self {
            Self::Copied => Some(Role::Child),
            Self::Outcome { role, .. } | Self::Device { role, .. } => *role,
            Self::Identity { role, .. } | Self::Lower { role, .. } => Some(*role),
            _ => None,
        }
    }

    /// The code with which the VMM refused, if it did.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(code) => Some(*code),
            _ => None,
        }
    }
}

/// Which VM this is, right after a fork.
///
/// # Errors
///
/// [`ForkError::Outcome`] where what the VMM says of it is impossible.
pub(crate) fn which(report: &RawReport) -> Result<Fork, ForkError> {
    Fork::after_fork(report).map_err(|source| ForkError::Outcome { role: report.side(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_tell_which_vm_they_are_in() {
        let source = || io::Error::from_raw_os_error(libc::EPERM);
        let incomplete =
            ForkError::Identity { role: Role::Child, source: IdentityError::MixSeed { source: source() } };
        assert_eq!(incomplete.role(), Some(Role::Child));
        assert_eq!(ForkError::Lower { role: Role::Parent, source: source() }.role(), Some(Role::Parent));
        assert_eq!(ForkError::Copied.role(), Some(Role::Child));
        assert_eq!(ForkError::Raise { source: source() }.role(), None);
    }

    #[test]
    fn a_refusal_has_its_code_and_no_role() {
        let refused = ForkError::Refused(ErrorCode::Busy);
        assert_eq!((refused.code(), refused.role()), (Some(ErrorCode::Busy), None));
        assert_eq!(refused.to_string(), "the VMM made no fork: a fork of this VM is under way");
    }
}
