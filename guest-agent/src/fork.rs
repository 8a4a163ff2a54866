//! The fork, in the order in which it happens.

use std::time::Duration;
use std::{io, thread};

use vmfork_abi::{ErrorCode, Role};

use crate::lock::ForkLock;
use crate::random::{self, RandomPool};
use crate::raw::{DoorbellPort, Scheduling};
use crate::{
    Fork, ForkRequest, IdentityError, LockError, OpenError, OutcomeError, PrivilegeError, Vmm, identity, privilege,
};

/// How often, and after what time, a request is made again that is refused since an operator forks this VM. For most of that time the VM stands
/// still.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(10);

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
    /// Another caller's fork made this VM while this caller waited for its turn, or an operator's. Its request is the parent's to make:
    /// were it made here too, forks would multiply.
    #[error("this VM is a copy made by somebody else's fork")]
    Copied,
    /// The caller could not give a copy its identity.
    #[error("the caller may not set up a copy")]
    Privilege(#[source] PrivilegeError),
    /// The kernel's random pool can't be reached.
    #[error("{} can't be opened", random::PATH)]
    OpenRandom {
        /// What open(2) answered.
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
    /// The VMM did not look at the request: it is busy with another, or gone.
    #[error("the VMM did not answer request {seq}, the last it answered is {last}")]
    NotAnswered {
        /// Number of this request.
        seq: u64,
        /// Number in the response.
        last: u64,
    },
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
    /// Which VM this error is in, where a fork was made; `None` where none was, or the VMM's answer does not say.
    ///
    /// A worker must not run in a child with an error: it can share random numbers, name or time with other VMs.
    pub fn role(&self) -> Option<Role> {
        match self {
            Self::Copied => Some(Role::Child),
            Self::Outcome { role, .. } => *role,
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

/// What the steps around the doorbell use, made before it so that a lack of it fails while there is only one VM.
struct Tools {
    port: DoorbellPort,
    pool: RandomPool,
    /// Of this VM, when the request was made.
    generation: u32,
    /// Held until the identity is complete too: another fork in between would copy a VM that is half itself.
    _lock: ForkLock,
}

impl Vmm {
    /// Goes through a fork but for the doorbell, to tell whether the calling thread could fork this VM.
    ///
    /// # Errors
    ///
    /// What [`Vmm::fork`] would return without asking the VMM.
    pub fn check(&self) -> Result<(), ForkError> {
        let _tools = self.prepare()?;
        raise().and_then(|old| old.apply()).map_err(|source| ForkError::Raise { source })
    }

    /// Forks this VM, and returns in the parent and in every child.
    ///
    /// Callers in one guest are served one after another, and after an operator who forks this VM; see [`ForkError::Copied`] for those that
    /// wait. A child's random
    /// pool, host name and clock are its own before this returns, and before any other task of the calling vCPU runs.
    /// Tasks on other vCPUs are not held back.
    ///
    /// The caller needs CAP_SYS_RAWIO for the doorbell, CAP_SYS_NICE to run first, CAP_SYS_ADMIN for seed and host name,
    /// and CAP_SYS_TIME.
    ///
    /// # Errors
    ///
    /// [`ForkError`], in the caller's VM or in a copy: see [`ForkError::role`].
    pub fn fork(&self, request: &ForkRequest) -> Result<Fork, ForkError> {
        let tools = self.prepare()?;
        for _ in 1..TRIES {
            match self.fork_once(&tools, request) {
                Err(ForkError::Refused(ErrorCode::Busy)) => thread::sleep(PAUSE),
                other => return other,
            }
            self.check_original(tools.generation)?;
        }
        self.fork_once(&tools, request)
    }

    /// Asks for a fork once.
    fn fork_once(&self, tools: &Tools, request: &ForkRequest) -> Result<Fork, ForkError> {
        let old = raise().map_err(|source| ForkError::Raise { source })?;
        let forked = self.ring(tools, request);
        let lowered = old.apply();
        let fork = forked?;
        lowered.map_err(|source| ForkError::Lower { role: fork.role, source })?;
        Ok(fork)
    }

    /// Makes what the rest of the fork uses, and waits for its turn.
    fn prepare(&self) -> Result<Tools, ForkError> {
        let port = self.route.acquire_port()?;
        privilege::check().map_err(ForkError::Privilege)?;
        let pool = RandomPool::open().map_err(|source| ForkError::OpenRandom { source })?;
        let generation = self.route.identity().generation;
        let lock = ForkLock::acquire().map_err(ForkError::Lock)?;
        self.check_original(generation)?;
        Ok(Tools { port, pool, generation, _lock: lock })
    }

    /// Checks that this is not a copy of the VM that had this generation.
    fn check_original(&self, generation: u32) -> Result<(), ForkError> {
        if self.route.identity().generation == generation { Ok(()) } else { Err(ForkError::Copied) }
    }

    /// Rings, and makes the VM in which that returns the one that it should be.
    fn ring(&self, tools: &Tools, request: &ForkRequest) -> Result<Fork, ForkError> {
        let doorbell_at = identity::monotonic().map_err(|source| ForkError::ReadClock { source })?;
        let account = self.route.fork(&tools.port, request)?;
        let identity = &account.identity;
        // From here on there are several VMs, and this is any one of them.
        let fork =
            Fork::after_fork(&account).map_err(|source| ForkError::Outcome { role: side(identity.role), source })?;
        identity::assume(&fork, identity, &tools.pool, doorbell_at)
            .map_err(|source| ForkError::Identity { role: fork.role, source })?;
        Ok(fork)
    }
}

/// The side of a fork that `number` stands for, if it does.
fn side(number: u32) -> Option<Role> {
    Role::from_number(number).filter(|&role| role != Role::Booted)
}

/// Raises the calling thread above every other task of its vCPU, and returns how it was scheduled before.
fn raise() -> io::Result<Scheduling> {
    let old = Scheduling::current()?;
    // What can't be put back later, as a deadline task can't, is left alone.
    old.apply()?;
    Scheduling::TOP.apply()?;
    Ok(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_tell_which_vm_they_are_in() {
        let source = || io::Error::from_raw_os_error(libc::EPERM);
        let incomplete = ForkError::Identity { role: Role::Child, source: IdentityError::MixSeed { source: source() } };
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
