//! One node, from its order to the end of its VM.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{Arc, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use base::{error::chain, sync::lock, text::Reason, threads};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use node::{
    fork::rendezvous::Rendezvous,
    wire::{ForkOrder, PlatformLink, ToNode, ToPlatform, link},
};
use types::{ExitReason, ForkStep, VmIdentity, VmShape};
use vmfork_abi::ErrorCode;
use vmm::memory::Faults;

use super::{
    Error, Event, Platform,
    fork::{Fork, ForkFiles, ForkParent, Order, Target, open_rendezvous, operator::Ordered},
    limits::Recent,
    process::{Process, WarmNode},
    registry::Entry,
    seals::Unsealed,
    trace::Arguments,
    warm_pool::Standby,
    working_sets::WorkingSetHistory,
};
use crate::clone::postcopy::{MemoryObserver, PostcopyMemory};

/// Stack of a thread that serves a node, in bytes: there may be a thousand of them.
const STACK_BYTES: usize = 128 << 10;

/// Most messages of one node that are taken within a second: several times as many as the fastest guest makes
/// its node send. A node that somebody has broken out into must fill neither files nor a processor.
const MESSAGES_PER_SECOND: u32 = 4096;

/// How long a VM waits for another warm VM that stands by, where no fork has come of the last one, or where
/// there was none to spare.
const LENT_AGAIN: Duration = Duration::from_secs(1);

/// Who waits for a VM to run.
#[derive(Debug)]
pub(super) enum LaunchWaiter {
    /// Its parent, and the parent's other children.
    Fork(Arc<Fork>),
    /// Whoever boots it.
    Caller(mpsc::Sender<Result<(), Error>>),
    /// Nobody any more: it runs.
    Nobody,
}

/// What the next fork of a VM will come with.
#[derive(Debug)]
struct Announced {
    rendezvous: Rendezvous,
    /// The wake event, the rendezvous, then those of the image.
    files: Vec<File>,
    /// The warm VM that has them.
    standby: Option<Standby>,
}

impl Announced {
    /// Where the fork takes place that was announced: the wake event was for parent and warm VM alone.
    fn into_files(self) -> ForkFiles {
        let files = self.files.into_iter().skip(1).collect();
        ForkFiles {
            files,
            rendezvous: Some(self.rendezvous),
            standby: self.standby.and_then(Standby::into_warm_node),
        }
    }
}

/// A node with its VM. Dropping it ends both.
#[derive(Debug)]
pub(super) struct Node {
    platform: Arc<Platform>,
    process: Option<Process>,
    link: Arc<PlatformLink>,
    /// Until it is shown.
    console: Option<File>,
    identity: VmIdentity,
    config: VmShape,
    waiter: LaunchWaiter,
    /// What its next fork will come with, where it has told.
    announced: Option<Announced>,
    /// When it got a warm VM that stands by, until a fork has come of it.
    lent: Option<Instant>,
    /// How many messages it has sent.
    message_rate: MessageRate,
    /// The fork of this VM that is under way.
    fork: Option<Arc<Fork>>,
    /// Its forks within the last second.
    recent: Recent,
    /// What counts the files of its forks that are not sealed yet.
    unsealed: Unsealed,
    /// What is known of its copies.
    history: Arc<WorkingSetHistory>,
    /// Who learns from what this one writes to, where it tells.
    records_to: Option<Arc<WorkingSetHistory>>,
    /// Whether it was shown another CPU than this platform's guests are: no warm VM that stands ready can
    /// become a copy of it.
    has_foreign_cpu: bool,
    /// Who fills its memory, where that is not there as a whole yet.
    postcopy: Option<Arc<PostcopyMemory>>,
    /// How it was ended from outside, once it was.
    forced: Arc<OnceLock<ExitReason>>,
    /// The fork that an operator has ordered.
    ordered: Arc<Ordered>,
    end: Option<ExitReason>,
}

