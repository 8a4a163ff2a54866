//! The children of a fork, from their launch until it is certain that they stay.

use std::{os::fd::AsFd, sync::mpsc};

use vmfork_abi::ErrorCode;

use super::{Error, request::Order};
use crate::{
    capsule::Capsule,
    wire::{NodeLink, Step, ToNode, ToPlatform, link},
};

/// What the platform answers to this VM's forks.
pub type Replies = mpsc::Receiver<ToNode>;

/// Children that are launched, and wait. Dropping them ends them.
#[must_use]
pub(super) struct Children<'a> {
    link: &'a NodeLink,
    replies: &'a Replies,
    committed: bool,
}

/// Has the platform choose where the children go, and launch them there.
pub(super) fn launch<'a>(
    link: &'a NodeLink,
    replies: &'a Replies,
    order: &Order,
    capsule: &Capsule,
    fault: Option<Step>,
) -> Result<Children<'a>, Error> {
    let fork = ToPlatform::Fork { count: order.count, vm_type: order.vm_type.clone(), seq: order.seq, fault };
    let files = capsule.files();
    link.send(&fork, &files.iter().map(|file| file.as_fd()).collect::<Vec<_>>())?;
    match replies.recv().map_err(|_| link::Error::Closed)? {
        ToNode::Launched(_) => Ok(Children { link, replies, committed: false }),
        ToNode::Refused { code, why } => {
            Err(Error::Platform { code: ErrorCode::from_number(code).unwrap_or(ErrorCode::Internal), why })
        }
        other => Err(link::Error::Unexpected(format!("{other:?}")).into()),
    }
}

impl Children<'_> {
    /// Lets them run. From here on there is no way back.
    pub(super) fn commit(mut self) -> Result<(), Error> {
        self.link.send(&ToPlatform::Commit, &[])?;
        self.committed = true;
        Ok(())
    }
}

impl Drop for Children<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let aborted = self.link.send(&ToPlatform::Abort, &[]).and_then(|()| match self.replies.recv() {
            Ok(ToNode::Aborted) => Ok(()),
            Ok(other) => Err(link::Error::Unexpected(format!("{other:?}"))),
            Err(mpsc::RecvError) => Err(link::Error::Closed),
        });
        if let Err(error) = aborted {
            // The platform ends children whose parent's connection breaks.
            tracing::error!(%error, "can't abort a fork");
        }
    }
}
