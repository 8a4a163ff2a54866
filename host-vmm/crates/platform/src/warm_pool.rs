//! The pool of warm VMs, which wait to become the children of a fork.
//!
//! There is a pool for each shape of machine that is in use, or was not long ago: where one clone has come
//! from, another may. A thread keeps so many warm VMs in it as the operator wants, since making one takes
//! milliseconds and giving one away takes microseconds. Pools of which nobody has asked for a VM in a while
//! keep one.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fs::File,
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use base::{error::chain, sync::lock, text::Reason, threads};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use node::wire::{ToNode, ToPlatform};
use types::VmShape;
use vmm::memory::WorkingSet;

use super::{
    Error, Platform,
    process::{BATCH, WarmNode, Zygote},
};

/// How long after a fork its warm VMs are replaced: its children come first.
const REFILL_DELAY: Duration = Duration::from_millis(10);

/// Time for which a shape's warm VMs are kept while nobody asks for them, but for one.
const IDLE: Duration = Duration::from_secs(60);

/// How long that one is kept where there is no VM of its shape.
const UNUSED: Duration = Duration::from_secs(600);

/// Most shapes without a VM that have warm VMs: other platforms choose them.
const MAX_UNUSED: usize = 4;

/// How often it is looked for warm VMs that have died.
const CHECK: Duration = Duration::from_secs(5);

/// How long the pool waits after warm VMs could not be made.
const RETRY_DELAY: Duration = Duration::from_secs(5);

/// Pool of the warm VMs of a platform.
#[derive(Debug)]
pub(crate) struct WarmPool {
    zygote: Zygote,
    /// How many warm VMs of each shape to keep ready.
    ready: usize,
    shape_pools: Mutex<ShapePools>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ShapePools {
    by_shape: BTreeMap<VmShape, ShapePool>,
    closed: bool,
}

#[derive(Debug)]
struct ShapePool {
    warm_nodes: Vec<WarmNode>,
    /// How many VMs of this shape there are.
    users: usize,
    /// Each warm VM that stands by for a VM has a copy of it.
    standing_by: Arc<()>,
    /// When somebody last asked for warm VMs.
    asked: Instant,
    /// Not to be refilled before.
    refill: Instant,
}

/// A warm VM that stands by for the next fork of one VM.
#[derive(Debug)]
pub(crate) struct Standby {
    warm_node: WarmNode,
    _counted: Arc<()>,
}

impl Standby {
    /// Tells it what that fork will come with, and what its first copy is likely to write to; says whether it
    /// could be told.
    pub(crate) fn brief(&self, files: &[File], working_set: Option<WorkingSet>) -> bool {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.warm_node.link.try_send(&ToNode::StandBy { working_set }, &files).is_ok()
    }

    /// The warm VM, unless it has died meanwhile.
    pub(crate) fn into_warm_node(self) -> Option<WarmNode> {
        Some(self.warm_node).filter(|warm_node| !warm_node.link.is_closed())
    }
}

impl WarmPool {
    /// An empty pool that is to keep `ready` warm VMs of each shape, with this CPU profile, whose VMs may
    /// stand still for so long for a fork.
    pub(crate) fn new(ready: usize, cpu_profile: String, max_pause: Duration) -> Self {
        let zygote = Zygote::new(cpu_profile, max_pause);
        Self { zygote, ready, shape_pools: Mutex::default(), changed: Condvar::new() }
    }

    /// Starts the thread that fills it.
    pub(crate) fn fill_in_background(platform: &Arc<Platform>) -> Result<(), Error> {
        let platform = Arc::downgrade(platform);
        threads::background("pool", move || fill(&platform)).map_err(Error::Start)?;
        Ok(())
    }

    /// Takes up to `count` warm VMs, and at least one: ready ones where there are any, else new ones, which
    /// are being built then. It takes a while to start many; who needs them gives the first ones their orders
    /// meanwhile.
    pub(crate) fn take(&self, config: VmShape, count: usize) -> Result<Vec<WarmNode>, Error> {
        let ready = self.take_ready(config, count);
        if ready.is_empty() { self.zygote.spawn(config, false, count.min(BATCH)) } else { Ok(ready) }
    }

    /// As [`WarmPool::take`], but new ones, whose vCPUs can still become others than this host's.
    pub(crate) fn take_cold(&self, config: VmShape, count: usize) -> Result<Vec<WarmNode>, Error> {
        self.zygote.spawn(config, true, count.min(BATCH))
    }

    /// Whether warm VMs may stand by for single VMs.
    pub(crate) fn has_standbys(&self) -> bool {
        self.ready > 0
    }