impl Node {
    /// A warm VM that is about to get its order.
    pub(super) fn new(
        platform: &Arc<Platform>,
        warm_node: WarmNode,
        identity: VmIdentity,
        waiter: LaunchWaiter,
    ) -> Result<Self, Error> {
        let WarmNode { config, link, console, process } = warm_node;
        let (forced, ordered) = (Arc::default(), Arc::default());
        let seals = match &waiter {
            LaunchWaiter::Fork(fork) => vec![Arc::clone(fork.seal())],
            LaunchWaiter::Caller(_) | LaunchWaiter::Nobody => Vec::new(),
        };
        let entry = Entry {
            link: Arc::clone(&link),
            vm: identity.clone(),
            config,
            pid: process.pid(),
            since: Instant::now(),
            runs: false,
            generation_id: None,
            postcopy: None,
            seals,
            forced: Arc::clone(&forced),
            ordered: Arc::clone(&ordered),
        };
        platform.registry.enter(entry)?;
        platform.pool.add_user(config);
        Ok(Self {
            platform: Arc::clone(platform),
            process: Some(process),
            link,
            console: Some(console),
            identity,
            config,
            waiter,
            announced: None,
            lent: None,
            message_rate: MessageRate::default(),
            fork: None,
            recent: Recent::default(),
            unsealed: Unsealed::default(),
            history: Arc::default(),
            records_to: None,
            has_foreign_cpu: false,
            postcopy: None,
            forced,
            ordered,
            end: None,
        })
    }

    /// The connection.
    pub(super) fn link(&self) -> &Arc<PlatformLink> {
        &self.link
    }

    /// Says that the VM will tell which pages it writes to first, and who learns from that.
    pub(super) fn record_to(&mut self, history: &Arc<WorkingSetHistory>) {
        self.records_to = Some(Arc::clone(history));
    }

    /// Says whether it was shown another CPU than this platform's guests are, and who fills its memory, where
    /// somebody does.
    pub(super) fn come_from(&mut self, has_foreign_cpu: bool, postcopy: Option<&Arc<PostcopyMemory>>) {
        (self.has_foreign_cpu, self.postcopy) = (has_foreign_cpu, postcopy.cloned());
        if let Some(postcopy) = postcopy {
            self.platform.registry.depends(self.identity.id, postcopy);
        }
    }

    /// Who its VM is.
    pub(super) fn identity(&self) -> &VmIdentity {
        &self.identity
    }

    /// Serves it on a thread of its own until its VM ends.
    pub(super) fn serve(self) -> Result<(), Error> {
        let thread = thread::Builder::new().name(self.identity.name.clone()).stack_size(STACK_BYTES);
        let platform = Arc::clone(&self.platform);
        thread.spawn(move || self.serve_until_its_end()).map_err(Error::Start)?;
        platform.pool.refill();
        Ok(())
    }

    fn serve_until_its_end(mut self) {
        // Whoever has started this thread may be kept off one.
        threads::use_all_processors();
        let why = loop {
            match self.serve_one() {
                Ok(true) => {}
                Ok(false) => break None,
                Err(Error::Node { source: link::Error::Closed, .. }) => break None,
                Err(error) => break Some(chain(&error)),
            }
        };
        if let Some(why) = why {
            tracing::error!(vm = self.identity.name, why, "a node broke the protocol and is ended");
        }
    }

