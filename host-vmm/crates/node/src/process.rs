//! A node: the process that holds one VM.
//!
//! It begins as a shell, a machine without content. On an order from its platform the shell boots, or becomes a copy. When the
//! platform goes away, so does the node.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{Arc, mpsc},
    time::Duration,
};

use anyhow::{Context, bail};
use base::{error::chain, text::Reason};
use types::{ForkStep, VmIdentity};
use vmm::{
    boot::Payload,
    kvm::{Host, Vcpu},
    machine::{self, Machine, Shell, Workshop},
};

use super::companion::{Companion, Launch};
use crate::{
    fork::{Child, Engine, Meeting, Signal, Standby},
    wire::{CopyOrder, NodeLink, Spawn, ToNode, ToPlatform, link},
};

/// Processor time that a copy's other vCPUs have before its first one runs, where a fault asks for it.
const LATE: Duration = Duration::from_millis(50);

/// A machine that may run.
struct Ready {
    machine: Arc<Machine>,
    vcpus: Vec<Vcpu>,
    faults: Vec<ForkStep>,
    /// How long the other vCPUs run before the first one does.
    head_start: Duration,
    /// How it was launched, where it is a copy.
    launch: Option<Launch>,
}

/// Runs the node, from the building of its shell to the end of its VM. What goes wrong is told to the platform.
///
/// # Errors
/// Where the platform is gone, or breaks the protocol.
pub(super) fn run(host: &Arc<Host>, spawn: &Spawn, link: NodeLink, console: File) -> anyhow::Result<()> {
    let link = Arc::new(link);
    let workshop = confine_with_workshop(host);
    let (replies_in, replies) = mpsc::channel();
    let companion = Companion::start(&link, replies_in)?;
    let ready = match workshop.and_then(|workshop| become_something(&workshop, spawn, &link, console)) {
        Ok(ready) => ready,
        // Nobody has an order for this shell any more.
        Err(_) if link.is_closed() => return Ok(()),
        Err(error) => return Ok(link.send(&ToPlatform::Failed(Reason::of(format_args!("{error:#}"))), &[])?),
    };
    let Ready { machine, vcpus, faults, head_start, launch } = ready;
    let engine = Arc::new(Engine::new(Arc::clone(&machine), Arc::clone(&link), replies, spawn.max_pause, faults));
    machine.devices.run();
    let companion = companion.begin(Arc::clone(&machine), Arc::clone(&engine), launch);
    let end = machine::run(&machine, vcpus, head_start, |vcpu, call| {
        let served = match call {
            machine::Call::Ring(command) => Some(engine.ring(vcpu, command)),
            machine::Call::Gate => engine.carry_out(vcpu),
        };
        if let Some(served) = served {
            companion.report(served);
        }
    });
    companion.finish();
    match link.send(&ToPlatform::Ended(end), &[]) {
        Ok(()) | Err(link::Error::Closed) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens what the node will need, and confines it: from here on, and with all threads to come.
fn confine_with_workshop(host: &Arc<Host>) -> anyhow::Result<Arc<Workshop>> {
    let workshop = Workshop::open(Arc::clone(host))?;
    super::sandbox::close().context("can't confine the node")?;
    Ok(Arc::new(workshop))
}

/// Builds the shell, waits for its order, and carries it out.
fn become_something(workshop: &Arc<Workshop>, spawn: &Spawn, link: &NodeLink, console: File) -> anyhow::Result<Ready> {
    let mut shell = Shell::build(workshop, spawn.config)?;
    // Where its order is there already, there is no time for this.
    if !spawn.is_cold && !link.is_readable() {
        shell.warm_up()?;
        if let Err(error) = super::rehearsal::rehearse(&shell) {
            tracing::debug!(error = chain(&error), "a shell did not rehearse its launch, which takes longer now");
        }
    }
    link.send(&ToPlatform::Ready, &[])?;
    match await_call(link, &mut shell)? {
        Call::Boot { mut payload, identity, prealloc, faults } => {
            let (machine, vcpus) = shell.boot(&mut payload, prealloc, console)?.name(identity);
            Signal::to_booted(&machine)?.give(&machine)?;
            Ok(Ready { machine: Arc::new(machine), vcpus, faults, head_start: Duration::ZERO, launch: None })
        }
        Call::Copy { meeting, order } => {
            let faults = match &order {
                Some(order) if order.lazy => {
                    let faults = workshop.faults()?;
                    link.send(&ToPlatform::Faults { start: shell.memory_start() }, &[faults.file().as_fd()])?;
                    Some(faults)
                }
                _ => None,
            };
            let order = || order.map_or_else(|| receive_order(link), Ok);
            let child = Child::from_shell(shell, meeting, console, faults, order, || link.is_closed())?;
            let Child { machine, vcpus, seq, working_set, first_vcpu_late, steps, rendezvous } = child;
            let launch = Some(Launch { seq, steps, first_exit: machine.exits.watch(), rendezvous, working_set });
            let head_start = if first_vcpu_late { LATE } else { Duration::ZERO };
            Ok(Ready { machine: Arc::new(machine), vcpus, faults: Vec::new(), head_start, launch })
        }
    }
}

/// What a shell is called to.
enum Call {
    Boot {
        payload: Payload,
        identity: VmIdentity,
        prealloc: bool,
        faults: Vec<ForkStep>,
    },
    Copy {
        meeting: Meeting,
        /// `None` where the parent has called: then it follows.
        order: Option<CopyOrder>,
    },
}

/// Waits until the shell is called: by the platform, or, while it stands by, by a parent.
fn await_call(link: &NodeLink, shell: &mut Shell) -> anyhow::Result<Call> {
    let mut standby: Option<Standby> = None;
    loop {
        match standby {
            Some(standby) if standby.wait(link)? => {
                return Ok(Call::Copy { meeting: standby.into_meeting().with_children(1), order: None });
            }
            _ => {}
        }
        let (message, files) = link.receive().context("no order from the platform")?;
        match message {
            ToNode::StandBy { working_set } => {
                let opened = Standby::open(files)?;
                if let (Some(lowest), Some(working_set)) = (opened.lowest_layer(), working_set)
                    && let Err(error) = shell.prepare_memory(lowest, &working_set, || !opened.is_called(link))
                {
                    tracing::debug!(error = chain(&error), "a shell's memory is not made ready");
                }
                standby = Some(opened);
            }
            ToNode::Boot { identity, cmdline, prealloc, faults } => {
                let mut files = files.into_iter();
                let kernel = files.next().context("the order to boot came without a kernel")?;
                let payload = Payload { kernel, initrd: files.next(), cmdline };
                return Ok(Call::Boot { payload, identity, prealloc, faults });
            }
            ToNode::Copy(order) => {
                let meeting = match standby {
                    Some(standby) if files.is_empty() => standby.into_meeting(),
                    _ => Meeting::open(files)?,
                };
                return Ok(Call::Copy { meeting: meeting.with_children(order.arrivals), order: Some(order) });
            }
            other => bail!("the platform says {other:?} to a shell"),
        }
    }
}

/// Waits for the order of a shell that its parent has called already.
fn receive_order(link: &NodeLink) -> Result<CopyOrder, link::Error> {
    match link.receive()? {
        (ToNode::Copy(order), files) if files.is_empty() => Ok(order),
        (other, _) => Err(link::Error::Unexpected(Reason::of(format_args!("{other:?}")))),
    }
}
