//! The processes of a platform: its zygote, and the nodes that come from it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use command_fds::{CommandFdExt, FdMapping};
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use rustix::process::{Signal, pidfd_send_signal};

use super::Error;
use crate::{
    cli,
    machine::Config,
    sync::lock,
    threads,
    wire::{LINK_FD, PlatformLink, Spawn, Spawned, ZygoteLink},
};

/// Most orders that are sent to the zygote before its answers are read: neither side may wait for room in a socket that the other one
/// does not read.
pub(super) const BATCH: usize = 32;

/// A node's process. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    handle: OwnedFd,
}

impl Process {
    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Has its first thread leave a processor to others, until that thread itself decides otherwise.
    pub(super) fn keep_off(&self, processor: u32) {
        if let Err(error) = threads::keep_off(Some(self.pid), processor) {
            tracing::debug!(%error, pid = self.pid, processor, "a node can't be kept off a processor");
        }
    }
}

impl AsFd for Process {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

impl Drop for Process {
    /// Ends the process, and waits until it has ended. One that has ended by itself stays what it is.
    fn drop(&mut self) {
        match pidfd_send_signal(&self.handle, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => tracing::error!(%errno, pid = self.pid, "a node can't be ended"),
        }
        let mut fds = [PollFd::new(self.handle.as_fd(), PollFlags::POLLIN)];
        while poll(&mut fds, PollTimeout::NONE) == Err(nix::Error::EINTR) {}
    }
}

/// A node without an order: a machine of a certain shape that stands ready, or is about to.
#[derive(Debug)]
pub(super) struct Shell {
    pub(super) config: Config,
    pub(super) link: Arc<PlatformLink>,
    pub(super) console: File,
    pub(super) process: Process,
}

impl Shell {
    /// Ends it before it can see that nobody speaks with it any more, and say so to others.
    pub(super) fn end(self) {
        let Self { link, process, .. } = self;
        drop(process);
        drop(link);
    }
}

/// The zygote. It is started when the first node is, and again when it is gone.
#[derive(Debug)]
pub(super) struct Zygote {
    /// The CPU profile, as text.
    cpu_profile: String,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    link: ZygoteLink,
    process: Child,
}

impl Zygote {
    /// One that is yet to be started.
    pub(super) fn new(cpu_profile: String) -> Self {
        Self { cpu_profile, running: Mutex::default() }
    }

    /// Starts nodes, all at once. The vCPUs of cold ones run nothing before they get their order.
    pub(super) fn spawn(&self, config: Config, is_cold: bool, count: usize) -> Result<Vec<Shell>, Error> {
        let mut zygote = lock(&self.running);
        let running = Running::get(&mut zygote, &self.cpu_profile);
        let result = running.and_then(|running| running.spawn(Spawn { config, is_cold }, count));
        if matches!(result, Err(Error::Zygote(_))) {
            // The next one who needs it starts another.
            *zygote = None;
        }
        result
    }
}

impl Running {
    fn get<'z>(zygote: &'z mut Option<Self>, cpu_profile: &str) -> Result<&'z mut Self, Error> {
        if zygote.as_ref().is_some_and(|running| running.link.is_closed()) {
            *zygote = None;
        }
        match zygote {
            Some(running) => Ok(running),
            None => Ok(zygote.insert(Self::start(cpu_profile)?)),
        }
    }

    fn start(cpu_profile: &str) -> Result<Self, Error> {
        // Nodes inherit what this thread may use.
        threads::use_all_processors();
        let (link, theirs) = ZygoteLink::pair().map_err(Error::Zygote)?;
        let mut command = Command::new("/proc/self/exe");
        // A group of its own: what a terminal's keys send is for the platform.
        command.arg("zygote").env(cli::Zygote::CPU_PROFILE, cpu_profile);
        command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
        let mapping = FdMapping { parent_fd: theirs, child_fd: LINK_FD };
        command.fd_mappings(vec![mapping]).map_err(|error| Error::Start(io::Error::other(error)))?;
        let process = command.spawn().map_err(Error::Start)?;
        Ok(Self { link, process })
    }

    fn spawn(&self, spawn: Spawn, count: usize) -> Result<Vec<Shell>, Error> {
        let mut shells = Vec::with_capacity(count);
        while shells.len() < count {
            let batch = BATCH.min(count - shells.len());
            // Each is ordered before the first one is waited for.
            let ordered: Vec<_> = (0..batch).map(|_| self.order(spawn)).collect::<Result<_, _>>()?;
            for (link, console) in ordered {
                let process = self.take_process()?;
                shells.push(Shell { config: spawn.config, link: Arc::new(link), console, process });
            }
        }
        Ok(shells)
    }

    fn order(&self, spawn: Spawn) -> Result<(PlatformLink, File), Error> {
        let (link, their_link) = PlatformLink::pair().map_err(Error::Zygote)?;
        let (console, their_console) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| Error::Start(errno.into()))?;
        self.link.send(&spawn, &[their_link.as_fd(), their_console.as_fd()]).map_err(Error::Zygote)?;
        Ok((link, File::from(console)))
    }

    fn take_process(&self) -> Result<Process, Error> {
        match self.link.receive().map_err(Error::Zygote)? {
            (Spawned::Process(pid), files) => {
                let handle = files.into_iter().next().map(OwnedFd::from);
                let handle = handle.ok_or_else(|| Error::Start(io::Error::other("a node came without a handle")))?;
                Ok(Process { pid, handle })
            }
            (Spawned::Failed(why), _) => Err(Error::Start(io::Error::other(why))),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.link.shut_down();
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            tracing::error!(%error, "the zygote can't be ended");
        }
    }
}
