//! Forks that operators ask for: the order to the VM's node, and what comes of it; and orders to other
//! platforms.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use api::{
    CloneWish, ForkedVm,
    client::{self, Content},
};
use base::{sync::lock, text::Reason};
use hyper::Method;
use node::wire::ToNode;
use serde::de::DeserializeOwned;
use vmfork_abi::ErrorCode;

use super::{Fork, Made, Target};
use crate::{Error, Platform};

/// How long a VM may take to answer, beyond its longest pause for a fork: until a vCPU has left its guest,
/// and what has failed is cleared away.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What has come of an order: the fork, which can't be called off any more, or why there is none.
type Outcome = Result<Arc<Fork>, (ErrorCode, Reason)>;

/// How long another platform may take to do what it was asked for: memory may go to a third one meanwhile, as
/// slowly as that platform's configuration has it.
const PASSED_ON: Duration = Duration::from_secs(3600);

/// The fork that is ordered of one VM, until its node has answered.
#[derive(Debug, Default)]
pub(crate) struct Ordered(Mutex<Option<Pending>>);

#[derive(Debug)]
struct Pending {
    count: u32,
    target: Target,
    /// Once it has begun.
    fork: Option<Arc<Fork>>,
    caller: mpsc::Sender<Outcome>,
}

impl Ordered {
    /// Enters an order; `None` where there is one.
    fn enter(&self, count: u32, target: Target) -> Option<mpsc::Receiver<Outcome>> {
        let mut pending = lock(&self.0);
        if pending.is_some() {
            return None;
        }
        let (caller, outcome) = mpsc::channel();
        *pending = Some(Pending { count, target, fork: None, caller });
        Some(outcome)
    }

    /// Takes back an order that its node has not heard of.
    fn withdraw(&self) {
        *lock(&self.0) = None;
    }

    /// Where the copies go, of which the node says that so many are ordered; `None` where they are not.
    pub(crate) fn target(&self, count: u32) -> Option<Target> {
        let pending = lock(&self.0);
        pending.as_ref().filter(|pending| pending.count == count).map(|pending| pending.target.clone())
    }

    /// Says that the node has begun to carry it out.
    pub(crate) fn begun(&self, fork: &Arc<Fork>) {
        if let Some(pending) = &mut *lock(&self.0) {
            pending.fork = Some(Arc::clone(fork));
        }
    }

    /// Takes the node's answer; `None` where there is nothing to be answered so.
    pub(crate) fn answered(&self, code: ErrorCode, why: Reason) -> Option<()> {
        let Pending { fork, caller, .. } = lock(&self.0).take()?;
        let outcome = if code == ErrorCode::None { Ok(fork?) } else { Err((code, why)) };
        // One who waits no longer has been told so.
        drop(caller.send(outcome));
        Some(())
    }
}

impl Platform {
    /// Forks a VM that has not asked for it, and says which copies run then.
    ///
    /// # Errors
    /// [`Error`]: there are no copies then; but for [`Error::Lost`], and [`Error::NoAnswer`].
    pub fn fork_vm(&self, named: &str, count: u32, target: Target) -> Result<Vec<ForkedVm>, Error> {
        if let Target::Platform { name, .. } = &target {
            // The VM is not stopped for nothing.
            self.cluster.get().ok_or(Error::Alone)?.find(name).map_err(Error::Cluster)?;
        }
        let id = self.find_vm(named)?;
        let failed = |code, why: Reason| Error::NotForked { vm: named.to_owned(), code, why };
        let has_ended = || failed(ErrorCode::NotLaunched, "it has ended".into());
        let entered = self.registry.get(id, |entry| match entry.runs {
            true => {
                let outcome = entry.ordered.enter(count, target);
                let outcome =
                    outcome.ok_or_else(|| failed(ErrorCode::Busy, "another operator forks it".into()))?;
                Ok((Arc::clone(&entry.link), Arc::clone(&entry.ordered), outcome))
            }
            false => Err(failed(ErrorCode::NotLaunched, "it does not run yet".into())),
        });
        let (link, ordered, outcome) = entered.ok_or_else(has_ended)??;
        // A node that a guest has broken may read nothing.
        if let Err(error) = link.try_send(&ToNode::Fork { count }, &[]) {
            ordered.withdraw();
            return Err(failed(ErrorCode::NotLaunched, Reason::of_error(&error)));
        }
        let fork = match outcome.recv_timeout(self.max_pause + ANSWER_TIMEOUT) {
            Ok(Ok(fork)) => fork,
            Ok(Err((code, why))) => return Err(failed(code, why)),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(has_ended()),
            Err(mpsc::RecvTimeoutError::Timeout) => return Err(Error::NoAnswer(id)),
        };
        let Made { running, unknown } = fork.copies();
        if running.len() == usize::try_from(count).unwrap_or(usize::MAX) {
            Ok(running)
        } else {
            Err(Error::Lost { vm: named.to_owned(), count, running: running.len(), unknown })
        }
    }

