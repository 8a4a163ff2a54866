//! A node: the process that holds one VM.
//!
//! It gets one order from its platform, `Boot` or `Restore`, builds the machine, says `Ready`, and runs on `Go`. When the platform
//! goes away, so does it.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};

use crate::{
    boot::Payload,
    capsule::Capsule,
    error::chain,
    fork::{self, Engine, Replies},
    kvm::Vcpu,
    machine::{self, End, Machine},
    wire::{LINK_FD, NodeLink, Step, ToNode, ToPlatform, link},
};

/// How long console input waits for the guest to take some.
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// A machine that is about to run.
struct Ready {
    machine: Machine,
    vcpus: Vec<Vcpu>,
    /// Number of the request that it comes from, if it comes from one.
    answers: Option<u64>,
    faults: Vec<Step>,
}

/// Runs the node, from the order to the end of its VM.
///
/// # Errors
/// Where there is no platform at descriptor [`LINK_FD`], or it breaks the protocol. What goes wrong with the VM is told to the
/// platform.
pub fn main() -> anyhow::Result<()> {
    // SAFETY: the platform starts this process with its end of the connection there; nothing else has used the descriptor yet.
    let socket = unsafe { OwnedFd::from_raw_fd(LINK_FD) };
    let link = Arc::new(NodeLink::new(socket));
    let (order, files) = link.receive().context("no order from the platform (this command is not for people)")?;
    match build(order, files) {
        Ok(ready) => run(ready, link),
        Err(error) => {
            link.send(&ToPlatform::Failed(format!("{error:#}")), &[])?;
            Ok(())
        }
    }
}

fn build(order: ToNode, files: Vec<File>) -> anyhow::Result<Ready> {
    let console = File::from(io::stdout().as_fd().try_clone_to_owned().context("can't use the console")?);
    let (built, answers, faults) = match order {
        ToNode::Boot { config, identity, cmdline, faults } => {
            let mut files = files.into_iter();
            let kernel = files.next().context("the order to boot came without a kernel")?;
            let mut payload = Payload { kernel, initrd: files.next(), cmdline };
            (machine::boot(config, &mut payload, identity, console)?, None, faults)
        }
        ToNode::Restore { identity, seq } => {
            let capsule = Capsule::from_files(files).context("the order to restore came without a capsule")?;
            let (state, image) = capsule.unpack()?;
            (machine::restore(&state, Arc::new(image), identity, console)?, Some(seq), Vec::new())
        }
        other => bail!("the first message of the platform is {other:?}, and no order"),
    };
    let (machine, vcpus) = built;
    Ok(Ready { machine, vcpus, answers, faults })
}

fn run(ready: Ready, link: Arc<NodeLink>) -> anyhow::Result<()> {
    let Ready { machine, vcpus, answers, faults } = ready;
    link.send(&ToPlatform::Ready, &[])?;
    match link.receive()? {
        (ToNode::Go, _) => {}
        (other, _) => bail!("the platform sent {other:?} before Go"),
    }
    let machine = Arc::new(machine);
    fork::identify(&machine, answers)?;
    let replies = listen(&machine, &link)?;
    let engine = Engine::new(Arc::clone(&machine), Arc::clone(&link), replies, faults);
    let end = machine::run(&machine, vcpus, |vcpu, command| engine.ring(vcpu, command));
    match link.send(&ToPlatform::Ended(end), &[]) {
        Ok(()) | Err(link::Error::Closed) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Starts the threads that listen to the platform, and returns where its answers to forks come.
fn listen(machine: &Arc<Machine>, link: &Arc<NodeLink>) -> io::Result<Replies> {
    let (replies_in, replies) = mpsc::channel();
    let (input_in, input) = mpsc::channel();
    let machine_of_input = Arc::clone(machine);
    thread::Builder::new().name("console-input".into()).spawn(move || feed_console(&machine_of_input, &input))?;
    let machine = Arc::clone(machine);
    let link = Arc::clone(link);
    thread::Builder::new().name("platform".into()).spawn(move || {
        loop {
            // A receiver that is gone means that the VM is ending.
            let passed_on = match link.receive() {
                Ok((ToNode::Input(bytes), _)) => input_in.send(bytes).is_ok(),
                Ok((reply, _)) => replies_in.send(reply).is_ok(),
                Err(error) => {
                    tracing::debug!(error = chain(&error), "the platform is gone");
                    machine.gate.end(End::Orphaned);
                    false
                }
            };
            if !passed_on {
                return;
            }
        }
    })?;
    Ok(replies)
}

fn feed_console(machine: &Machine, input: &mpsc::Receiver<Vec<u8>>) {
    for bytes in input {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match machine.devices.console_input(rest) {
                Ok(0) => thread::sleep(INPUT_RETRY),
                Ok(taken) => rest = &rest[taken..],
                Err(error) => {
                    tracing::warn!(error = chain(&error), "console input is lost");
                    break;
                }
            }
        }
    }
}
