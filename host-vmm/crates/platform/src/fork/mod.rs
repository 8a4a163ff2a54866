//! The platform's part of a fork: it chooses where the children go, and gives warm VMs the order to become
//! them.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use api::{ForkedVm, Placement};
use base::{error::chain, sync::lock, text::Reason};
use node::{
    fork::rendezvous::{self, Rendezvous},
    wire::{CopyOrder, PlatformLink, Prefetch, ToNode},
};
use types::{CopySpec, ForkStep, Locality, VmIdentity, VmShape};
use vmfork_abi::{ErrorCode, Location};

pub(crate) mod operator;
mod place;
pub(crate) mod remote;

use super::{
    Error, Platform,
    images::PendingImage,
    launcher::{Launch, list},
    limits::Recent,
    node_server::{LaunchWaiter, Node},
    process::{Process, WarmNode},
    registry::Reservation,
    seals::{Frozen, Seal, Unsealed},
    working_sets::WorkingSetHistory,
};
use remote::PlacementResult;

/// How long children have to themselves before the platform goes on with what nobody waits for.
const CHILD_GRACE: Duration = Duration::from_millis(1);

/// How long a parent may take beyond its longest pause to say itself what becomes of a fork: it gives up
/// before.
const GRACE: Duration = Duration::from_secs(5);

/// How long children may take to run that may.
const COMMITTED_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the copies of a fork go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Where they are placed, within this.
    Chosen(Locality),
    /// All of them to one other platform.
    Platform {
        /// Its name, or CLUSTER/NAME.
        name: String,
        /// Whether they are to run before all of their memory has come.
        lazy: bool,
    },
}

/// What is asked for.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) count: u32,
    pub(crate) vm_type: String,
    /// Number of the guest's request; 0 where an operator has asked.
    pub(crate) seq: u64,
    pub(crate) target: Target,
    pub(crate) fault: Option<ForkStep>,
}

/// Who is copied.
#[derive(Debug)]
pub(crate) struct ForkParent<'a> {
    /// The VM.
    pub(crate) vm: &'a VmIdentity,
    /// Its shape.
    pub(crate) config: VmShape,
    /// Its forks within the last second.
    pub(crate) recent: &'a mut Recent,
    /// What is known of its copies.
    pub(crate) history: &'a Arc<WorkingSetHistory>,
    /// Whether it was shown another CPU than this platform's guests are.
    pub(crate) has_foreign_cpu: bool,
    /// The connection to its node.
    pub(crate) link: &'a PlatformLink,
    /// The process of its node.
    pub(crate) process: Option<&'a Process>,
    /// What counts the files of its forks that are not sealed yet.
    pub(crate) unsealed: &'a Unsealed,
}

impl ForkParent<'_> {
    /// Whether its node is gone, or about to be.
    fn is_gone(&self) -> bool {
        self.link.is_closed() || self.process.is_none_or(Process::has_ended)
    }
}

/// Files of a fork, and the warm VM that has them already.
#[derive(Debug)]
pub(crate) struct ForkFiles {
    /// The rendezvous, then those of the image.
    pub(crate) files: Vec<File>,
    /// The rendezvous, where there was time to open it.
    pub(crate) rendezvous: Option<Rendezvous>,
    /// A warm VM that has the files.
    pub(crate) standby: Option<WarmNode>,
}

