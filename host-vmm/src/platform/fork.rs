//! The platform's part of a fork: it chooses where the children go, and gives shells the order to become them.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use uuid::Uuid;
use vmfork_abi::{ErrorCode, Location, MAX_CHILDREN, is_vm_type};

use super::{
    Error, Platform,
    away::Placed,
    copies::{Launch, Slot, list, slots},
    images::Keeping,
    limits::{Asked, Limited, Recent},
    node::{Awaited, Node},
    prefetch::Learned,
    process::Shell,
    registry::Reservation,
};
use crate::{
    api::{ForkedVm, Placement},
    cluster::placement::{Where, Wish},
    error::chain,
    fork::rendezvous::Rendezvous,
    machine::{Config, VmIdentity},
    sync::lock,
    wire::{CopyOrder, PlatformLink, Prefetch, Step, ToNode},
};

/// How long children have to themselves before the platform goes on with what nobody waits for.
const HEAD_START: Duration = Duration::from_millis(1);

/// How long children may take to run that may.
const COMMITTED_TIMEOUT: Duration = Duration::from_secs(60);

/// Where the copies of a fork go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Where they are placed, within this.
    Chosen(Where),
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
pub(super) struct Order {
    pub(super) count: u32,
    pub(super) vm_type: String,
    /// Number of the guest's request; 0 where an operator has asked.
    pub(super) seq: u64,
    pub(super) target: Target,
    pub(super) fault: Option<Step>,
}

/// Who is copied.
#[derive(Debug)]
pub(super) struct Original<'a> {
    /// The VM.
    pub(super) vm: &'a VmIdentity,
    /// Its shape.
    pub(super) config: Config,
    /// Its forks within the last second.
    pub(super) recent: &'a mut Recent,
    /// What is known of its copies.
    pub(super) learned: &'a Arc<Learned>,
    /// Whether it was shown another CPU than this platform's guests are.
    pub(super) is_foreign: bool,
}

/// Where a fork's children come into being.
#[derive(Debug)]
pub(super) struct Place {
    /// The rendezvous, then those of the image.
    pub(super) files: Vec<File>,
    /// The rendezvous, where there was time to open it.
    pub(super) rendezvous: Option<Rendezvous>,
    /// A shell that has the files.
    pub(super) standby: Option<Shell>,
}

/// A fork whose children are not all certain to stay yet.
#[derive(Debug)]
pub(super) struct Fork {
    /// Where parent and children meet, until all of them run.
    rendezvous: Mutex<Option<Arc<Rendezvous>>>,
    /// What is kept of it once it is certain.
    keeping: Mutex<Option<Keeping>>,
    state: Mutex<State>,
    changed: Condvar,
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
    /// Whether it was called off.
    is_called_off: bool,
    /// Why it can't succeed.
    failure: Option<(ErrorCode, String)>,
}

impl Error {
    /// What the guest is told when this makes its fork fail.
    fn code(&self) -> ErrorCode {
        match self {
            Self::Stopping => ErrorCode::NotLaunched,
            Self::Full { .. } | Self::Place(_) | Self::Alone => ErrorCode::Place,
            Self::Limit { limited, .. } => limited.code(),
            Self::Type(_) => ErrorCode::InvalidType,
            Self::Injected(step) => step.code(),
            _ => ErrorCode::Launch,
        }
    }
}

