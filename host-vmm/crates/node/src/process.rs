//! A node: the process that holds one VM.
//!
//! It begins as a warm VM, with a machine without content. On an order from its platform the warm VM boots,
//! or becomes a copy. When the platform goes away, so does the node.

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
    machine::{self, BlankMachine, HostHandles, Machine},
};

use super::control_thread::{ControlThread, Launch};
use crate::{
    fork::{Child, CopySource, Engine, RoleSignal, Standby},
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

/// Runs the node, from the building of its warm VM to the end of its VM. What goes wrong is told to the
/// platform.
///
/// # Errors
/// Where the platform is gone, or breaks the protocol.
pub(super) fn run(host: &Arc<Host>, spawn: &Spawn, link: NodeLink, console: File) -> anyhow::Result<()> {
    let link = Arc::new(link);
    let handles = confine_with_handles(host);
    let (replies_in, replies) = mpsc::channel();
    let control_thread = ControlThread::start(&link, replies_in)?;
    let ready = match handles.and_then(|handles| launch(&handles, spawn, &link, console)) {
        Ok(ready) => ready,
        // Nobody has an order for this warm VM any more.
        Err(_) if link.is_closed() => return Ok(()),
        Err(error) => return Ok(link.send(&ToPlatform::Failed(Reason::of(format_args!("{error:#}"))), &[])?),
    };
    let Ready { machine, vcpus, faults, head_start, launch } = ready;
    let engine =
        Arc::new(Engine::new(Arc::clone(&machine), Arc::clone(&link), replies, spawn.max_pause, faults));
    machine.devices.run();
    let control_thread = control_thread.begin(Arc::clone(&machine), Arc::clone(&engine), launch);
    let end = machine::run(&machine, vcpus, head_start, |vcpu, request| {
        let outcome = match request {
            machine::ServiceRequest::Doorbell(command) => Some(engine.ring(vcpu, command)),
            machine::ServiceRequest::Host => engine.carry_out(vcpu),
        };
        if let Some(outcome) = outcome {
            control_thread.report(outcome);
        }
    });
    control_thread.finish();
    match link.send(&ToPlatform::Ended(end), &[]) {
        Ok(()) | Err(link::Error::Closed) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Opens what the node will need, and confines it: from here on, and with all threads to come.
fn confine_with_handles(host: &Arc<Host>) -> anyhow::Result<Arc<HostHandles>> {
    let handles = HostHandles::open(Arc::clone(host))?;
    super::sandbox::close().context("can't confine the node")?;
    Ok(Arc::new(handles))
}

/// Builds the warm VM, waits for its order, and carries it out.
fn launch(
    handles: &Arc<HostHandles>,
    spawn: &Spawn,
    link: &NodeLink,
    console: File,
) -> anyhow::Result<Ready> {
    let mut blank = BlankMachine::build(handles, spawn.config)?;
    // Where its order is there already, there is no time for this.
    if !spawn.is_cold && !link.is_readable() {
        blank.warm_up()?;
        if let Err(error) = super::warm_up::warm_up_restore(&blank) {
            tracing::debug!(error = chain(&error), "a warm VM did not warm up, and its launch takes longer");
        }
    }
    link.send(&ToPlatform::Ready, &[])?;
    match await_order(link, &mut blank)? {
        Assignment::Boot { mut payload, identity, prealloc, faults } => {
            let (machine, vcpus) = blank.boot(&mut payload, prealloc, console)?.with_identity(identity);
            RoleSignal::to_booted(&machine)?.give(&machine)?;
            Ok(Ready { machine: Arc::new(machine), vcpus, faults, head_start: Duration::ZERO, launch: None })
        }
        Assignment::Copy { copy_source, order } => {
            let faults = match &order {
                Some(order) if order.lazy => {
                    let faults = handles.faults()?;
                    link.send(&ToPlatform::Faults { start: blank.memory_start() }, &[faults.file().as_fd()])?;
                    Some(faults)
                }
                _ => None,
            };
            let order = || order.map_or_else(|| receive_order(link), Ok);
            let child = Child::from_blank(blank, copy_source, console, faults, order, || link.is_closed())?;
            let Child { machine, vcpus, seq, working_set, first_vcpu_late, steps, rendezvous } = child;
            let launch =
                Some(Launch { seq, steps, first_exit: machine.exits.watch(), rendezvous, working_set });
            let head_start = if first_vcpu_late { LATE } else { Duration::ZERO };
            Ok(Ready { machine: Arc::new(machine), vcpus, faults: Vec::new(), head_start, launch })
        }
    }
}

/// Assignment of a warm VM: what it is to become.
enum Assignment {
    Boot {
        payload: Payload,
        identity: VmIdentity,
        prealloc: bool,
        faults: Vec<ForkStep>,
    },
    Copy {
        copy_source: CopySource,
        /// `None` where the parent has woken it up: then it follows.
        order: Option<CopyOrder>,
    },
}

/// Waits for the order of a warm VM: from the platform, or, while it stands by, a wake event from a parent.
fn await_order(link: &NodeLink, blank: &mut BlankMachine) -> anyhow::Result<Assignment> {
    let mut standby: Option<Standby> = None;
    loop {
        match standby {
            Some(standby) if standby.wait(link)? => {
                return Ok(Assignment::Copy {
                    copy_source: standby.into_copy_source().with_children(1),
                    order: None,
                });
            }
            _ => {}
        }
        let (message, files) = link.receive().context("no order from the platform")?;
        match message {
            ToNode::StandBy { working_set } => {
                let opened = Standby::open(files)?;
                if let (Some(lowest), Some(working_set)) = (opened.lowest_layer(), working_set)
                    && let Err(error) = blank.prepare_memory(lowest, &working_set, || !opened.is_woken(link))
                {
                    tracing::debug!(error = chain(&error), "a warm VM's memory is not made ready");
                }
                standby = Some(opened);
            }
            ToNode::Boot { identity, cmdline, prealloc, faults } => {
                let mut files = files.into_iter();
                let kernel = files.next().context("the order to boot came without a kernel")?;
                let payload = Payload { kernel, initrd: files.next(), cmdline };
                return Ok(Assignment::Boot { payload, identity, prealloc, faults });
            }
            ToNode::Copy(order) => {
                let copy_source = match standby {
                    Some(standby) if files.is_empty() => standby.into_copy_source(),
                    _ => CopySource::open(files)?,
                };
                return Ok(Assignment::Copy {
                    copy_source: copy_source.with_children(order.arrivals),
                    order: Some(order),
                });
            }
            other => bail!("the platform says {other:?} to a warm VM"),
        }
    }
}

/// Waits for the order of a warm VM that its parent has woken up already.
fn receive_order(link: &NodeLink) -> Result<CopyOrder, link::Error> {
    match link.receive()? {
        (ToNode::Copy(order), files) if files.is_empty() => Ok(order),
        (other, _) => Err(link::Error::Unexpected(Reason::of(format_args!("{other:?}")))),
    }
}
