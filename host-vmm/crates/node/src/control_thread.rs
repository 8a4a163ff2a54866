//! The control thread of a node, and the threads that it starts: they exchange messages with the platform.
//!
//! The control thread is started with the warm VM, since making a thread takes as long as restoring a vCPU.
//! It waits until the machine may run, tells the platform so, and starts the others.

use std::{
    io,
    sync::{
        Arc, Mutex,
        mpsc::{self, TryRecvError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use base::{error::chain, sync::lock, text::Reason, threads};
use types::{ExitReason, ForkStep, StepTiming};
use vmm::{
    machine::{FirstExit, Machine},
    memory::WorkingSet,
};

use super::delayed_wakeup::DelayedWakeup;
use crate::{
    fork::{Engine, ForkOutcome, rendezvous::Rendezvous},
    wire::{NodeLink, Prefetch, ToNode, ToPlatform, link},
};

/// How long console input waits for the guest to take some.
const INPUT_RETRY: Duration = Duration::from_millis(5);

/// How long a VM that shows no sign of life is waited for until its fork is reported without one.
const FIRST_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a VM is left alone after a fork, before anything is told of it.
const HEAD_START: Duration = Duration::from_millis(2);

/// How long a copy that prints nothing is watched for what it writes to, and how often it is looked at.
const RECORDED: Duration = Duration::from_millis(200);
const RECORD_INTERVAL: Duration = Duration::from_millis(2);

/// How long nothing must have happened until there is time to get ready for the next fork.
const CALM: Duration = Duration::from_millis(20);

/// Most failed forks of one VM that are reported within a second.
const FAILURES_PER_SECOND: u32 = 100;

/// Forks that may wait to be reported, before the next one waits itself.
const QUEUE: usize = 256;

/// How a copy was launched.
#[derive(Debug)]
pub(super) struct Launch {
    /// Number of the request that it comes from.
    pub(super) seq: u64,
    /// Its side of the fork.
    pub(super) steps: Vec<StepTiming>,
    /// When it shows a sign of life.
    pub(super) first_exit: Arc<FirstExit>,
    /// Where it met its parent.
    pub(super) rendezvous: Rendezvous,
    /// What it does about its first writes.
    pub(super) working_set: Prefetch,
}

/// Event that the vCPUs' threads tell the control thread.
enum ControlEvent {
    /// The machine runs.
    Started { machine: Arc<Machine>, engine: Arc<Engine>, launch: Option<Launch> },
    /// A fork was made, or not.
    ForkEnded(ForkOutcome),
}

/// The control thread, which waits for the machine.
#[derive(Debug)]
pub(super) struct ControlThread {
    events: mpsc::SyncSender<ControlEvent>,
    wakeup: Arc<DelayedWakeup>,
    thread: JoinHandle<()>,
}

/// The same thread, which reports what the machine does.
#[derive(Debug)]
pub(super) struct Reporter {
    control_thread: ControlThread,
    failures: Mutex<Failures>,
}

/// Events that the control thread has not taken yet.
#[derive(Debug)]
struct EventQueue {
    receiver: mpsc::Receiver<ControlEvent>,
    wakeup: Arc<DelayedWakeup>,
}

impl EventQueue {
    /// Waits for the next event; `None` where there will be none any more. Where nothing has come for a
    /// while, `when_calm` is called.
    fn next(&mut self, when_calm: impl FnOnce()) -> Option<ControlEvent> {
        let mut when_calm = Some(when_calm);
        loop {
            match self.receiver.try_recv() {
                Ok(event) => return Some(event),
                Err(TryRecvError::Disconnected) => return None,
                Err(TryRecvError::Empty) => {}
            }
            match self.wakeup.wait(when_calm.is_some().then_some(CALM)) {
                Ok(true) => {}
                Ok(false) => {
                    if let Some(when_calm) = when_calm.take() {
                        when_calm();
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "the control thread can't wait");
                    return None;
                }
            }
        }
    }
}

/// Failed forks: a guest that rings without end must fill neither memory nor logs.
#[derive(Debug, Default)]
struct Failures {
    /// Since when those are counted that were told.
    since: Option<Instant>,
    told: u32,
    /// How many were not told since the last one that was.
    untold: u64,
}

impl Failures {
    /// Whether one more is told, and how many were not told before it.
    fn enter(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.duration_since(since) >= Duration::from_secs(1)) {
            (self.since, self.told) = (Some(now), 0);
        }
        if self.told >= FAILURES_PER_SECOND {
            self.untold += 1;
            return None;
        }
        self.told += 1;
        Some(std::mem::take(&mut self.untold))
    }
}

impl ControlThread {
    /// Starts it. What the platform answers to forks will go to `replies`.
    pub(super) fn start(link: &Arc<NodeLink>, replies: mpsc::Sender<ToNode>) -> io::Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(QUEUE);
        let wakeup = Arc::new(DelayedWakeup::new()?);
        let (link, mut events) = (Arc::clone(link), EventQueue { receiver, wakeup: Arc::clone(&wakeup) });
        let thread = thread::Builder::new().name("control".into()).spawn(move || {
            // A warm VM that ends without having become anything ends this thread too.
            if let Some(ControlEvent::Started { machine, engine, launch }) = events.next(|| {}) {
                run(&machine, &engine, launch, &link, replies, &mut events);
            }
        })?;
        Ok(Self { events: sender, wakeup, thread })
    }

    /// Says that the machine runs.
    pub(super) fn begin(
        self,
        machine: Arc<Machine>,
        engine: Arc<Engine>,
        launch: Option<Launch>,
    ) -> Reporter {
        // A guest that may soon need pages has no time to lose, and one that is booted has time.
        let is_left_alone =
            launch.as_ref().is_some_and(|launch| !matches!(launch.working_set, Prefetch::Fill(_)));
        self.tell(ControlEvent::Started { machine, engine, launch });
        if !is_left_alone {
            self.wakeup.wake_now();
        }
        Reporter { control_thread: self, failures: Mutex::default() }
    }

    fn tell(&self, event: ControlEvent) {
        if self.events.send(event).is_err() {
            tracing::warn!("the control thread is gone: a fork is not reported");
        }
        self.wakeup.schedule(HEAD_START);
    }
}

impl Reporter {
    /// Reports a fork, and cleans up after it. Of forks that fail, no more than some are told.
    pub(super) fn report(&self, mut outcome: ForkOutcome) {
        if outcome.cleanup.is_none() {
            let Some(untold) = lock(&self.failures).enter(Instant::now()) else { return };
            outcome.report.untold = untold;
        }
        self.control_thread.tell(ControlEvent::ForkEnded(outcome));
    }

    /// Waits until all of it is told. A VM that has ended has come to an exit, so that this does not take
    /// long.
    pub(super) fn finish(self) {
        let ControlThread { events, wakeup, thread } = self.control_thread;
        drop(events);
        wakeup.wake_now();
        if thread.join().is_err() {
            tracing::error!("the control thread panicked");
        }
    }
}

fn run(
    machine: &Arc<Machine>,
    engine: &Arc<Engine>,
    launch: Option<Launch>,
    link: &Arc<NodeLink>,
    replies: mpsc::Sender<ToNode>,
    events: &mut EventQueue,
) {
    let generation_id = machine.devices.has_generation_id();
    let told = link.send(&ToPlatform::Running { generation_id }, &[]);
    if let Err(error) = listen(machine, engine, link, replies) {
        machine
            .vcpu_barrier
            .end(ExitReason::Broken(Reason::of(format_args!("can't start a thread: {error}"))));
    }
    if let Some(Launch { working_set: Prefetch::Fill(working_set), .. }) = &launch {
        // As important as the guest, which it saves more work than it does.
        prefetch(machine, working_set);
    }
    threads::step_back();
    let told = told.and_then(|()| launch.map_or(Ok(()), |launch| report_launch(machine, launch, link)));
    if let Err(error) = told.and_then(|()| report_forks(engine, link, events)) {
        tracing::debug!(error = chain(&error), "the platform is gone");
        machine.vcpu_barrier.end(ExitReason::Orphaned);
    }
}

/// Makes pages ready beside the guest. Without them it is only slower. No thread may be started meanwhile:
/// both would wait for each other again and again, to change what is mapped or to look at it, and the guest
/// with them.
fn prefetch(machine: &Machine, working_set: &WorkingSet) {
    let mapping = Arc::clone(lock(&machine.memory).mapping());
    if let Err(error) = working_set.prefault(&mapping, || machine.vcpu_barrier.ended().is_none()) {
        tracing::warn!(error = chain(&error), "a working set can't be made ready");
    }
}

/// Waits for the first output, the end, or long enough, and tells what was written to until then.
fn record(machine: &Machine, link: &NodeLink) -> Result<(), link::Error> {
    let began = Instant::now();
    while !machine.devices.has_output()
        && machine.vcpu_barrier.ended().is_none()
        && began.elapsed() < RECORDED
    {
        thread::sleep(RECORD_INTERVAL);
    }
    let mapping = Arc::clone(lock(&machine.memory).mapping());
    match machine.handles.page_map.dirty_runs(&mapping) {
        Ok(runs) => link.send(&ToPlatform::Touched(WorkingSet::new(&runs)), &[]),
        Err(error) => {
            tracing::warn!(error = chain(&error), "a working set can't be recorded");
            Ok(())
        }
    }
}

fn report_launch(machine: &Machine, launch: Launch, link: &NodeLink) -> Result<(), link::Error> {
    let Launch { seq, mut steps, first_exit, rendezvous, working_set } = launch;
    add_first_run(&mut steps, &first_exit);
    drop(rendezvous);
    link.send(&ToPlatform::Launched { seq, steps }, &[])?;
    if matches!(working_set, Prefetch::Record) { record(machine, link) } else { Ok(()) }
}

/// Reports each fork, once the VM has come to its first exit after it, cleans up, and prepares the next one
/// when there is time.
fn report_forks(engine: &Engine, link: &NodeLink, events: &mut EventQueue) -> Result<(), link::Error> {
    loop {
        let Some(ControlEvent::ForkEnded(outcome)) = events.next(|| engine.prepare_next()) else {
            return Ok(());
        };
        let ForkOutcome { mut report, first_exit, cleanup } = outcome;
        add_first_run(&mut report.steps, &first_exit);
        link.send(&ToPlatform::Report(report), &[])?;
        if let Some(cleanup) = cleanup {
            engine.clean_up(cleanup);
        }
    }
}

fn add_first_run(steps: &mut Vec<StepTiming>, first_exit: &FirstExit) {
    let began_ns = steps.last().map_or(0, |(_, _, end_ns)| *end_ns);
    if let Some(exit_ns) = first_exit.wait(FIRST_EXIT_TIMEOUT) {
        steps.push((ForkStep::FirstRun, began_ns, exit_ns));
    }
}

/// Starts the thread that takes what the platform says.
fn listen(
    machine: &Arc<Machine>,
    engine: &Arc<Engine>,
    link: &Arc<NodeLink>,
    replies: mpsc::Sender<ToNode>,
) -> io::Result<()> {
    let (machine, engine, link) = (Arc::clone(machine), Arc::clone(engine), Arc::clone(link));
    threads::background("platform", move || {
        let end = match take_messages(&machine, &engine, &link, &replies) {
            Ok(()) => ExitReason::Orphaned,
            Err(error) => ExitReason::Broken(Reason::of(format_args!("can't start a thread: {error}"))),
        };
        machine.vcpu_barrier.end(end);
    })?;
    Ok(())
}

/// Takes messages until the platform is gone.
fn take_messages(
    machine: &Arc<Machine>,
    engine: &Engine,
    link: &NodeLink,
    replies: &mpsc::Sender<ToNode>,
) -> io::Result<()> {
    // Few VMs ever get console input. The guest may not take it for long, so that it needs a thread of its
    // own.
    let mut console: Option<mpsc::Sender<Vec<u8>>> = None;
    loop {
        // A receiver that is gone means that the VM is ending.
        let connected = match link.receive() {
            Ok((ToNode::Whole, _)) => {
                if let Err(error) = machine.become_whole() {
                    machine.vcpu_barrier.end(ExitReason::Broken(Reason::of_error(&error)));
                }
                true
            }
            Ok((ToNode::Fork { count }, _)) => engine.order(count).is_ok(),
            Ok((ToNode::Input(bytes), _)) => {
                let console = match &mut console {
                    Some(console) => console,
                    none => none.insert(start_console(machine)?),
                };
                console.send(bytes).is_ok()
            }
            Ok((reply, _)) => replies.send(reply).is_ok(),
            Err(error) => {
                tracing::debug!(error = chain(&error), "the platform is gone");
                false
            }
        };
        if !connected {
            return Ok(());
        }
    }
}

fn start_console(machine: &Arc<Machine>) -> io::Result<mpsc::Sender<Vec<u8>>> {
    let (console, input) = mpsc::channel();
    let machine = Arc::clone(machine);
    threads::background("console-input", move || feed_console(&machine, &input))?;
    Ok(console)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_failures_is_counted_and_not_told() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        let told = (0..1000).filter(|_| failures.enter(start).is_some()).count();
        assert_eq!(u32::try_from(told), Ok(FAILURES_PER_SECOND));
        let later = start + Duration::from_secs(1);
        assert_eq!(failures.enter(later), Some(1000 - u64::from(FAILURES_PER_SECOND)));
        assert_eq!(failures.enter(later), Some(0));
    }
}