/// A fork whose children are not all certain to stay yet.
#[derive(Debug)]
pub(crate) struct Fork {
    /// Where parent and children meet, until all of them run.
    rendezvous: Mutex<Option<Arc<Rendezvous>>>,
    /// The processor on which the parent runs, where its children are to be elsewhere.
    parents_processor: Option<u32>,
    /// What is kept of it once it is certain, with the state.
    pending_image: Mutex<Option<(PendingImage, Vec<u8>)>>,
    /// What is to be sealed then.
    frozen: Mutex<Option<Frozen>>,
    /// Whether its image is sealed.
    seal: Arc<Seal>,
    state: Mutex<State>,
    changed: Condvar,
    /// When the platform calls it off itself, where there is a parent that should have done it.
    until: Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct State {
    /// Connections to the children that are there.
    children: Vec<Arc<PlatformLink>>,
    /// How many children there are.
    left: usize,
    /// How many copies are on their way to other platforms.
    away: usize,
    /// Those that run.
    running: Vec<ForkedVm>,
    /// Of how many, sent to other platforms, nobody can tell whether they do.
    unknown: usize,
    /// Whether it was called off.
    is_called_off: bool,
    /// Why it can't succeed.
    failure: Option<(ErrorCode, Reason)>,
}

/// Copies of a fork that is certain.
#[derive(Debug)]
pub(crate) struct Made {
    /// Those that run, lowest index first.
    pub(crate) running: Vec<ForkedVm>,
    /// Of how many it is not known whether they do.
    pub(crate) unknown: usize,
}

impl Error {
    /// What the guest is told when this makes its fork fail.
    fn code(&self) -> ErrorCode {
        match self {
            Self::Stopping => ErrorCode::NotLaunched,
            Self::Full { .. } | Self::Place(_) | Self::Alone => ErrorCode::Place,
            Self::Limit { limited, .. } => limited.code(),
            Self::Unsealed(_) => ErrorCode::Rate,
            Self::Type(_) => ErrorCode::InvalidType,
            Self::Injected(step) => step.code(),
            _ => ErrorCode::Launch,
        }
    }
}

impl Fork {
    /// Launches the children of a fork. They wait, at the rendezvous, for what the parent makes of it. A fork
    /// that can't succeed is one too: the parent learns of it at the rendezvous.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] where there is no rendezvous: nobody can be told then.
    pub(crate) fn begin(
        platform: &Arc<Platform>,
        parent: &mut ForkParent<'_>,
        order: &Order,
        fork_files: ForkFiles,
    ) -> Result<Arc<Self>, Error> {
        let ForkFiles { files, rendezvous, mut standby } = fork_files;
        let open = || open_rendezvous(files.first());
        let rendezvous = Arc::new(rendezvous.map_or_else(open, Ok)?.with_children(order.count));
        let files: Vec<Arc<File>> = files.into_iter().map(Arc::new).collect();
        let image = files.get(1..).unwrap_or_default();
        let fork = Self::meeting_in(Arc::clone(&rendezvous), Arc::default());
        *lock(&fork.until) = Some(Instant::now() + platform.max_pause + GRACE);
        // Where this fails, the parent is told before it is let go.
        let mut hold = platform.images.wants(&order.vm_type).then(|| rendezvous.hold()).transpose()?;
        let mut pending_image = None;
        let placed = platform.place(parent, order);
        let ForkParent { config, vm, history, has_foreign_cpu, unsealed, .. } = *parent;
        let (ram_bytes, unsealed) = (config.ram_bytes, unsealed.clone());
        *lock(&fork.frozen) = Some(Frozen { files: image.to_vec(), parent: vm.id, ram_bytes, unsealed });
        let launched = placed.and_then(|PlacementResult { here, away }| {
            let launch = Launch {
                config,
                original: vm,
                vm_type: &order.vm_type,
                slots: &here,
                total: order.count,
                arrivals: order.count,
                seq: order.seq,
                fault: order.fault,
                history,
                has_foreign_cpu,
                postcopy: None,
            };
            if hold.is_some() {
                pending_image = Some(PendingImage::new(launch, image.to_vec()));
            }
            if !away.is_empty() {
                fork.send_away(platform, &rendezvous, &launch, &order.target, away, image)?;
            }
            list(&rendezvous, &here, platform.name(), Location::Local)?;
            if here.is_empty() {
                return Ok(Vec::new());
            }
            let room = platform.reserve(here.len())?;
            fork.launch(platform, launch, &files, standby.take(), room)
        });
        let served = launched.and_then(|nodes| {
            if let Some(pending_image) = pending_image {
                // Once its copies run, they may write there.
                let state = rendezvous.wait_state(|| fork.is_off() || fork.is_late() || parent.is_gone())?;
                *lock(&fork.pending_image) = Some((pending_image, state));
            }
            drop(hold.take());
            // The children are at work. What serves them can wait, and should not take the processor away
            // from them.
            thread::sleep(CHILD_GRACE);
            nodes.into_iter().try_for_each(Node::serve)
        });
        if let Err(error) = served {
            fork.fail(error.code(), Reason::of_error(&error));
        }
        // One that was not needed may be awake already: it is ended, which takes longer than the parent
        // should wait.
        if let Some(standby) = standby {
            standby.end();
        }
        Ok(fork)
    }

