//! Serving one node: its forks, until its VM ends.

use std::fs::File;

use uuid::Uuid;
use vmfork_abi::{ErrorCode, is_vm_type};

use super::{
    Error, Event, Platform,
    launch::{Launching, Node},
};
use crate::{
    capsule::Capsule,
    error::chain,
    machine::{End, VmIdentity},
    sync::lock,
    wire::{Step, ToNode, ToPlatform, link},
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
            Self::Type(_) => ErrorCode::InvalidType,
            Self::Injected(step) => step.code(),
            _ => ErrorCode::Launch,
        }
    }
}

/// Serves a node until its VM has ended.
pub(super) fn serve(platform: &Platform, mut node: Node) {
    let mut end = None;
    loop {
        match serve_one(&node) {
            Ok(None) => {}
            Ok(Some(how)) => end = Some(how),
            Err(link::Error::Closed) => break,
            Err(error) => {
                let vm = &node.identity().name;
                tracing::error!(vm, error = chain(&error), "a node broke the protocol and is ended");
                break;
            }
        }
    }
    node.end();
    // Before the node is dropped: with the last one, the platform comes to its end.
    platform.events.write(&Event::Ended { vm: node.identity(), how: end.as_ref() });
    if node.identity().generation == 0 {
        *lock(&platform.root_end) = end;
    }
    drop(node);
}

/// Serves the next message.
fn serve_one(node: &Node) -> Result<Option<End>, link::Error> {
    let (message, files) = node.link().receive()?;
    match message {
        ToPlatform::Fork { count, vm_type, seq, fault } => {
            fork(node, &Order { count, vm_type, seq, fault }, files)?;
        }
        ToPlatform::Report(report) => {
            node.platform().events.write(&Event::Forked { parent: node.identity(), report: &report })
        }
        ToPlatform::Ended(end) => return Ok(Some(end)),
        other => return Err(link::Error::Unexpected(format!("{other:?}"))),
    }
    Ok(None)
}

/// Launches the children of a fork, and holds them until the parent says what becomes of them. Where the parent dies before it has, they
/// end.
fn fork(parent: &Node, order: &Order, files: Vec<File>) -> Result<(), link::Error> {
    let children = match launch_children(parent, order, files) {
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
                if let Err(error) = child.run() {
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

fn launch_children(parent: &Node, order: &Order, files: Vec<File>) -> Result<Vec<Node>, Error> {
    let platform = parent.platform();
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
        // The node has checked it; but a node that a guest has broken must not choose the names of this platform's files.
        if !is_vm_type(&order.vm_type) {
            return Err(Error::Type(order.vm_type.clone()));
        }
        let wanted = usize::try_from(order.count).unwrap_or(usize::MAX);
        self.registry.check_room(wanted, self.max_vms)
    }
}
