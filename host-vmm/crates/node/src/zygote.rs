//! The zygote: a small process with one thread from which all nodes are forked.
//!
//! Starting a program takes a millisecond, and each one has its own copy of what the linker has relocated. A
//! fork of the zygote takes a tenth of that, shares its pages, and has what all nodes read of the host: KVM's
//! version and capabilities, CPUID, MSRs.

use std::{
    fs::File,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    process,
    sync::Arc,
};

use anyhow::{Context, bail};
use base::{text::Reason, threads};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, fork},
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use types::VmShape;
use vmm::{
    arch::profile::Profile,
    kvm::Host,
    machine::{BlankMachine, HostHandles},
};

use super::{prefault::PrefaultSet, process::run, sandbox, warm_up};
use crate::wire::{LINK_FD, Link, NodeLink, Spawn, Spawned, link};

/// Memory of the machine that is built to warm up.
const WARM_UP_BYTES: u64 = 16 << 20;

/// Variable of the environment in which the zygote finds the CPU profile, as text: it can be long.
pub const CPU_PROFILE_VARIABLE: &str = "HOST_VMM_ZYGOTE_CPU_PROFILE";

/// The zygote's end of its connection.
type Connection = Link<Spawned, Spawn>;

/// Starts nodes until the platform goes away. Their guests are shown what `profile` leaves of this host's
/// CPU.
///
/// # Errors
/// Where there is no platform at descriptor [`LINK_FD`], or it breaks the protocol. Where KVM can't be used,
/// whoever asks for a node is told so.
pub fn main(profile: &Profile) -> anyhow::Result<()> {
    // SAFETY: the platform starts this process with its end of the connection there; nothing else has used
    // the descriptor yet.
    let socket = unsafe { OwnedFd::from_raw_fd(LINK_FD) };
    let connection = Connection::new(socket);
    // What all nodes ask for is found out once.
    threads::processors();
    threads::use_all_processors();
    threads::step_forward();
    threads::share_one_heap();
    let host = open_host(profile).map(Arc::new);
    if let Err(error) = host.as_ref().map_or(Ok(()), warm_up_node) {
        tracing::debug!("the zygote did not warm up, and each node takes longer to start: {error:#}");
    }
    let prefault_set = PrefaultSet::of_this_process().context("can't read this process's mappings")?;
    let ends = SigSet::from(Signal::SIGCHLD);
    ends.thread_block().context("can't block SIGCHLD")?;
    let ends = SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("can't watch for the end of nodes")?;
    sandbox::enter().context("can't confine the zygote")?;
    loop {
        let mut fds = [
            PollFd::new(connection.as_fd(), PollFlags::POLLIN),
            PollFd::new(ends.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("can't wait for the platform"),
        }
        let [spawn, ended] = fds.map(|fd| fd.any().unwrap_or(false));
        if ended {
            reap(&ends)?;
        }
        if spawn {
            let (order, files) = match connection.receive() {
                Err(link::Error::Closed) => return Ok(()),
                other => other?,
            };
            let host = match &host {
                Ok(host) => host,
                Err(error) => {
                    connection.send(&Spawned::Failed(Reason::of(format_args!("{error:#}"))), &[])?;
                    continue;
                }
            };
            match spawn_node(order, files)? {
                Spawning::Zygote(process) => answer(&connection, process)?,
                Spawning::Node(order) => {
                    prefault_set.prefault();
                    drop((connection, ends));
                    process::exit(run_node(host, order));
                }
            }
        }
    }
}

fn open_host(profile: &Profile) -> anyhow::Result<Host> {
    let mut host = Host::open()?;
    host.model.shown = profile.apply(&host.model.cpuid)?;
    Ok(host)
}

/// Does what nodes do until they run, so that it is known which pages that takes.
fn warm_up_node(host: &Arc<Host>) -> anyhow::Result<()> {
    let handles = Arc::new(HostHandles::open(Arc::clone(host))?);
    let mut blank = BlankMachine::build(&handles, VmShape { ram_bytes: WARM_UP_BYTES, vcpus: 1 })?;
    blank.warm_up()?;
    Ok(warm_up::warm_up_restore(&blank)?)
}

/// What a node has from its start.
struct NodeOrder {
    spawn: Spawn,
    link: NodeLink,
    console: File,
}

/// Which process this is after a fork.
enum Spawning {
    Zygote(Result<Pid, Errno>),
    Node(NodeOrder),
}

fn spawn_node(spawn: Spawn, files: Vec<File>) -> anyhow::Result<Spawning> {
    let Ok([link, console]) = <[File; 2]>::try_from(files) else {
        bail!("an order to start a node came without its files")
    };
    // SAFETY: this process has one thread, so that no lock is held by another one in the copy.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => {
            Ok(Spawning::Zygote(Pid::from_raw(child.as_raw()).ok_or(Errno::ESRCH)))
        }
        Ok(ForkResult::Child) => {
            Ok(Spawning::Node(NodeOrder { spawn, link: NodeLink::new(link.into()), console }))
        }
        Err(errno) => Ok(Spawning::Zygote(Err(errno))),
    }
}

fn answer(connection: &Connection, process: Result<Pid, Errno>) -> anyhow::Result<()> {
    let opened = process.and_then(|process| {
        // It can't have been reaped yet, so that its number is still its own.
        let handle = pidfd_open(process, PidfdFlags::empty())
            .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
        Ok((process, handle))
    });
    match opened {
        Ok((process, handle)) => {
            let number = u32::try_from(process.as_raw_nonzero().get())?;
            connection.send(&Spawned::Process(number), &[handle.as_fd()])?;
        }
        Err(errno) => connection.send(&Spawned::Failed(errno.desc().into()), &[])?,
    }
    Ok(())
}

/// Takes note of nodes that have ended. The platform watches them by itself.
fn reap(ends: &SignalFd) -> anyhow::Result<()> {
    while ends.read_signal().context("can't read the end of nodes")?.is_some() {}
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("can't wait for nodes"),
        }
    }
}

fn run_node(host: &Arc<Host>, order: NodeOrder) -> i32 {
    let NodeOrder { spawn, link, console } = order;
    match run(host, &spawn, link, console) {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!("a node failed: {error:#}");
            1
        }
    }
}