    /// Serves the next message, and says whether more may come.
    fn serve_one(&mut self) -> Result<bool, Error> {
        let failed = |source| Error::Node { name: self.identity.name.clone(), source };
        let has_come = self.await_message().map_err(failed)?;
        if let Some(fork) = &self.fork {
            fork.end_if_late();
        }
        if !has_come {
            self.have_one_stand_by();
            return Ok(true);
        }
        let (message, files) = self.link.receive().map_err(failed)?;
        if let Some(wait) = self.message_rate.enter(Instant::now()) {
            thread::sleep(wait);
        }
        let name = message.name();
        let unexpected = || failed(link::Error::Unexpected(name.into()));
        if !message.is_valid() {
            return Err(unexpected());
        }
        match message {
            ToPlatform::Ready => {}
            ToPlatform::Running { generation_id } => self.runs(generation_id)?,
            ToPlatform::Failed(why) => {
                self.has_failed(why);
                return Ok(false);
            }
            ToPlatform::Launched { seq, steps } => {
                self.platform.events.write(&Event::Launched { vm: &self.identity, seq, steps: &steps });
                self.platform.trace.side(self.pid(), "child", Arguments { seq, code: 0 }, &steps);
            }
            ToPlatform::Faults { start } => {
                let (postcopy, file) = (self.postcopy.take(), files.into_iter().next());
                let (postcopy, file) = postcopy.zip(file).ok_or_else(unexpected)?;
                let faults = Faults::from_file(file).map_err(|_| unexpected())?;
                let vm = Dependent { link: Arc::clone(&self.link), forced: Arc::clone(&self.forced) };
                postcopy.add_vm(faults, start, Arc::new(vm));
            }
            ToPlatform::Announce => self.announced(files),
            ToPlatform::Fork { order, announced, fault } => {
                self.begin_fork(order, announced, fault, files)?
            }
            ToPlatform::Answer { code, why } => {
                let code = ErrorCode::from_number(code);
                code.and_then(|code| self.ordered.answered(code, why)).ok_or_else(unexpected)?;
            }
            ToPlatform::Touched(working_set) => {
                self.records_to.take().ok_or_else(unexpected)?.record(working_set);
            }
            ToPlatform::Abort => {
                let fork = self.fork.take().ok_or_else(unexpected)?;
                let (code, why) = fork.abort();
                self.link.send(&ToNode::Aborted { code: code.number(), why }, &[]).map_err(failed)?;
            }
            ToPlatform::Report(report) => {
                if let Some(fork) = &self.fork {
                    fork.is_told_certain(&self.platform);
                }
                self.platform.events.write(&Event::Forked { parent: &self.identity, report: &report });
                let arguments = Arguments { seq: report.seq, code: report.code };
                self.platform.trace.side(self.pid(), "fork", arguments, &report.steps);
            }
            ToPlatform::Ended(end) => self.end = Some(end),
        }
        Ok(true)
    }

    /// Has the children of a fork launched. Of an operator's order, the node is believed nothing that the
    /// platform knows.
    fn begin_fork(
        &mut self,
        order: ForkOrder,
        announced: bool,
        fault: Option<ForkStep>,
        files: Vec<File>,
    ) -> Result<(), Error> {
        let is_ordered = matches!(order, ForkOrder::Operator { .. });
        let order = match order {
            ForkOrder::Guest { seq, count, vm_type, location } => {
                Order { count, vm_type, seq, target: Target::Chosen(location), fault }
            }
            ForkOrder::Operator { count } => {
                let unexpected = || link::Error::Unexpected("Fork".into());
                let target = self.ordered.target(count).ok_or_else(unexpected);
                let target =
                    target.map_err(|source| Error::Node { name: self.identity.name.clone(), source })?;
                Order { count, vm_type: self.identity.vm_type.clone(), seq: 0, target, fault }
            }
        };
        // A fork before this one that is neither certain nor called off was forgotten by the node, and not by
        // its children.
        if let Some(forgotten) = self.fork.take().filter(|fork| !fork.is_over()) {
            forgotten.abort();
        }
        let here = ForkFiles { files, rendezvous: None, standby: None };
        let fork_files = self.announced.take_if(|_| announced).map_or(here, Announced::into_files);
        let Self { identity: vm, config, recent, unsealed, history, has_foreign_cpu, link, process, .. } =
            self;
        let (config, has_foreign_cpu, process) = (*config, *has_foreign_cpu, process.as_ref());
        let mut parent = ForkParent { vm, config, recent, history, has_foreign_cpu, link, process, unsealed };
        let fork = Fork::begin(&self.platform, &mut parent, &order, fork_files)?;
        if !fork.has_failed() {
            self.lent = None;
        }
        self.make_way(&fork);
        if is_ordered {
            self.ordered.begun(&fork);
        }
        self.fork = Some(fork);
        Ok(())
    }

    /// Has this thread, which is woken up for the next fork, take the processor from nobody then: a VM that
    /// forks is where it was when it forked before, as a rule.
    fn make_way(&self, fork: &Fork) {
        if let Some(processor) = fork.parents_processor()
            && let Err(error) = threads::keep_off(None, processor)
        {
            tracing::debug!(%error, vm = self.identity.name, processor, "a thread can't be kept off a processor");
        }
    }

