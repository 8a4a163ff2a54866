//! The platform's part of a fork: it chooses where the children go, and gives shells the order to become them.

use std::{
    fs::File,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use uuid::Uuid;
use vmfork_abi::{ErrorCode, is_vm_type};

use super::{
    Error, Platform,
    limits::{Asked, Limited, Recent},
    node::{Awaited, Node},
};
use crate::{
    error::chain,
    fork::rendezvous::Rendezvous,
    machine::{Config, VmIdentity},
    sync::lock,
    wire::{PlatformLink, Step, ToNode},
};

/// How long children have to themselves before the platform goes on with what nobody waits for.
const HEAD_START: Duration = Duration::from_millis(1);

/// What a parent asks for.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) count: u32,
    pub(super) vm_type: String,
    pub(super) seq: u64,
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
}

/// A fork whose children are not all certain to stay yet.
#[derive(Debug)]
pub(super) struct Fork {
    /// Where parent and children meet: opened when the children have their orders.
    rendezvous: OnceLock<Rendezvous>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Connections to the children that are there.
    children: Vec<Arc<PlatformLink>>,
    /// How many children there are.
    left: usize,
    /// Why it can't succeed.
    failure: Option<(ErrorCode, String)>,
}

impl Error {
    /// What the guest is told when this makes its fork fail.
    fn code(&self) -> ErrorCode {
        match self {
            Self::Stopping => ErrorCode::NotLaunched,
            Self::Full { .. } => ErrorCode::Place,
            Self::Limit { limited, .. } => limited.code(),
            Self::Type(_) => ErrorCode::InvalidType,
            Self::Injected(step) => step.code(),
            _ => ErrorCode::Launch,
        }
    }
}

impl Fork {
    /// Launches the children of a fork. They wait, at the rendezvous, for what the parent makes of it. `files` are the rendezvous, then
    /// those of the image. A fork that can't succeed is one too: the parent learns of it at the rendezvous.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] where there is no rendezvous: nobody can be told then.
    pub(super) fn begin(
        platform: &Arc<Platform>,
        original: &mut Original<'_>,
        order: &Order,
        files: Vec<File>,
    ) -> Result<Arc<Self>, Error> {
        let fork = Arc::new(Self { rendezvous: OnceLock::new(), state: Mutex::default(), changed: Condvar::new() });
        let launched = fork.launch(platform, original, order, &files);
        fork.open(files)?;
        let served = launched.and_then(|nodes| {
            // The children are at work. What serves them can wait, and should not take the processor away from them.
            thread::sleep(HEAD_START);
            nodes.into_iter().try_for_each(Node::serve)
        });
        if let Err(error) = served {
            fork.fail(error.code(), chain(&error))?;
        }
        Ok(fork)
    }

    fn open(&self, files: Vec<File>) -> Result<(), Error> {
        let rendezvous = Rendezvous::open(files.into_iter().next().ok_or(Error::NoRendezvous)?)?;
        // A child that has died meanwhile was not told of.
        let failed = lock(&self.state).failure.is_some();
        let rendezvous = self.rendezvous.get_or_init(|| rendezvous);
        if failed { Ok(rendezvous.fail()?) } else { Ok(()) }
    }

    fn launch(
        self: &Arc<Self>,
        platform: &Arc<Platform>,
        original: &mut Original<'_>,
        order: &Order,
        files: &[File],
    ) -> Result<Vec<Node>, Error> {
        let count = platform.place(original, order)?;
        let shells = platform.pool.take(original.config, count)?;
        let names = platform.registry.names(&order.vm_type, order.count);
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut nodes = Vec::with_capacity(count);
        for ((index, name), shell) in (1..).zip(names).zip(shells) {
            if order.fault == Some(Step::Launch) && index > order.count / 2 {
                return Err(Error::Injected(Step::Launch));
            }
            let identity = VmIdentity {
                id: Uuid::new_v4(),
                parent: original.vm.id,
                name,
                vm_type: order.vm_type.clone(),
                index,
                count: order.count,
                generation: original.vm.generation + 1,
            };
            let node = Node::new(platform, shell, identity.clone(), Awaited::Fork(Arc::clone(self)))?;
            self.add(node.link());
            let copy = ToNode::Copy { identity: identity.clone(), seq: order.seq };
            let sent = node.link().send(&copy, &files);
            nodes.push(node);
            sent.map_err(|source| Error::Node { name: identity.name, source })?;
        }
        Ok(nodes)
    }

    fn add(&self, link: &Arc<PlatformLink>) {
        let mut state = lock(&self.state);
        state.children.push(Arc::clone(link));
        state.left += 1;
    }

    /// Says that it can't succeed. The parent calls it off then.
    pub(super) fn fail(&self, code: ErrorCode, why: String) -> Result<(), Error> {
        lock(&self.state).failure.get_or_insert((code, why));
        self.rendezvous.get().map_or(Ok(()), |rendezvous| Ok(rendezvous.fail()?))
    }

    /// Says that nothing is left of a child that has not run.
    pub(super) fn child_gone(&self, why: &str) {
        if let Err(error) = self.fail(ErrorCode::Launch, why.to_owned()) {
            tracing::error!(error = chain(&error), "a parent can't be told of a child that died");
        }
        lock(&self.state).left -= 1;
        self.changed.notify_all();
    }

    /// Says that a child runs.
    pub(super) fn child_runs(&self) {
        lock(&self.state).left -= 1;
        self.changed.notify_all();
    }

    /// Whether each of its children runs: nothing more can come of it.
    pub(super) fn is_over(&self) -> bool {
        let state = lock(&self.state);
        state.left == 0 && state.failure.is_none()
    }

    /// Ends the children, unless they run, waits until nothing is left of them, and says why it had to come to that.
    pub(super) fn abort(&self) -> Result<(ErrorCode, String), Error> {
        if self.rendezvous.get().map_or(Ok(true), Rendezvous::abort)? {
            let mut state = lock(&self.state);
            for link in std::mem::take(&mut state.children) {
                link.shut_down();
            }
            while state.left > 0 {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let failure = lock(&self.state).failure.take();
        Ok(failure.unwrap_or((ErrorCode::Launch, "the parent has called it off".to_owned())))
    }
}

impl Platform {
    /// Chooses where the children of a fork go: all of them here, where there is room for all.
    fn place(&self, original: &mut Original<'_>, order: &Order) -> Result<usize, Error> {
        if order.fault == Some(Step::Place) {
            return Err(Error::Injected(Step::Place));
        }
        // The node has checked it; but a node that a guest has broken must not choose the names of this platform's files.
        if !is_vm_type(&order.vm_type) {
            return Err(Error::Type(order.vm_type.clone()));
        }
        if !self.limits.are_none() {
            self.check_limits(original, order)?;
        }
        let wanted = usize::try_from(order.count).unwrap_or(usize::MAX);
        self.registry.check_room(wanted, self.max_vms)?;
        Ok(wanted)
    }

    fn check_limits(&self, original: &mut Original<'_>, order: &Order) -> Result<(), Error> {
        let Original { vm, config, recent } = original;
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