    /// One without children yet, whose sides meet there, with the seal of its image.
    pub(crate) fn meeting_in(rendezvous: Arc<Rendezvous>, seal: Arc<Seal>) -> Arc<Self> {
        Arc::new(Self {
            parents_processor: rendezvous.parents_processor(),
            rendezvous: Mutex::new(Some(rendezvous)),
            pending_image: Mutex::default(),
            frozen: Mutex::default(),
            seal,
            state: Mutex::default(),
            changed: Condvar::new(),
            until: Mutex::default(),
        })
    }

    pub(crate) fn launch(
        self: &Arc<Self>,
        platform: &Arc<Platform>,
        launch: Launch<'_>,
        files: &[impl AsFd],
        standby: Option<WarmNode>,
        mut room: Reservation,
    ) -> Result<Vec<Node>, Error> {
        let Launch { config, original, vm_type, slots, total, arrivals, seq, fault, .. } = launch;
        let Launch { history, has_foreign_cpu, postcopy, .. } = launch;
        let wanted = slots.len();
        let names = platform.registry.names(vm_type, wanted);
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let (mut first, others) = match platform.prefetches {
            true => history.next_fork(),
            false => (Prefetch::None, Prefetch::None),
        };
        let mut nodes = Vec::with_capacity(wanted);
        let mut files_for_next = if standby.is_some() { &[] } else { &files[..] };
        let mut warm_nodes: Vec<WarmNode> = standby.into_iter().collect();
        for (CopySpec { id, index }, name) in slots.iter().copied().zip(names) {
            if fault == Some(ForkStep::Launch) && index > total / 2 {
                return Err(Error::Injected(ForkStep::Launch));
            }
            // A parent waits until nothing is left of a fork that it has called off: no more is launched for
            // that.
            if self.rendezvous().is_some_and(|rendezvous| rendezvous.is_aborted()) {
                return Err(rendezvous::Error::Aborted.into());
            }
            if warm_nodes.is_empty() {
                let wanted = wanted - nodes.len();
                warm_nodes = match has_foreign_cpu {
                    true => platform.pool.take_cold(config, wanted)?,
                    false => platform.pool.take(config, wanted)?,
                };
            }
            let warm_node = warm_nodes.pop().ok_or(Error::Stopping)?;
            let identity = VmIdentity {
                id,
                parent: original.id,
                name,
                vm_type: vm_type.to_owned(),
                index,
                count: total,
                generation: original.generation.saturating_add(1),
            };
            let prefetch = std::mem::replace(&mut first, others.clone());
            let order = CopyOrder {
                identity,
                seq,
                arrivals,
                lazy: postcopy.is_some(),
                working_set: prefetch,
                first_vcpu_late: fault == Some(ForkStep::FirstRun),
            };
            let mut node = self.order(platform, warm_node, order, history, files_for_next)?;
            room.is_used();
            node.come_from(has_foreign_cpu, postcopy);
            nodes.push(node);
            files_for_next = &files;
        }
        Ok(nodes)
    }

