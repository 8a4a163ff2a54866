//! The children of a fork, from the order to launch them until it is certain that they stay.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use base::text::Reason;
use types::ForkStep;
use vmfork_abi::{ErrorCode, ListedCopy};

use super::{
    Error, copy_list,
    rendezvous::{self, Rendezvous},
    standby::WakeEvent,
};
use crate::wire::{ForkOrder, NodeLink, ToNode, ToPlatform, link};

/// What the platform answers to this VM's forks.
pub type Replies = mpsc::Receiver<ToNode>;

/// Children that are being launched. Dropping them calls the fork off, and ends them.
#[must_use]
pub(super) struct Children<'a> {
    link: &'a NodeLink,
    replies: &'a Replies,
    /// Until it is certain what becomes of them.
    rendezvous: Option<Rendezvous>,
    count: u32,
    /// Wakes up the one that stands by, where there is one.
    wake_event: Option<WakeEvent>,
}

/// Children that run: what they were launched by, to be dropped when there is time.
#[derive(Debug)]
pub(super) struct CommittedChildren {
    _rendezvous: Rendezvous,
    _wake_event: Option<WakeEvent>,
}

/// Has the platform choose where the children go, and start to launch them there. `files` are those of the
/// image to come; where there is a wake event, the platform has them already.
pub(super) fn place<'a>(
    link: &'a NodeLink,
    replies: &'a Replies,
    order: &ForkOrder,
    rendezvous: Rendezvous,
    files: &[Arc<File>],
    wake_event: Option<WakeEvent>,
    fault: Option<ForkStep>,
) -> Result<Children<'a>, Error> {
    let count = order.count();
    let rendezvous = rendezvous.with_children(count);
    rendezvous.occupy()?;
    let announced = wake_event.is_some();
    let fork = ToPlatform::Fork { order: order.clone(), announced, fault };
    let image = if announced { &[] } else { files };
    let files = std::iter::once(rendezvous.file()).chain(image.iter().map(AsRef::as_ref));
    link.send(&fork, &files.map(AsFd::as_fd).collect::<Vec<_>>())?;
    Ok(Children { link, replies, rendezvous: Some(rendezvous), count, wake_event })
}

impl Children<'_> {
    /// Wakes up the one that stands by: its state comes soon. Where there is no processor to spare, its order
    /// will.
    pub(super) fn wake(&self) -> Result<(), Error> {
        match &self.wake_event {
            Some(wake_event) if self.rendezvous()?.spins() => Ok(wake_event.wake()?),
            _ => Ok(()),
        }
    }

    /// Gives them their state.
    pub(super) fn hand_over(&self, state: &[u8]) -> Result<(), Error> {
        Ok(self.rendezvous()?.publish(state)?)
    }

    /// Waits until all of them are ready to run, for as long as a fork that `began` then may take. The
    /// platform ends what it sees to fail earlier.
    pub(super) fn wait(&mut self, began: Instant, max_pause: Duration) -> Result<(), Error> {
        let limit = max_pause.saturating_sub(began.elapsed());
        let arrived = self.rendezvous()?.wait_arrivals(self.count, limit, || self.link.is_closed());
        match arrived {
            Err(rendezvous::Error::ChildFailed | rendezvous::Error::Aborted) => Err(self.call_off()?),
            Err(rendezvous::Error::Gone) if !self.link.is_closed() => {
                // Nothing of them is left when the parent goes on.
                self.call_off()?;
                Err(Error::Late(max_pause))
            }
            other => Ok(other?),
        }
    }

    /// The list of copies for the parent's guest, once they are ready to run.
    pub(super) fn copy_list(&self) -> Result<Vec<ListedCopy>, Error> {
        Ok(copy_list::take(self.rendezvous()?, self.count)?)
    }

    /// Lets them run. From here on there is no way back. What is left is to be dropped when there is time for
    /// it.
    pub(super) fn commit(mut self) -> Result<CommittedChildren, Error> {
        match self.rendezvous()?.commit() {
            // The platform has found one gone that had been ready.
            Err(rendezvous::Error::Aborted) => return Err(self.call_off()?),
            committed => committed?,
        }
        let rendezvous = self.rendezvous.take().ok_or(Error::Committed)?;
        Ok(CommittedChildren { _rendezvous: rendezvous, _wake_event: self.wake_event.take() })
    }

    fn rendezvous(&self) -> Result<&Rendezvous, Error> {
        self.rendezvous.as_ref().ok_or(Error::Committed)
    }

    /// Calls the fork off, waits until nothing is left of it, and gives the platform's reason, if it has one.
    fn call_off(&mut self) -> Result<Error, Error> {
        // Whatever comes of this: it is not done twice.
        self.rendezvous.take().ok_or(Error::Committed)?.abort()?;
        self.link.send(&ToPlatform::Abort, &[])?;
        match self.replies.recv() {
            Ok(ToNode::Aborted { code, why }) => {
                Ok(Error::Platform { code: ErrorCode::from_number(code).unwrap_or(ErrorCode::Launch), why })
            }
            Ok(other) => Err(link::Error::Unexpected(Reason::of(format_args!("{other:?}"))).into()),
            Err(mpsc::RecvError) => Err(link::Error::Closed.into()),
        }
    }
}

impl Drop for Children<'_> {
    fn drop(&mut self) {
        if self.rendezvous.is_some()
            && let Err(error) = self.call_off()
        {
            // The platform ends children whose parent's connection breaks.
            tracing::error!(%error, "can't call a fork off");
        }
    }
}