    /// Waits for a message, or the end of the process: its end of the connection may live on elsewhere. Where
    /// no warm VM stands by for a fork that is announced, or one is under way, it waits no longer than until
    /// there may be one, or that must be over, and says whether there is a message.
    fn await_message(&self) -> Result<bool, link::Error> {
        let process = self.process.as_ref().ok_or(link::Error::Closed)?;
        let mut fds = [
            PollFd::new(self.link.as_fd(), PollFlags::POLLIN),
            PollFd::new(process.as_fd(), PollFlags::POLLIN),
        ];
        let lacks_one = self.announced.as_ref().is_some_and(|announced| announced.standby.is_none());
        let limit =
            (lacks_one && !self.has_foreign_cpu && self.platform.pool.has_standbys()).then_some(LENT_AGAIN);
        let fork = self.fork.as_ref().filter(|fork| !fork.is_over()).and_then(|fork| fork.time_left());
        let limit = limit.into_iter().chain(fork).min();
        let limit = limit.and_then(|limit| PollTimeout::try_from(limit).ok()).unwrap_or(PollTimeout::NONE);
        loop {
            match poll(&mut fds, limit) {
                Ok(0) => return Ok(false),
                Ok(_) if fds[0].any().unwrap_or(true) => return Ok(true),
                Ok(_) => return Err(link::Error::Closed),
                Err(nix::Error::EINTR) => {}
                // Whoever receives waits too; only an end that nobody tells is not seen then.
                Err(errno) => {
                    tracing::warn!(%errno, vm = self.identity.name, "a node's process can't be watched");
                    return Ok(true);
                }
            }
        }
    }

    /// Takes in what the next fork will come with. Without it, that fork takes longer.
    fn announced(&mut self, files: Vec<File>) {
        // There is time for this now, and there may be none when the next one comes.
        self.fork.take_if(|fork| fork.is_over());
        let standby = self.announced.take().and_then(|announced| announced.standby);
        // The wake event is for the two others.
        let rendezvous = match open_rendezvous(files.get(1)) {
            Ok(rendezvous) => rendezvous,
            Err(error) => {
                tracing::warn!(vm = self.identity.name, error = chain(&error), "a fork is not prepared for");
                return;
            }
        };
        let standby = standby.filter(|standby| self.brief(standby, &files));
        self.announced = Some(Announced { rendezvous, files, standby });
        self.have_one_stand_by();
    }

    /// Has a warm VM stand by for the fork that is announced, where there is one to spare.
    fn have_one_stand_by(&mut self) {
        if self.announced.as_ref().is_none_or(|announced| announced.standby.is_some()) {
            return;
        }
        let Some(standby) = self.take_standby() else { return };
        if let Some(mut announced) = self.announced.take() {
            announced.standby = Some(standby).filter(|standby| self.brief(standby, &announced.files));
            self.announced = Some(announced);
        }
        self.platform.pool.refill();
    }

    fn brief(&self, standby: &Standby, files: &[File]) -> bool {
        standby.brief(files, if self.platform.prefetches { self.history.of_next_fork() } else { None })
    }

    /// A warm VM that no fork has come of is not replaced at once: whoever asks for too much gets no further
    /// ones for it.
    fn take_standby(&mut self) -> Option<Standby> {
        if self.has_foreign_cpu || self.lent.is_some_and(|lent| lent.elapsed() < LENT_AGAIN) {
            return None;
        }
        let standby = self.platform.pool.take_standby(self.config)?;
        self.lent = Some(Instant::now());
        Some(standby)
    }

    fn pid(&self) -> u32 {
        self.process.as_ref().map_or(0, Process::pid)
    }

    fn runs(&mut self, generation_id: bool) -> Result<(), Error> {
        let pid = self.pid();
        self.platform.registry.runs(self.identity.id, generation_id);
        self.platform.trace.name(pid, &self.identity.name);
        // The event comes first, so that none of the VM's own can come before it.
        self.platform.events.write(&Event::Started { vm: &self.identity, pid });
        if let Some(console) = self.console.take() {
            self.platform.consoles.add(&self.identity, console)?;
        }
        match std::mem::replace(&mut self.waiter, LaunchWaiter::Nobody) {
            LaunchWaiter::Fork(fork) => fork.child_runs(&self.platform, &self.identity, &self.link),
            // One who has gone away does not wait.
            LaunchWaiter::Caller(caller) => drop(caller.send(Ok(()))),
            LaunchWaiter::Nobody => {}
        }
        Ok(())
    }