    /// Takes a warm VM that is to stand by for one VM, where there is one to spare: there may be as many of
    /// them as warm VMs that stand ready for everybody.
    pub(crate) fn take_standby(&self, config: VmShape) -> Option<Standby> {
        let mut shape_pools = lock(&self.shape_pools);
        let pool = shape_pools.by_shape.get_mut(&config)?;
        // One of them is the pool's own.
        if Arc::strong_count(&pool.standing_by) > self.ready {
            return None;
        }
        let built = pool.warm_nodes.iter().position(|warm_node| matches!(look_at(warm_node), Look::Built))?;
        let warm_node = pool.warm_nodes.remove(built);
        Some(Standby { warm_node, _counted: Arc::clone(&pool.standing_by) })
    }

    fn take_ready(&self, config: VmShape, count: usize) -> Vec<WarmNode> {
        let mut shape_pools = lock(&self.shape_pools);
        let Some(pool) = shape_pools.by_shape.get_mut(&config) else { return Vec::new() };
        pool.asked = Instant::now();
        pool.refill = pool.asked + REFILL_DELAY;
        let (mut taken, mut unbuilt, mut dead) = (Vec::with_capacity(count), Vec::new(), Vec::new());
        while taken.len() < count
            && let Some(warm_node) = pool.warm_nodes.pop()
        {
            match look_at(&warm_node) {
                Look::Built => taken.push(warm_node),
                Look::Unbuilt => unbuilt.push(warm_node),
                Look::Dead => dead.push(warm_node),
            }
        }
        // Those that are built come first.
        taken.extend(unbuilt.drain(..unbuilt.len().min(count - taken.len())));
        pool.warm_nodes.append(&mut unbuilt);
        drop(shape_pools);
        dead.iter().for_each(tell_why);
        taken
    }

    /// Says that there is one more VM of this shape. [`WarmPool::refill`] is to be called once that has what
    /// it needs.
    pub(crate) fn add_user(&self, config: VmShape) {
        if let Some(pool) = lock(&self.shape_pools).pool(config) {
            pool.users += 1;
        }
    }

    /// Says that VMs of this shape are about to come: warm VMs for them are made meanwhile.
    pub(crate) fn expect(&self, config: VmShape) {
        if let Some(pool) = lock(&self.shape_pools).pool(config) {
            pool.asked = Instant::now();
        }
        self.refill();
    }

    /// How many warm VMs there are of each shape.
    pub(crate) fn ready_counts(&self) -> Vec<(VmShape, usize)> {
        lock(&self.shape_pools)
            .by_shape
            .iter()
            .map(|(config, pool)| (*config, pool.warm_nodes.len()))
            .collect()
    }

    /// Wakes up the thread that fills the pools.
    pub(crate) fn refill(&self) {
        self.changed.notify_all();
    }

    /// Says that there is one VM of this shape less.
    pub(crate) fn remove_user(&self, config: VmShape) {
        let mut shape_pools = lock(&self.shape_pools);
        if let Some(pool) = shape_pools.by_shape.get_mut(&config) {
            pool.users -= 1;
        }
        self.changed.notify_all();
    }

    /// Ends all warm VMs, and keeps none from now on.
    pub(crate) fn close(&self) {
        let mut shape_pools = lock(&self.shape_pools);
        shape_pools.closed = true;
        shape_pools.by_shape.clear();
        self.changed.notify_all();
    }

    /// Brings every pool to where it should be, and says how long that will do.
    fn rebalance(&self) -> Result<Option<Duration>, Error> {
        let now = Instant::now();
        let mut shape_pools = lock(&self.shape_pools);
        if shape_pools.closed {
            return Ok(None);
        }
        let (mut surplus, mut dead) = (Vec::new(), Vec::new());
        let mut due = None;
        let mut next = CHECK;
        for (config, pool) in &mut shape_pools.by_shape {
            dead.extend(pool.warm_nodes.extract_if(.., |warm_node| warm_node.link.is_closed()));
            let wanted = pool.wanted(self.ready, now);
            surplus.extend(pool.warm_nodes.drain(wanted.min(pool.warm_nodes.len())..));
            if pool.warm_nodes.len() == wanted {
                continue;
            }
            match pool.refill.checked_duration_since(now) {
                Some(wait) if !wait.is_zero() => next = next.min(wait),
                _ => due = Some((*config, wanted - pool.warm_nodes.len())),
            }
        }
        surplus.extend(shape_pools.evict(now));
        drop(shape_pools);
        drop(surplus);
        dead.iter().for_each(tell_why);
        if let Some((config, missing)) = due {
            let warm_nodes = self.zygote.spawn(config, false, missing)?;
            let mut shape_pools = lock(&self.shape_pools);
            if let Some(pool) = shape_pools.by_shape.get_mut(&config) {
                pool.warm_nodes.extend(warm_nodes);
            }
            next = Duration::ZERO;
        }
        Ok(Some(next))
    }