impl Fork {
    /// Launches the children of a fork. They wait, at the rendezvous, for what the parent makes of it. A fork that can't succeed is one
    /// too: the parent learns of it at the rendezvous.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] where there is no rendezvous: nobody can be told then.
    pub(super) fn begin(
        platform: &Arc<Platform>,
        original: &mut Original<'_>,
        order: &Order,
        place: Place,
    ) -> Result<Arc<Self>, Error> {
        let Place { files, rendezvous, mut standby } = place;
        let open = || open_rendezvous(files.first());
        let rendezvous = Arc::new(rendezvous.map_or_else(open, Ok)?.with_children(order.count));
        let fork = Self::meeting_in(Arc::clone(&rendezvous));
        let placed = platform.place(original, order);
        let Original { config, vm: original, learned, is_foreign, .. } = *original;
        let launched = placed.and_then(|Placed { here, away }| {
            let launch = Launch {
                config,
                original,
                vm_type: &order.vm_type,
                slots: &here,
                total: order.count,
                arrivals: order.count,
                seq: order.seq,
                fault: order.fault,
                learned,
                is_foreign,
                filling: None,
            };
            if platform.images.wants(&order.vm_type) {
                let image = files.iter().skip(1).map(|file| file.try_clone().map(Arc::new)).collect::<Result<_, _>>();
                *lock(&fork.keeping) = Some(Keeping::new(launch, image.map_err(Error::Start)?));
            }
            if !away.is_empty() {
                let image = files.get(1..).unwrap_or_default();
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
            // The children are at work. What serves them can wait, and should not take the processor away from them.
            thread::sleep(HEAD_START);
            nodes.into_iter().try_for_each(Node::serve)
        });
        if let Err(error) = served {
            fork.fail(error.code(), chain(&error));
        }
        // One that was not needed may be awake already: it is ended, which takes longer than the parent should wait.
        if let Some(standby) = standby {
            standby.end();
        }
        Ok(fork)
    }

    /// One without children yet, whose sides meet there.
    pub(super) fn meeting_in(rendezvous: Arc<Rendezvous>) -> Arc<Self> {
        Arc::new(Self {
            rendezvous: Mutex::new(Some(rendezvous)),
            keeping: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    pub(super) fn launch(
        self: &Arc<Self>,
        platform: &Arc<Platform>,
        launch: Launch<'_>,
        files: &[impl AsFd],
        standby: Option<Shell>,
        mut room: Reservation,
    ) -> Result<Vec<Node>, Error> {
        let Launch { config, original, vm_type, slots, total, arrivals, seq, fault, learned, is_foreign, filling } =
            launch;
        let wanted = slots.len();
        let names = platform.registry.names(vm_type, wanted);
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let (mut first, others) = match platform.prefetches {
            true => learned.next_fork(),
            false => (Prefetch::None, Prefetch::None),
        };
        let mut nodes = Vec::with_capacity(wanted);
        let mut files_for_next = if standby.is_some() { &[] } else { &files[..] };
        let mut shells: Vec<Shell> = standby.into_iter().collect();
        for (Slot { id, index }, name) in slots.iter().copied().zip(names) {
            if fault == Some(Step::Launch) && index > total / 2 {
                return Err(Error::Injected(Step::Launch));
            }
            if shells.is_empty() {
                let wanted = wanted - nodes.len();
                shells = match is_foreign {
                    true => platform.pool.take_cold(config, wanted)?,
                    false => platform.pool.take(config, wanted)?,
                };
            }
            let shell = shells.pop().ok_or(Error::Stopping)?;
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
            let order = CopyOrder { identity, seq, arrivals, lazy: filling.is_some(), working_set: prefetch };
            let mut node = self.order(platform, shell, order, learned, files_for_next)?;
            room.is_used();
            node.come_from(is_foreign, filling);
            nodes.push(node);
            files_for_next = &files;
        }
        Ok(nodes)
    }

    /// Gives a shell the order to become a copy.
    fn order(
        self: &Arc<Self>,
        platform: &Arc<Platform>,
        shell: Shell,
        order: CopyOrder,
        learned: &Arc<Learned>,
        files: &[BorrowedFd<'_>],
    ) -> Result<Node, Error> {
        if let Some(processor) = self.parents_processor() {
            shell.process.keep_off(processor);
        }
        let mut node = Node::new(platform, shell, order.identity.clone(), Awaited::Fork(Arc::clone(self)))?;
        self.add(node.link());
        if matches!(order.working_set, Prefetch::Record) {
            node.teach(learned);
        }
        let name = order.identity.name.clone();
        // A shell that stands by may have been kept from reading.
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
    pub(super) fn fail(&self, code: ErrorCode, why: String) {
        lock(&self.state).failure.get_or_insert((code, why));
        if let Some(rendezvous) = self.rendezvous() {
            tell_failure(&rendezvous);
        }
    }

    /// Says that so many copies are about to be sent to other platforms.
    pub(super) fn expect(&self, count: usize) {
        lock(&self.state).away += count;
    }

    /// Says that so many of them are not on their way any more.
    pub(super) fn settled(&self, count: usize) {
        lock(&self.state).away -= count;
        self.changed.notify_all();
    }

    /// Says that it is known what became of so many of them, after all were let run: which run.
    pub(super) fn sent(&self, count: usize, running: impl IntoIterator<Item = ForkedVm>) {
        let mut state = lock(&self.state);
        state.running.extend(running);
        state.away -= count;
        self.part(&state);
        self.changed.notify_all();
    }

    /// Says that so many of them could not be sent, and will not run.
    pub(super) fn gone(&self, count: usize, why: &str) {
        self.fail(ErrorCode::Place, why.to_owned());
        self.settled(count);
    }

    /// Whether nothing can come of it any more.
    pub(super) fn is_off(&self) -> bool {
        let state = lock(&self.state);
        state.is_called_off || state.failure.is_some()
    }

    /// Says that nothing is left of a child that has not run.
    pub(super) fn child_gone(&self, why: &str) {
        self.fail(ErrorCode::Launch, why.to_owned());
        lock(&self.state).left -= 1;
        self.changed.notify_all();
    }

    /// Says that its copies will run: what is to be kept of it is kept.
    pub(super) fn is_certain(&self, platform: &Platform) {
        let keeping = lock(&self.keeping).take();
        if let (Some(keeping), Some(rendezvous)) = (keeping, self.rendezvous())
            && let Err(error) = platform.keep(keeping, &rendezvous)
        {
            tracing::warn!(error = chain(&error), "an image is not kept");
        }
    }

    /// Says that the child `vm` at the other end of `link` runs: then all will.
    pub(super) fn child_runs(&self, platform: &Platform, vm: &VmIdentity, link: &Arc<PlatformLink>) {
        self.is_certain(platform);
        let mut state = lock(&self.state);
        state.running.push(ForkedVm {
            id: vm.id,
            name: vm.name.clone(),
            index: vm.index,
            platform: platform.name().to_owned(),
            placement: Placement::Local,
        });
        // Nothing that anybody says of the fork touches it any more.
        state.children.retain(|child| !Arc::ptr_eq(child, link));
        state.left -= 1;
        self.part(&state);
        self.changed.notify_all();
    }

    /// Waits until it is known of each copy what became of it, after all were let run, and says which run, lowest index first.
    pub(super) fn copies(&self) -> Vec<ForkedVm> {
        let is_waiting = |state: &mut State| state.left > 0 || state.away > 0;
        let waited = self.changed.wait_timeout_while(lock(&self.state), COMMITTED_TIMEOUT, is_waiting);
        let mut running = waited.unwrap_or_else(PoisonError::into_inner).0.running.clone();
        running.sort_by_key(|copy| copy.index);
        running
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
    pub(super) fn parents_processor(&self) -> Option<u32> {
        self.rendezvous()?.parents_processor()
    }

    /// Whether it can't succeed.
    pub(super) fn has_failed(&self) -> bool {
        lock(&self.state).failure.is_some()
    }

    /// Whether each of its children runs: nothing more can come of it.
    pub(super) fn is_over(&self) -> bool {
        let state = lock(&self.state);
        state.left == 0 && state.away == 0 && state.failure.is_none()
    }

    /// Ends the children that do not run, waits until nothing is left of them here, and says why it had to come to that. Copies on other
    /// platforms are told, or undone once these hear nothing more.
    ///
    /// Parent and children may write anything into the rendezvous at any time. Where it says that the children run, they have a while to
    /// say so themselves.
    pub(super) fn abort(&self) -> (ErrorCode, String) {
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
        for link in std::mem::take(&mut state.children) {
            link.shut_down();
        }
        while state.left > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failure.take().unwrap_or((ErrorCode::Launch, "the parent has called it off".to_owned()))
    }
}

/// Opens the rendezvous that a node has sent.
pub(super) fn open_rendezvous(file: Option<&File>) -> Result<Rendezvous, Error> {
    Ok(Rendezvous::open(file.ok_or(Error::NoRendezvous)?.try_clone().map_err(Error::Start)?)?)
}

/// Tells a parent that there will be no children. One that has made this impossible waits for nothing until it is tired of it.
fn tell_failure(rendezvous: &Rendezvous) {
    if let Err(error) = rendezvous.fail() {
        tracing::warn!(error = chain(&error), "a parent can't be told of a fork's failure");
    }
}

impl Platform {
    /// Chooses where the copies of a fork go, where there may be any.
    fn place(&self, original: &mut Original<'_>, order: &Order) -> Result<Placed, Error> {
        if order.fault == Some(Step::Place) {
            return Err(Error::Injected(Step::Place));
        }
        // The node has checked both; but a node that a guest has broken must not choose the names of this platform's files, nor have it make
        // up so many copies that there is no memory for their IDs.
        if !is_vm_type(&order.vm_type) {
            return Err(Error::Type(order.vm_type.clone()));
        }
        if !(1..=MAX_CHILDREN).contains(&order.count) {
            return Err(Error::Count(order.count));
        }
        if !self.limits.are_none() {
            self.check_limits(original, order)?;
        }
        let slots = slots(order.count)?;
        let location = match &order.target {
            Target::Chosen(location) => *location,
            Target::Platform { name, .. } => return Ok(Placed::on(name, slots)),
        };
        let wish = Wish {
            vm_type: order.vm_type.clone(),
            count: order.count,
            config: original.config,
            location,
            images: Vec::new(),
            source: self.name().to_owned(),
        };
        self.choose(slots, &wish, &[])
    }

    /// Checks the limit for the memory of all VMs of a type, of which so many more are to come.
    pub(super) fn check_memory(&self, vm_type: &str, config: Config, count: usize) -> Result<(), Error> {
        let (_, memory_bytes) = self.registry.usage(Uuid::nil(), vm_type);
        let more_bytes = config.ram_bytes.saturating_mul(count as u64);
        self.limits.check_memory(vm_type, memory_bytes.saturating_add(more_bytes))
    }

    fn check_limits(&self, original: &mut Original<'_>, order: &Order) -> Result<(), Error> {
        let Original { vm, config, recent, .. } = original;
        let rates = [&vm.vm_type, &order.vm_type].map(|vm_type| self.limits.most(vm_type, Limited::Rate));
        recent.enter(&vm.vm_type, rates.into_iter().flatten().min(), Instant::now())?;
        let (children, memory_bytes) = self.registry.usage(vm.id, &order.vm_type);
        let count = u64::from(order.count);
        let asked = Asked {
            count,
            children: children.saturating_add(count),
            generation: u64::from(vm.generation) + 1,
            memory_bytes: memory_bytes.saturating_add(config.ram_bytes.saturating_mul(count)),
        };
        self.limits.check(&vm.vm_type, &order.vm_type, asked)
    }
}
