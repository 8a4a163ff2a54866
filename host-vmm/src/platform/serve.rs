//! Serving one node: its forks, until its VM ends.

use std::{fs::File, sync::Arc};

use uuid::Uuid;
use vmfork_abi::ErrorCode;

use super::{
    Error, Event, Platform,
    launch::{Launching, Node},
    link,
    protocol::{ToNode, ToPlatform},
};
use crate::{
    capsule::Capsule,
    error::chain,
    fork::Step,
    machine::{End, VmIdentity},
};

/// What a parent asks for.
struct Order {
    count: u32,
    vm_type: String,
    seq: u64,
    fault: Option<Step>,
}

impl Error {
    /// What the guest is told when this makes its fork fail.
    fn code(&self) -> ErrorCode {
        match self {
            Self::Stopping => ErrorCode::NotLaunched,
            Self::Full { .. } => ErrorCode::Place,
            Self::Injected(step) => step.code(),
            _ => ErrorCode::Launch,
        }
    }
}

/// Serves a node until its VM has ended, and says how it did: `None` where the node died instead.
pub(super) fn serve(platform: &Arc<Platform>, node: Node) -> Option<End> {
    let mut end = None;
    let broken = loop {
        match serve_one(platform, &node) {
            Ok(None) => {}
            Ok(Some(how)) => end = Some(how),
            Err(link::Error::Closed) => break None,
            Err(error) => break Some(chain(&error)),
        }
    };
    let identity = node.identity().clone();
    drop(node);
    if let Some(why) = broken {
        tracing::error!(vm = identity.name, why, "a node broke the protocol and was ended");
    }
    platform.events.write(&Event::Ended { vm: &identity, how: end.as_ref() });
    end
}

/// Serves the next message.
fn serve_one(platform: &Arc<Platform>, node: &Node) -> Result<Option<End>, link::Error> {
    let (message, files) = node.link().receive()?;
    match message {
        ToPlatform::Fork { count, vm_type, seq, fault } => {
            fork(platform, node, &Order { count, vm_type, seq, fault }, files)?;
        }
        ToPlatform::Report(report) => {
            platform.events.write(&Event::Forked { parent: node.identity(), report: &report })
        }
        ToPlatform::Ended(end) => return Ok(Some(end)),
        other => return Err(link::Error::Unexpected(format!("{other:?}"))),
    }
    Ok(None)
}

/// Launches the children of a fork, and holds them until the parent says what becomes of them. Where the parent dies before it has, they
/// end.
fn fork(platform: &Arc<Platform>, parent: &Node, order: &Order, files: Vec<File>) -> Result<(), link::Error> {
    let children = match launch_children(platform, parent, order, files) {
        Ok(children) => children,
        Err(error) => {
            return parent.link().send(&ToNode::Refused { code: error.code().number(), why: chain(&error) }, &[]);
        }
    };
    let ids = children.iter().map(|child| child.identity().id).collect();
    parent.link().send(&ToNode::Launched(ids), &[])?;
    match parent.link().receive()? {
        (ToPlatform::Commit, _) => {
            for child in children {
                let name = child.identity().name.clone();
                if let Err(error) = platform.run(child, |_, _| ()) {
                    tracing::error!(vm = name, error = chain(&error), "a child was lost after its launch");
                }
            }
            Ok(())
        }
        (ToPlatform::Abort, _) => {
            drop(children);
            parent.link().send(&ToNode::Aborted, &[])
        }
        (other, _) => Err(link::Error::Unexpected(format!("{other:?}"))),
    }
}

fn launch_children(
    platform: &Arc<Platform>,
    parent: &Node,
    order: &Order,
    files: Vec<File>,
) -> Result<Vec<Node>, Error> {
    platform.place(order)?;
    let malformed = || link::Error::Unexpected("a fork without a capsule".into());
    let failed = |source| Error::Node { name: parent.identity().name.clone(), source };
    let capsule = Capsule::from_files(files).ok_or_else(|| failed(malformed()))?;
    let names = platform.registry.names(&order.vm_type, order.count);
    // All are started before the first one is waited for: their waits overlap.
    let launching = (1..).zip(names).map(|(index, name)| {
        if order.fault == Some(Step::Launch) && index > order.count / 2 {
            return Err(Error::Injected(Step::Launch));
        }
        let identity = VmIdentity {
            id: Uuid::new_v4(),
            parent: parent.identity().id,
            name,
            vm_type: order.vm_type.clone(),
            index,
            count: order.count,
            generation: parent.identity().generation + 1,
        };
        let restore = ToNode::Restore { identity: identity.clone(), seq: order.seq };
        Launching::start(platform, identity, &restore, &capsule.files())
    });
    let launching: Vec<Launching> = launching.collect::<Result<_, _>>()?;
    launching.into_iter().map(Launching::wait_ready).collect()
}

impl Platform {
    /// Chooses where the children of a fork go: all of them here, where there is room for all.
    fn place(&self, order: &Order) -> Result<(), Error> {
        if order.fault == Some(Step::Place) {
            return Err(Error::Injected(Step::Place));
        }
        let wanted = usize::try_from(order.count).unwrap_or(usize::MAX);
        self.registry.check_room(wanted, self.max_vms)
    }
}
