//! Starting a node, and getting its VM to the point where it only waits to run.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};

use super::{Error, Event, Platform, serve::serve};
use crate::{
    machine::VmIdentity,
    wire::{LINK_FD, PlatformLink, ToNode, ToPlatform, link},
};

/// How long a node may take to build its machine. A boot loads the kernel and the initrd in that time; on a host without
/// hardware virtualisation a thousand nodes can start at once.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// A node's process with its VM. Dropping it ends both.
#[derive(Debug)]
pub(super) struct Node {
    platform: Arc<Platform>,
    process: Child,
    link: Arc<PlatformLink>,
    identity: VmIdentity,
}

/// A node that has its order, and carries it out.
#[derive(Debug)]
pub(super) struct Launching {
    node: Node,
    console: File,
}

impl Launching {
    /// Starts a node, and gives it its order.
    pub(super) fn start(
        platform: &Arc<Platform>,
        identity: VmIdentity,
        order: &ToNode,
        files: &[&File],
    ) -> Result<Self, Error> {
        let name = identity.name.clone();
        let failed = |source| Error::Node { name: name.clone(), source };
        let (link, theirs) = PlatformLink::pair().map_err(failed)?;
        let mut command = Command::new("/proc/self/exe");
        // A group of its own: what a terminal's keys send is for the platform.
        command.arg("node").stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let mapping = FdMapping { parent_fd: theirs, child_fd: LINK_FD };
        command.fd_mappings(vec![mapping]).map_err(|error| Error::Start(io::Error::other(error)))?;
        let mut process = command.spawn().map_err(Error::Start)?;
        // The command still holds their end of the connection; without it, the node's death is seen.
        drop(command);
        let console = process.stdout.take();
        let node = Node { platform: Arc::clone(platform), process, link: Arc::new(link), identity };
        platform.registry.enter(node.identity.id, &node.link)?;
        let console = console.ok_or_else(|| Error::Start(io::Error::other("the node has no console")))?;
        node.link.send(order, &files.iter().map(|file| file.as_fd()).collect::<Vec<_>>()).map_err(failed)?;
        Ok(Self { node, console: File::from(OwnedFd::from(console)) })
    }

    /// Waits until the machine is built.
    pub(super) fn wait_ready(self) -> Result<Node, Error> {
        let Self { node, console } = self;
        let name = || node.identity.name.clone();
        let failed = |source| Error::Node { name: name(), source };
        node.link.set_time_limit(Some(READY_TIMEOUT)).map_err(failed)?;
        match node.link.receive().map_err(failed)? {
            (ToPlatform::Ready, _) => {}
            (ToPlatform::Failed(why), _) => return Err(Error::Launch { name: name(), why }),
            (other, _) => return Err(failed(link::Error::Unexpected(format!("{other:?}")))),
        }
        node.link.set_time_limit(None).map_err(failed)?;
        node.platform.consoles.add(&node.identity, console)?;
        Ok(node)
    }
}

impl Node {
    /// Lets the VM run, and serves it on a thread of its own until it ends.
    pub(super) fn run(self) -> Result<(), Error> {
        let failed = |source| Error::Node { name: self.identity.name.clone(), source };
        // The event comes first, so that none of the VM's own can come before it.
        self.platform.events.write(&Event::Started { vm: &self.identity, pid: self.process.id() });
        self.link.send(&ToNode::Go, &[]).map_err(failed)?;
        let thread = thread::Builder::new().name(format!("node-{}", self.identity.name));
        let platform = Arc::clone(&self.platform);
        thread.spawn(move || serve(&platform, self)).map_err(Error::Start)?;
        Ok(())
    }

    /// The platform that it belongs to.
    pub(super) fn platform(&self) -> &Arc<Platform> {
        &self.platform
    }

    /// Who the VM is.
    pub(super) fn identity(&self) -> &VmIdentity {
        &self.identity
    }

    /// The connection.
    pub(super) fn link(&self) -> &Arc<PlatformLink> {
        &self.link
    }

    /// Ends the process and waits for it. One that has ended by itself stays what it is: the signal changes nothing.
    pub(super) fn end(&mut self) {
        let vm = &self.identity.name;
        match self.process.kill().and_then(|()| self.process.wait()) {
            Ok(status) => tracing::debug!(vm, %status, "a node's process has ended"),
            Err(error) => tracing::error!(vm, %error, "a node's process can't be ended"),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
        self.platform.registry.leave(self.identity.id);
    }
}
