//! Whose turn it is: a VM is in one fork at a time.

use std::sync::{Mutex, MutexGuard};

use base::sync::lock;
use types::Requester;

use super::{Error, Replies};

/// Gives out turns, one after another.
#[derive(Debug)]
pub(super) struct Turns {
    /// Who has asked for the fork that is under way.
    whose: Mutex<Option<Requester>>,
    /// What the platform answers to it.
    replies: Mutex<Replies>,
}

/// The turn of one who forks, for as long as this lives.
#[derive(Debug)]
#[must_use]
pub(super) struct Turn<'t> {
    turns: &'t Turns,
    replies: MutexGuard<'t, Replies>,
}

impl Turns {
    /// Nobody's turn. The platform answers by `replies`.
    pub(super) fn new(replies: Replies) -> Self {
        Self { whose: Mutex::new(None), replies: Mutex::new(replies) }
    }

    /// Checks that it is nobody's turn.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub(super) fn check(&self) -> Result<(), Error> {
        lock(&self.whose).map_or(Ok(()), |asker| Err(Error::Busy(asker)))
    }

    /// Takes a turn for a fork that `asker` wants.
    ///
    /// # Errors
    /// [`Error::Busy`].
    pub(super) fn take(&self, asker: Requester) -> Result<Turn<'_>, Error> {
        let mut whose = lock(&self.whose);
        if let Some(other) = *whose {
            return Err(Error::Busy(other));
        }
        *whose = Some(asker);
        Ok(Turn { turns: self, replies: lock(&self.replies) })
    }
}

impl Turn<'_> {
    /// What the platform answers to this fork.
    pub(super) fn replies(&self) -> &Replies {
        &self.replies
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.turns.whose) = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn one_forks_at_a_time_and_others_are_told_who() {
        let turns = Turns::new(mpsc::channel().1);
        for (asker, other) in [(Requester::Guest, Requester::Operator), (Requester::Operator, Requester::Guest)] {
            turns.check().unwrap();
            let turn = turns.take(asker).unwrap();
            assert!(matches!(turns.check(), Err(Error::Busy(busy)) if busy == asker));
            assert!(matches!(turns.take(other), Err(Error::Busy(busy)) if busy == asker));
            drop(turn);
        }
    }
}
