//! A node: the process that holds one VM.
//!
//! It begins as a shell, a machine without content. On an order from its platform the shell boots, or becomes a copy. When the
//! platform goes away, so does the node.

use std::{
    fs::File,
    sync::{Arc, mpsc},
};

use anyhow::{Context, bail};

mod companion;
mod pages;
mod rehearsal;
pub mod zygote;

use crate::{
    boot::Payload,
    error::chain,
    fork::{Child, Engine, Signal},
    kvm::{Hypervisor, Model, Vcpu},
    machine::{self, Config, Machine, Shell},
    wire::{NodeLink, Step, ToNode, ToPlatform, link},
};
use companion::{Companion, Launch};

/// A machine that may run.
struct Ready {
    machine: Arc<Machine>,
    vcpus: Vec<Vcpu>,
    faults: Vec<Step>,
    /// How it was launched, where it is a copy.
    launch: Option<Launch>,
}

/// Runs the node, from the building of its shell to the end of its VM. What goes wrong is told to the platform.
///
/// # Errors
/// Where the platform is gone, or breaks the protocol.
pub fn run(
    hypervisor: &Hypervisor,
    model: &Model,
    config: Config,
    link: NodeLink,
    console: File,
) -> anyhow::Result<()> {
    let link = Arc::new(link);
    let (replies_in, replies) = mpsc::channel();
    let companion = Companion::start(&link, replies_in)?;
    let ready = match become_something(hypervisor, model, config, &link, console) {
        Ok(ready) => ready,
        // Nobody has an order for this shell any more.
        Err(_) if link.is_closed() => return Ok(()),
        Err(error) => return Ok(link.send(&ToPlatform::Failed(format!("{error:#}")), &[])?),
    };
    let Ready { machine, vcpus, faults, launch } = ready;
    let engine = Arc::new(Engine::new(Arc::clone(&machine), Arc::clone(&link), replies, faults));
    let companion = companion.begin(Arc::clone(&machine), Arc::clone(&engine), launch);
    let end = machine::run(&machine, vcpus, |vcpu, command| companion.report(engine.ring(vcpu, command)));
    companion.finish();
    match link.send(&ToPlatform::Ended(end), &[]) {
        Ok(()) | Err(link::Error::Closed) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Builds the shell, waits for its order, and carries it out.
fn become_something(
    hypervisor: &Hypervisor,
    model: &Model,
    config: Config,
    link: &NodeLink,
    console: File,
) -> anyhow::Result<Ready> {
    let mut shell = Shell::build(hypervisor, model, config)?;
    // Where its order is there already, there is no time for this.
    if !link.is_readable() {
        shell.warm_up()?;
        if let Err(error) = rehearsal::rehearse(&shell) {
            tracing::debug!(error = chain(&error), "a shell did not rehearse its launch, which takes longer now");
        }
    }
    link.send(&ToPlatform::Ready, &[])?;
    let (order, files) = link.receive().context("no order from the platform")?;
    match order {
        ToNode::Boot { identity, cmdline, prealloc, faults } => {
            let mut files = files.into_iter();
            let kernel = files.next().context("the order to boot came without a kernel")?;
            let mut payload = Payload { kernel, initrd: files.next(), cmdline };
            let (machine, vcpus) = shell.boot(&mut payload, prealloc, identity, console)?;
            Signal::to_booted(&machine)?.give(&machine)?;
            Ok(Ready { machine: Arc::new(machine), vcpus, faults, launch: None })
        }
        ToNode::Copy { identity, seq, working_set } => {
            let child = Child::from_shell(shell, identity, seq, files, console, || link.is_closed())?;
            let Child { machine, vcpus, steps, rendezvous } = child;
            let launch = Some(Launch { seq, steps, first_exit: machine.exits.watch(), rendezvous, working_set });
            Ok(Ready { machine: Arc::new(machine), vcpus, faults: Vec::new(), launch })
        }
        other => bail!("the first message of the platform is {other:?}, and no order"),
    }
}