    /// Gives a warm VM the order to become a copy.
    fn order(
        self: &Arc<Self>,
        platform: &Arc<Platform>,
        warm_node: WarmNode,
        order: CopyOrder,
        history: &Arc<WorkingSetHistory>,
        files: &[BorrowedFd<'_>],
    ) -> Result<Node, Error> {
        if let Some(processor) = self.parents_processor() {
            warm_node.process.keep_off(processor);
        }
        let mut node =
            Node::new(platform, warm_node, order.identity.clone(), LaunchWaiter::Fork(Arc::clone(self)))?;
        self.add(node.link());
        if matches!(order.working_set, Prefetch::Record) {
            node.record_to(history);
        }
        let name = order.identity.name.clone();
        // A warm VM that stands by may have been kept from reading.
        let sent = node.link().try_send(&ToNode::Copy(order), files);
        sent.map_err(|source| Error::Node { name, source })?;
        Ok(node)
    }

    fn add(&self, link: &Arc<PlatformLink>) {
        let mut state = lock(&self.state);
        state.children.push(Arc::clone(link));
        state.left += 1;
    }

    /// Says that it can't succeed. The parent calls it off then.
    pub(crate) fn fail(&self, code: ErrorCode, why: Reason) {
        lock(&self.state).failure.get_or_insert((code, why));
        if let Some(rendezvous) = self.rendezvous() {
            tell_failure(&rendezvous);
        }
    }

    /// Says that so many copies are about to be sent to other platforms.
    pub(crate) fn expect(&self, count: usize) {
        lock(&self.state).away += count;
    }

    /// Says that so many of them are not on their way any more.
    pub(crate) fn settled(&self, count: usize) {
        lock(&self.state).away -= count;
        self.changed.notify_all();
    }

    /// Says that it is known what became of so many of them, after all were let run: which run.
    pub(crate) fn sent(&self, count: usize, running: impl IntoIterator<Item = ForkedVm>) {
        let mut state = lock(&self.state);
        state.running.extend(running);
        state.away -= count;
        self.part(&state);
        self.changed.notify_all();
    }

    /// Says that nobody can tell of so many of them whether they run, after all were let run.
    pub(crate) fn lost_sight(&self, count: usize) {
        lock(&self.state).unknown += count;
    }

    /// Says that so many of them could not be sent, and will not run.
    pub(crate) fn gone(&self, count: usize, why: Reason) {
        self.fail(ErrorCode::Place, why);
        self.settled(count);
    }

    /// How long it is until the platform calls it off itself, where it would.
    pub(crate) fn time_left(&self) -> Option<Duration> {
        Some(lock(&self.until).as_ref()?.saturating_duration_since(Instant::now()))
    }

    /// True when the platform's own deadline for the parent's decision has passed.
    fn is_late(&self) -> bool {
        self.time_left().is_some_and(|left| left.is_zero())
    }

    /// Calls it off where its parent should have decided long ago what becomes of it: a node that a guest has
    /// broken must not have copies wait here and elsewhere for ever.
    pub(crate) fn end_if_late(&self) {
        if !self.is_late() {
            return;
        }
        *lock(&self.until) = None;
        if self.rendezvous().is_some_and(|rendezvous| matches!(rendezvous.abort(), Ok(true))) {
            self.fail(
                ErrorCode::Timeout,
                "the parent has not decided in time what becomes of its copies".into(),
            );
            drop(self.end_children(lock(&self.state)));
        }
    }

    /// Whether nothing can come of it any more.
    pub(crate) fn is_off(&self) -> bool {
        let state = lock(&self.state);
        state.is_called_off || state.failure.is_some()
    }

    /// Says that nothing is left of a child that has not run.
    pub(crate) fn child_gone(&self, why: Reason) {
        self.fail(ErrorCode::Launch, why);
        lock(&self.state).left -= 1;
        self.changed.notify_all();
    }

    /// Whether its image is sealed.
    pub(crate) fn seal(&self) -> &Arc<Seal> {
        &self.seal
    }

    /// Says that its copies will run: its image is sealed, and what is to be kept of it is kept then.
    pub(crate) fn is_certain(&self, platform: &Platform) {
        // Whoever else says so too waits until the image is there: it must be when its seal is decided.
        let mut pending_image = lock(&self.pending_image);
        if let Some((pending_image, state)) = pending_image.take()
            && let Err(error) = platform.keep(pending_image, state, &self.seal)
        {
            tracing::warn!(error = chain(&error), "an image is not kept");
        }
        let frozen = lock(&self.frozen).take();
        if let Some(frozen) = frozen {
            platform.seal(&self.seal, frozen);
        }
        drop(pending_image);
    }

    /// Takes in the parent's report that its copies run: they may be gone before they say so themselves.
    pub(crate) fn is_told_certain(&self, platform: &Platform) {
        if self.rendezvous().is_some_and(|rendezvous| rendezvous.is_committed()) {
            self.is_certain(platform);
        }
    }

    /// Says that the child `vm` at the other end of `link` runs: then all will.
    pub(crate) fn child_runs(&self, platform: &Platform, vm: &VmIdentity, link: &Arc<PlatformLink>) {
        self.is_certain(platform);
        let mut state = lock(&self.state);
        state.running.push(ForkedVm {
            id: vm.id,
            name: vm.name.as_str().into(),
            index: vm.index,
            platform: platform.name().into(),
            placement: Placement::Local,
        });
        // Nothing that anybody says of the fork touches it any more.
        state.children.retain(|child| !Arc::ptr_eq(child, link));
        state.left -= 1;
        self.part(&state);
        self.changed.notify_all();
    }

    /// Waits until it is known of each copy what became of it, after all were let run, and says which run.
    pub(crate) fn copies(&self) -> Made {
        let is_waiting = |state: &mut State| state.left > 0 || state.away > 0;
        let waited = self.changed.wait_timeout_while(lock(&self.state), COMMITTED_TIMEOUT, is_waiting);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let (mut running, unknown) = (state.running.clone(), state.unknown + state.left + state.away);
        drop(state);
        running.sort_by_key(|copy| copy.index);
        Made { running, unknown }
    }

    /// Lets go of where its sides have met, once all of its copies run.
    fn part(&self, state: &State) {
        if state.left == 0 && state.away == 0 {
            *lock(&self.rendezvous) = None;
        }
    }

    fn rendezvous(&self) -> Option<Arc<Rendezvous>> {
        lock(&self.rendezvous).clone()
    }

    /// The processor on which the parent runs, where its children are to be elsewhere.
    pub(crate) fn parents_processor(&self) -> Option<u32> {
        self.parents_processor
    }

    /// Whether it can't succeed.
    pub(crate) fn has_failed(&self) -> bool {
        lock(&self.state).failure.is_some()
    }

    /// Whether each of its children runs: nothing more can come of it.
    pub(crate) fn is_over(&self) -> bool {
        let state = lock(&self.state);
        state.left == 0 && state.away == 0 && state.failure.is_none()
    }

    /// Ends the children that do not run, waits until nothing is left of them here, and says why it had to
    /// come to that. Copies on other platforms are told, or undone once these hear nothing more.
    ///
    /// The parent may commit at any time. Where it has, the children have a while to say themselves that they
    /// run.
    pub(crate) fn abort(&self) -> (ErrorCode, Reason) {
        let committed = self.rendezvous().is_some_and(|rendezvous| match rendezvous.abort() {
            Ok(aborted) => !aborted,
            Err(error) => {
                tracing::warn!(error = chain(&error), "a fork can't be called off where its sides meet");
                false
            }
        });
        let mut state = lock(&self.state);
        state.is_called_off = !committed;
        if committed {
            let waited = self.changed.wait_timeout_while(state, COMMITTED_TIMEOUT, |state| state.left > 0);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut state = self.end_children(state);
        state.failure.take().unwrap_or((ErrorCode::Launch, "the parent has called it off".into()))
    }

    /// Ends the children that do not run, and waits until nothing is left of them.
    fn end_children<'s>(&self, mut state: MutexGuard<'s, State>) -> MutexGuard<'s, State> {
        for link in std::mem::take(&mut state.children) {
            link.shut_down();
        }
        while state.left > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }
}

/// Opens the rendezvous that a node has sent.
pub(crate) fn open_rendezvous(file: Option<&File>) -> Result<Rendezvous, Error> {
    Ok(Rendezvous::open(file.ok_or(Error::NoRendezvous)?.try_clone().map_err(Error::Start)?)?)
}

/// Tells a parent that there will be no children. One that has made this impossible waits for nothing until
/// it is tired of it.
fn tell_failure(rendezvous: &Rendezvous) {
    if let Err(error) = rendezvous.fail() {
        tracing::warn!(error = chain(&error), "a parent can't be told of a fork's failure");
    }
}
