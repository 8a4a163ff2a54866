//! The threads beside the vCPUs: they speak with the platform.
//!
//! The first of them is started with the shell, since making a thread takes as long as restoring a vCPU. It waits until the machine may
//! run, tells the platform so, and starts the others.

use std::{
    io,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    error::chain,
    machine::{End, Machine},
    wire::{NodeLink, Step, Timing, ToNode, ToPlatform, link},
};

/// How long console input waits for the guest to take some.
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// How long a copy that shows no sign of life is waited for until its launch is reported without one.
const FIRST_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// How a copy was launched.
#[derive(Debug)]
pub(super) struct Launch {
    /// Number of the request that it comes from.
    pub(super) seq: u64,
    /// Its side of the fork.
    pub(super) steps: Vec<Timing>,
}

/// The thread that waits for the machine.
#[derive(Debug)]
pub(super) struct Companion {
    begin: mpsc::Sender<(Arc<Machine>, Option<Launch>)>,
    thread: JoinHandle<()>,
}

/// The thread that tells how the machine was launched.
#[derive(Debug)]
#[must_use]
pub(super) struct Teller(JoinHandle<()>);

impl Companion {
    /// Starts it. What the platform answers to forks will go to `replies`.
    pub(super) fn start(link: &Arc<NodeLink>, replies: mpsc::Sender<ToNode>) -> io::Result<Self> {
        let (begin, begun) = mpsc::channel();
        let link = Arc::clone(link);
        let thread = thread::Builder::new().name("companion".into()).spawn(move || {
            // A shell that ends without having become anything drops its end.
            if let Ok((machine, launch)) = begun.recv() {
                accompany(&machine, launch, &link, replies);
            }
        })?;
        Ok(Self { begin, thread })
    }

    /// Says that the machine runs.
    pub(super) fn begin(self, machine: Arc<Machine>, launch: Option<Launch>) -> Teller {
        let Self { begin, thread } = self;
        if begin.send((Arc::clone(&machine), launch)).is_err() {
            machine.gate.end(End::Broken("the thread that speaks with the platform is gone".into()));
        }
        Teller(thread)
    }
}

impl Teller {
    /// Waits until all of it is told. A VM that has ended has come to an exit, so that this does not take long.
    pub(super) fn finish(self) {
        if self.0.join().is_err() {
            tracing::error!("the thread that speaks with the platform panicked");
        }
    }
}

fn accompany(machine: &Arc<Machine>, launch: Option<Launch>, link: &Arc<NodeLink>, replies: mpsc::Sender<ToNode>) {
    let told = link.send(&ToPlatform::Running, &[]);
    if let Err(error) = listen(machine, link, replies) {
        machine.gate.end(End::Broken(format!("can't start a thread: {error}")));
    }
    if let Err(error) = told.and_then(|()| tell_launched(machine, launch, link)) {
        tracing::debug!(error = chain(&error), "the platform is gone");
        machine.gate.end(End::Orphaned);
    }
}

/// Starts the threads that take what the platform says.
fn listen(machine: &Arc<Machine>, link: &Arc<NodeLink>, replies: mpsc::Sender<ToNode>) -> io::Result<()> {
    let (input_in, input) = mpsc::channel();
    let console = Arc::clone(machine);
    thread::Builder::new().name("console-input".into()).spawn(move || feed_console(&console, &input))?;
    let (machine, link) = (Arc::clone(machine), Arc::clone(link));
    thread::Builder::new().name("platform".into()).spawn(move || {
        loop {
            // A receiver that is gone means that the VM is ending.
            let connected = match link.receive() {
                Ok((ToNode::Input(bytes), _)) => input_in.send(bytes).is_ok(),
                Ok((reply, _)) => replies.send(reply).is_ok(),
                Err(error) => {
                    tracing::debug!(error = chain(&error), "the platform is gone");
                    false
                }
            };
            if !connected {
                return machine.gate.end(End::Orphaned);
            }
        }
    })?;
    Ok(())
}

/// Tells the platform how a copy was launched, once it has come to its first exit.
fn tell_launched(machine: &Machine, launch: Option<Launch>, link: &NodeLink) -> Result<(), link::Error> {
    let Some(Launch { seq, mut steps }) = launch else { return Ok(()) };
    let began_ns = steps.last().map_or(0, |(_, _, end_ns)| *end_ns);
    if let Some(exit_ns) = machine.first_exit.wait(FIRST_EXIT_TIMEOUT) {
        steps.push((Step::FirstRun, began_ns, exit_ns));
    }
    link.send(&ToPlatform::Launched { seq, steps }, &[])
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
