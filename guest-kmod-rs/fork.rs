// SPDX-License-Identifier: GPL-2.0

//! The fork, in the order in which it happens.

use kernel::{error::Error, prelude::*};
use vmfork_abi::{doorbell, ErrorCode, Identity, Request, Role};

use crate::{
    bindings,
    control_page::{Failure, RawReport, STABLE},
    device::Device,
    fork_guard::ForkGuard,
    identity::{self, monotonic_ns},
    stop,
    task::Job,
};

/// How often, and after what time in milliseconds, a request is made again that is refused since an
/// operator forks this VM. For most of that time the VM stands still.
const TRIES: u32 = 100;
const PAUSE: u32 = 10;

/// What came of a request, in the VM in which this is looked at.
pub(crate) struct Outcome {
    /// `Ok` where the fork was made and this VM is who it should be.
    pub(crate) result: Result,
    /// Why the VMM refused.
    pub(crate) code: ErrorCode,
    /// Who this VM is, where the fork was made.
    pub(crate) report: Option<RawReport>,
    /// What a parent is told of its copies, as many as fit.
    pub(crate) copies: KVVec<u8>,
}

impl Outcome {
    fn failed(error: Error, copies: KVVec<u8>) -> Self {
        Self {
            result: Err(error),
            code: ErrorCode::None,
            report: None,
            copies,
        }
    }
}

impl Device {
    /// Forks the VM, and returns in the parent and in every child. Of the copies, a parent is told
    /// as many as fit into `copies`.
    pub(crate) fn fork(
        &self,
        request: Request,
        deadline_ns: u64,
        mut copies: KVVec<u8>,
    ) -> Outcome {
        let guard = match ForkGuard::take(self, deadline_ns) {
            Ok(guard) => guard,
            Err(error) => return Outcome::failed(error, copies),
        };
        let request = Request {
            asker: guard.asker(),
            ..request
        };
        for _ in 1..TRIES {
            let outcome = self.job_slot().run(Job::Fork { request, copies });
            if outcome.code != ErrorCode::Busy {
                return outcome;
            }
            copies = outcome.copies;
            if let Err(error) = guard.pause(PAUSE, deadline_ns) {
                return Outcome::failed(error, copies);
            }
        }
        self.job_slot().run(Job::Fork { request, copies })
    }

    /// Does a job, as the module's own task, for whoever has the fork guard.
    pub(crate) fn work(&self, job: Job) -> Outcome {
        match job {
            Job::Fork { request, copies } => self.fork_once(&request, copies),
            Job::CatchUp => self.catch_up(),
        }
    }

    /// Asks for a fork once.
    fn fork_once(&self, request: &Request, mut copies: KVVec<u8>) -> Outcome {
        let exchanged = stop::with_machine_stopped(|| self.exchange(request, &mut copies));
        let exchanged = match exchanged {
            Ok(exchanged) => exchanged,
            Err(error) => return Outcome::failed(error, copies),
        };
        match exchanged {
            Ok((report, rung_at_ns)) => {
                let result = self.take_on(&report.identity, Some(rung_at_ns));
                Outcome {
                    result,
                    code: ErrorCode::None,
                    report: Some(report),
                    copies,
                }
            }
            Err(Failure::Copied | Failure::Refused(ErrorCode::Copied)) => {
                Outcome::failed(errno(bindings::ESTALE), copies)
            }
            Err(Failure::Refused(code)) => Outcome {
                code,
                ..Outcome::failed(errno(bindings::ECONNREFUSED), copies)
            },
            Err(Failure::NotAnswered) => Outcome::failed(errno(bindings::ENOLINK), copies),
            Err(Failure::Nonsense { status, error }) => {
                pr_warn!("status {status} and error {error} mean nothing together\n");
                Outcome::failed(errno(bindings::EPROTO), copies)
            }
        }
    }

    /// Makes the request, and sees to it that no number is drawn before the generator has the seed
    /// of the VM that this returns in. It runs while the machine is stopped: whatever it calls may
    /// not sleep. Gives the time at which it rang, too.
    fn exchange(&self, request: &Request, copies: &mut [u8]) -> Result<(RawReport, u64), Failure> {
        let rung_at_ns = monotonic_ns();
        let report = self.page().exchange(request, copies, || self.ring())?;
        // From here on there are several VMs, and this is any one of them.
        self.generator().reseed(&report.identity.seed);
        Ok((report, rung_at_ns))
    }

    /// Makes this VM the copy that it has become. An operator may make a copy of that meanwhile:
    /// then again, if not for ever, since the next one who uses the device looks again.
    fn catch_up(&self) -> Outcome {
        let mut identity = self.page().identity();
        let mut result = self.catch_up_once(&identity);
        for _ in 1..STABLE {
            let now = self.page().identity();
            if now.generation == identity.generation {
                break;
            }
            identity = now;
            result = self.catch_up_once(&identity);
        }
        Outcome {
            result,
            code: ErrorCode::None,
            report: None,
            copies: KVVec::new(),
        }
    }

    fn catch_up_once(&self, identity: &Identity) -> Result {
        self.generator().reseed(&identity.seed);
        self.take_on(identity, None)
    }

    /// Makes the hypercall. If KVM does not hand it on, the request stays unanswered.
    fn ring(&self) {
        let result = self.hypercall().ring(self.page().gpa(), doorbell::FORK);
        if result != doorbell::HYPERCALL_ANSWERED {
            pr_warn!("the hypercall returned {result}\n");
        }
    }

    /// [Makes](Self::assume) this VM the one that `identity` describes, and tells those who wait.
    fn take_on(&self, identity: &Identity, rung_at_ns: Option<u64>) -> Result {
        let result = self.assume(identity, rung_at_ns);
        self.note(identity);
        result
    }

    /// Makes this VM the one that `identity` describes, whose seed the generator has: in a child,
    /// the generator's users are told, the clock is set and a uevent is sent, all of which may
    /// sleep. Without the time at which the fork was asked for, the clock stays as it is.
    ///
    /// # Errors
    ///
    /// `EPROTO` where the role is not one of a fork's two, `EUCLEAN` where a child's clock can't be
    /// set.
    fn assume(&self, identity: &Identity, rung_at_ns: Option<u64>) -> Result {
        match Role::from_number(identity.role) {
            Some(Role::Parent) => Ok(()),
            Some(Role::Child) => {
                self.generator().tell_users(&identity.seed);
                let started_ns = identity.wall_clock_ns;
                let stepped = rung_at_ns.map_or(Ok(()), |at| identity::step_clock(started_ns, at));
                self.announce(identity);
                stepped.map_err(|_| errno(bindings::EUCLEAN))
            }
            Some(Role::Booted) | None => Err(errno(bindings::EPROTO)),
        }
    }
}

/// The error with one of the numbers for which the `kernel` crate has no name.
pub(crate) fn errno(number: u32) -> Error {
    Error::from_errno(-(number as i32))
}