    fn has_failed(&mut self, why: Reason) {
        let name = self.identity.name.clone();
        match &self.waiter {
            LaunchWaiter::Fork(fork) => {
                fork.fail(ErrorCode::Launch, Reason::of(format_args!("{name} can't be launched: {why}")));
            }
            LaunchWaiter::Caller(caller) => drop(caller.send(Err(Error::Launch { name, why }))),
            LaunchWaiter::Nobody => {
                tracing::error!(vm = name, why = &*why, "a VM that runs says that it can't be launched")
            }
        }
    }
}

/// A VM that runs in a memory that is still being filled.
#[derive(Debug)]
struct Dependent {
    link: Arc<PlatformLink>,
    forced: Arc<OnceLock<ExitReason>>,
}

impl MemoryObserver for Dependent {
    fn is_whole(&self) {
        match self.link.try_send(&ToNode::Whole, &[]) {
            Ok(()) => {}
            Err(link::Error::Closed) => tracing::debug!("a VM has ended before all of its memory was there"),
            // Who tells this has others to tell it too: a node that reads nothing is not waited for, and
            // would never be whole.
            Err(error) => {
                self.forced.get_or_init(|| {
                    ExitReason::Broken(format!("its node takes no messages: {}", chain(&error)).into())
                });
                self.link.shut_down();
            }
        }
    }

    fn is_lost(&self, why: &str) {
        // It may stand still at a page that never comes: whoever serves it ends its process.
        self.forced.get_or_init(|| ExitReason::SourceLost(why.into()));
        self.link.shut_down();
    }
}

/// How fast a node sends.
#[derive(Debug, Default)]
struct MessageRate {
    /// Since when messages are counted.
    since: Option<Instant>,
    messages: u32,
}

impl MessageRate {
    /// Counts a message, and says how long the next ones have to wait, if they have to.
    fn enter(&mut self, now: Instant) -> Option<Duration> {
        const SECOND: Duration = Duration::from_secs(1);
        let passed = self.since.map_or(SECOND, |since| now.duration_since(since));
        if passed >= SECOND {
            (self.since, self.messages) = (Some(now), 0);
        }
        self.messages += 1;
        (self.messages > MESSAGES_PER_SECOND).then(|| SECOND.saturating_sub(passed))
    }
}

impl Drop for Node {
    /// Ends the node, and then says so: with the last one, the platform comes to its end.
    fn drop(&mut self) {
        if let Some(fork) = self.fork.take().filter(|fork| !fork.is_over()) {
            fork.abort();
        }
        drop(self.announced.take());
        drop(self.process.take());
        match &self.waiter {
            LaunchWaiter::Fork(fork) => {
                fork.child_gone(Reason::of(format_args!("the node of {} died", self.identity.name)))
            }
            LaunchWaiter::Caller(_) => {}
            LaunchWaiter::Nobody => {
                if let Some(end) = self.forced.get() {
                    self.end = Some(end.clone());
                }
                self.platform.events.write(&Event::Ended { vm: &self.identity, how: self.end.as_ref() });
                if self.identity.generation == 0 {
                    *lock(&self.platform.root_end) = self.end.take();
                }
            }
        }
        self.platform.pool.remove_user(self.config);
        self.platform.registry.leave(self.identity.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_reads_nothing_is_ended_and_nobody_waits_for_it() {
        let links = [(); 2].map(|()| PlatformLink::pair().unwrap());
        let [deaf, other] = [0, 1].map(|at| {
            let (link, _theirs) = &links[at];
            let link = PlatformLink::new(link.as_fd().try_clone_to_owned().unwrap());
            Dependent { link: Arc::new(link), forced: Arc::default() }
        });
        while deaf.link.try_send(&ToNode::Input(vec![0; 1000]), &[]).is_ok() {}
        for vm in [&deaf, &other] {
            vm.is_whole();
        }
        assert!(
            matches!(deaf.forced.get(), Some(ExitReason::Broken(why)) if why.contains("takes no messages"))
        );
        assert!(deaf.link.is_closed() && !other.link.is_closed() && other.forced.get().is_none());
    }

    #[test]
    fn who_sends_too_much_waits_for_the_next_second() {
        let (mut message_rate, start) = (MessageRate::default(), Instant::now());
        assert!((0..MESSAGES_PER_SECOND).all(|_| message_rate.enter(start).is_none()));
        let later = start + Duration::from_millis(400);
        assert_eq!(message_rate.enter(later), Some(Duration::from_millis(600)));
        assert_eq!(message_rate.enter(start + Duration::from_secs(1)), None);
    }
}