    /// Has another platform send copies of what it has, and gives its answer. It is asked once: nobody knows
    /// what has come of an order whose answer is lost.
    ///
    /// # Errors
    /// [`Error::Alone`], [`Error::Cluster`] or [`Error::PassedOn`].
    pub(crate) fn pass_on<T: DeserializeOwned>(
        &self,
        to: &str,
        path: &str,
        wish: &CloneWish,
    ) -> Result<T, Error> {
        let link = self.cluster.get().ok_or(Error::Alone)?.find(to).map_err(Error::Cluster)?;
        let asked = link
            .ask_once(PASSED_ON, |connection| connection.ask_for(Method::POST, path, Content::json(wish)?));
        asked.map_err(|source| Error::PassedOn { platform: to.to_owned(), source })
    }
}

/// What is unknown of an order that was passed on.
pub(crate) fn doubt(error: &client::Error) -> &'static str {
    match error {
        client::Error::Exchange { .. } | client::Error::Silent { .. } | client::Error::Answer { .. } => {
            ", and does not say whether it has: `host-vmm ps` tells it where they were to go"
        }
        _ => ", and does not",
    }
}

/// Of how many copies it is not known whether they run.
pub(crate) fn unknown(count: usize) -> String {
    if count == 0 { String::new() } else { format!(", and of {count} it is not known whether they do") }
}

/// What an operator can do about a fork that was not made.
pub(crate) fn advice(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Busy => "; try again when that is over",
        ErrorCode::Rate => "; try again in a second",
        ErrorCode::Timeout => "; it goes on, and nothing is left of the copies",
        ErrorCode::Incomplete => "; try again when `host-vmm ps` says that it is running",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use node::fork::rendezvous::Rendezvous;
    use types::Locality;

    #[test]
    fn a_vm_has_one_order_until_it_is_answered() {
        let ordered = Ordered::default();
        assert!(
            ordered.target(2).is_none() && ordered.answered(ErrorCode::None, Reason::default()).is_none()
        );
        for code in [ErrorCode::None, ErrorCode::Rate] {
            let outcome = ordered.enter(2, Target::Chosen(Locality::Remote)).unwrap();
            assert!(ordered.enter(1, Target::Chosen(Locality::Any)).is_none());
            assert!(ordered.target(1).is_none(), "nobody has ordered one");
            assert!(matches!(ordered.target(2), Some(Target::Chosen(Locality::Remote))));
            let fork = Fork::meeting_in(Arc::new(Rendezvous::new().unwrap()), Arc::default());
            ordered.begun(&fork);
            ordered.answered(code, "no".into()).unwrap();
            match outcome.recv().unwrap() {
                Ok(made) => assert!(code == ErrorCode::None && Arc::ptr_eq(&made, &fork)),
                Err(refused) => assert_eq!(refused, (ErrorCode::Rate, "no".into())),
            }
        }
    }

    #[test]
    fn a_fork_that_has_not_begun_is_not_made() {
        let ordered = Ordered::default();
        let outcome = ordered.enter(1, Target::Chosen(Locality::Any)).unwrap();
        assert!(ordered.answered(ErrorCode::None, Reason::default()).is_none());
        assert!(outcome.recv().is_err(), "nobody will answer");
    }

    #[test]
    fn an_order_that_is_taken_back_keeps_nobody_from_another() {
        let ordered = Ordered::default();
        let outcome = ordered.enter(1, Target::Chosen(Locality::Any)).unwrap();
        ordered.withdraw();
        assert!(outcome.recv().is_err() && ordered.target(1).is_none());
        assert!(ordered.enter(1, Target::Chosen(Locality::Any)).is_some());
    }
}