    fn wait(&self, limit: Duration) {
        if !limit.is_zero() {
            let shape_pools = lock(&self.shape_pools);
            drop(self.changed.wait_timeout(shape_pools, limit).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl ShapePools {
    /// The one for this shape, unless there are none any more.
    fn pool(&mut self, config: VmShape) -> Option<&mut ShapePool> {
        let now = Instant::now();
        let empty = || ShapePool {
            warm_nodes: Vec::new(),
            users: 0,
            standing_by: Arc::default(),
            asked: now,
            refill: now,
        };
        (!self.closed).then(|| self.by_shape.entry(config).or_insert_with(empty))
    }

    /// Takes away those whose shape nobody has used for long, and, where there are many that nobody uses,
    /// those for which nobody has asked for longest; gives their warm VMs.
    fn evict(&mut self, now: Instant) -> Vec<WarmNode> {
        let mut unused: Vec<(Instant, VmShape)> = self
            .by_shape
            .iter()
            .filter(|(_, pool)| pool.users == 0)
            .map(|(config, pool)| (pool.asked, *config))
            .collect();
        unused.sort_unstable_by_key(|(asked, _)| Reverse(*asked));
        let is_old = |(number, (asked, _)): &(usize, &(Instant, VmShape))| {
            *number >= MAX_UNUSED || now.duration_since(*asked) >= UNUSED
        };
        let old = unused.iter().enumerate().filter(is_old);
        old.filter_map(|(_, (_, config))| self.by_shape.remove(config))
            .flat_map(|pool| pool.warm_nodes)
            .collect()
    }
}

impl ShapePool {
    /// How many warm VMs it should have.
    fn wanted(&self, ready: usize, now: Instant) -> usize {
        if now.duration_since(self.asked) >= IDLE { ready.min(1) } else { ready }
    }
}

fn fill(platform: &Weak<Platform>) {
    while let Some(platform) = platform.upgrade() {
        match platform.pool.rebalance() {
            Ok(None) => return,
            Ok(Some(limit)) => platform.pool.wait(limit),
            Err(error) => {
                tracing::warn!(error = chain(&error), "no warm VMs can be built");
                platform.pool.wait(RETRY_DELAY);
            }
        }
    }
}

/// Logs why a warm VM has ended: it may have said so.
fn tell_why(warm_node: &WarmNode) {
    let why: Reason = loop {
        match warm_node.link.receive() {
            Ok((ToPlatform::Ready, _)) => {}
            Ok((ToPlatform::Failed(why), _)) => break why,
            Ok((other, _)) => break Reason::of(format_args!("it said {other:?}")),
            Err(error) => break Reason::of_error(&error),
        }
    };
    tracing::warn!(pid = warm_node.process.pid(), why = &*why, "a warm VM has ended");
}

/// What is to be seen of a warm VM without waiting.
enum Look {
    Built,
    Unbuilt,
    Dead,
}

fn look_at(warm_node: &WarmNode) -> Look {
    let mut fds = [PollFd::new(warm_node.link.as_fd(), PollFlags::POLLIN)];
    let seen =
        poll(&mut fds, PollTimeout::ZERO).ok().and_then(|_| fds[0].revents()).unwrap_or(PollFlags::empty());
    if seen.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
        Look::Dead
    } else if seen.contains(PollFlags::POLLIN) {
        // It has said that it stands ready.
        Look::Built
    } else {
        Look::Unbuilt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_nobody_uses_have_shells_for_a_while_if_they_are_few() {
        let mut shape_pools = ShapePools::default();
        let shape = |number: u64| VmShape { vcpus: 1, ram_bytes: number << 20 };
        for number in 1..=6 {
            shape_pools.pool(shape(number)).unwrap().users = usize::from(number == 1);
        }
        let left = |shape_pools: &ShapePools| {
            shape_pools.by_shape.keys().map(|config| config.ram_bytes >> 20).collect::<Vec<_>>()
        };
        let now = Instant::now();
        assert!(shape_pools.evict(now).is_empty());
        assert_eq!(
            left(&shape_pools),
            [1, 3, 4, 5, 6],
            "the first one has a user, and the second one is the oldest that has none"
        );
        assert_eq!(shape_pools.by_shape[&shape(4)].wanted(3, now), 3);
        assert_eq!(shape_pools.by_shape[&shape(4)].wanted(3, now + IDLE), 1);
        shape_pools.pool(shape(5)).unwrap().asked = now + UNUSED;
        shape_pools.evict(now + UNUSED);
        assert_eq!(left(&shape_pools), [1, 5]);
        shape_pools.closed = true;
        assert!(shape_pools.pool(shape(7)).is_none());
    }
}
