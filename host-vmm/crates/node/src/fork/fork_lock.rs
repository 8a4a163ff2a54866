//! Lock of a VM's forks: a VM is in one fork at a time.

use std::sync::{Mutex, MutexGuard};

use base::sync::lock;
use types::Requester;

use super::{Error, Replies};

/// Lock that the thread holds that forks the VM. Unlike a mutex, it does not wait: the holder is told.
#[derive(Debug)]
pub(super) struct ForkLock {
    /// Who has asked for the fork that is under way.
    holder: Mutex<Option<Requester>>,
    /// What the platform answers to it.
    replies: Mutex<Replies>,
}

/// Guard of the lock, for as long as a fork is under way.
#[derive(Debug)]
#[must_use]
pub(super) struct ForkGuard<'t> {
    fork_lock: &'t ForkLock,
    replies: MutexGuard<'t, Replies>,
}

impl ForkLock {
    /// An open lock. The platform answers by `replies`.
    pub(super) fn new(replies: Replies) -> Self {
        Self { holder: Mutex::new(None), replies: Mutex::new(replies) }
    }

    /// Checks that no fork is under way.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub(super) fn check(&self) -> Result<(), Error> {
        lock(&self.holder).map_or(Ok(()), |requester| Err(Error::Busy(requester)))
    }

    /// Takes the lock for a fork that `requester` wants.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub(super) fn take(&self, requester: Requester) -> Result<ForkGuard<'_>, Error> {
        let mut holder = lock(&self.holder);
        if let Some(other) = *holder {
            return Err(Error::Busy(other));
        }
        *holder = Some(requester);
        Ok(ForkGuard { fork_lock: self, replies: lock(&self.replies) })
    }
}

impl ForkGuard<'_> {
    /// What the platform answers to this fork.
    pub(super) fn replies(&self) -> &Replies {
        &self.replies
    }
}

impl Drop for ForkGuard<'_> {
    fn drop(&mut self) {
        *lock(&self.fork_lock.holder) = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn one_forks_at_a_time_and_others_are_told_who() {
        let fork_lock = ForkLock::new(mpsc::channel().1);
        for (requester, other) in
            [(Requester::Guest, Requester::Operator), (Requester::Operator, Requester::Guest)]
        {
            fork_lock.check().unwrap();
            let guard = fork_lock.take(requester).unwrap();
            assert!(matches!(fork_lock.check(), Err(Error::Busy(busy)) if busy == requester));
            assert!(matches!(fork_lock.take(other), Err(Error::Busy(busy)) if busy == requester));
            drop(guard);
        }
    }
}
