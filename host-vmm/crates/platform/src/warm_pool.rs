//! Ready shells: machines that wait to become the children of a fork.
//!
//! There is a shelf for each shape of machine that is in use, or was not long ago: where one clone has come from, another may. A thread keeps
//! so many shells on it as the operator wants, since making one takes milliseconds and giving one away takes microseconds. Shelves on which
//! nobody has asked for long keep one shell.

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
    process::{BATCH, Shell, Zygote},
};

/// How long after a fork its shells are replaced: its children come first.
const REFILL_DELAY: Duration = Duration::from_millis(10);

/// How long a shape's shells are kept while nobody asks for them, but for one.
const IDLE: Duration = Duration::from_secs(60);

/// How long that one is kept where there is no VM of its shape.
const UNUSED: Duration = Duration::from_secs(600);

/// Most shapes without a VM that have shells: other platforms choose them.
const MAX_UNUSED: usize = 4;

/// How often it is looked for shells that have died.
const CHECK: Duration = Duration::from_secs(5);

/// How long the pool waits after shells could not be made.
const RETRY_DELAY: Duration = Duration::from_secs(5);

/// The shells of a platform.
#[derive(Debug)]
pub(crate) struct Pool {
    zygote: Zygote,
    /// How many shells of each shape to keep ready.
    ready: usize,
    shelves: Mutex<Shelves>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Shelves {
    by_shape: BTreeMap<VmShape, Shelf>,
    closed: bool,
}

#[derive(Debug)]
struct Shelf {
    shells: Vec<Shell>,
    /// How many VMs of this shape there are.
    users: usize,
    /// Each shell that stands by for a VM has a copy of it.
    standing_by: Arc<()>,
    /// When somebody last asked for shells.
    asked: Instant,
    /// Not to be refilled before.
    refill: Instant,
}

/// A shell that stands by for the next fork of one VM.
#[derive(Debug)]
pub(crate) struct Standby {
    shell: Shell,
    _counted: Arc<()>,
}

impl Standby {
    /// Tells it what that fork will come with, and what its first copy is likely to write to; says whether it could be told.
    pub(crate) fn brief(&self, files: &[File], working_set: Option<WorkingSet>) -> bool {
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.shell.link.try_send(&ToNode::StandBy { working_set }, &files).is_ok()
    }

    /// The shell, unless it has died meanwhile.
    pub(crate) fn into_shell(self) -> Option<Shell> {
        Some(self.shell).filter(|shell| !shell.link.is_closed())
    }
}

impl Pool {
    /// An empty pool that is to keep `ready` shells of each shape, with this CPU profile, whose VMs may stand
    /// still for so long for a fork.
    pub(crate) fn new(ready: usize, cpu_profile: String, max_pause: Duration) -> Self {
        let zygote = Zygote::new(cpu_profile, max_pause);
        Self { zygote, ready, shelves: Mutex::default(), changed: Condvar::new() }
    }

    /// Starts the thread that fills it.
    pub(crate) fn fill_in_background(platform: &Arc<Platform>) -> Result<(), Error> {
        let platform = Arc::downgrade(platform);
        threads::background("pool", move || fill(&platform)).map_err(Error::Start)?;
        Ok(())
    }

    /// Takes up to `count` shells, and at least one: ready ones where there are any, else new ones, which are being built then. It takes a
    /// while to start many; who needs them gives the first ones their orders meanwhile.
    pub(crate) fn take(&self, config: VmShape, count: usize) -> Result<Vec<Shell>, Error> {
        let ready = self.take_ready(config, count);
        if ready.is_empty() { self.zygote.spawn(config, false, count.min(BATCH)) } else { Ok(ready) }
    }

    /// As [`Pool::take`], but new ones, whose vCPUs can still become others than this host's.
    pub(crate) fn take_cold(&self, config: VmShape, count: usize) -> Result<Vec<Shell>, Error> {
        self.zygote.spawn(config, true, count.min(BATCH))
    }

    /// Whether shells may stand by for single VMs.
    pub(crate) fn has_standbys(&self) -> bool {
        self.ready > 0
    }

    /// Takes a ready shell that is to stand by for one VM, where there is one to spare: there may be as many of them as shells that stand
    /// ready for everybody.
    pub(crate) fn take_standby(&self, config: VmShape) -> Option<Standby> {
        let mut shelves = lock(&self.shelves);
        let shelf = shelves.by_shape.get_mut(&config)?;
        // One of them is the shelf's own.
        if Arc::strong_count(&shelf.standing_by) > self.ready {
            return None;
        }
        let built = shelf.shells.iter().position(|shell| matches!(look_at(shell), Look::Built))?;
        let shell = shelf.shells.remove(built);
        Some(Standby { shell, _counted: Arc::clone(&shelf.standing_by) })
    }

    fn take_ready(&self, config: VmShape, count: usize) -> Vec<Shell> {
        let mut shelves = lock(&self.shelves);
        let Some(shelf) = shelves.by_shape.get_mut(&config) else { return Vec::new() };
        shelf.asked = Instant::now();
        shelf.refill = shelf.asked + REFILL_DELAY;
        let (mut taken, mut unbuilt, mut dead) = (Vec::with_capacity(count), Vec::new(), Vec::new());
        while taken.len() < count
            && let Some(shell) = shelf.shells.pop()
        {
            match look_at(&shell) {
                Look::Built => taken.push(shell),
                Look::Unbuilt => unbuilt.push(shell),
                Look::Dead => dead.push(shell),
            }
        }
        // Those that are built come first.
        taken.extend(unbuilt.drain(..unbuilt.len().min(count - taken.len())));
        shelf.shells.append(&mut unbuilt);
        drop(shelves);
        dead.iter().for_each(tell_why);
        taken
    }

    /// Says that there is one more VM of this shape. [`Pool::refill`] is to be called once that has what it needs.
    pub(crate) fn add_user(&self, config: VmShape) {
        if let Some(shelf) = lock(&self.shelves).shelf(config) {
            shelf.users += 1;
        }
    }

    /// Says that VMs of this shape are about to come: shells for them are made meanwhile.
    pub(crate) fn expect(&self, config: VmShape) {
        if let Some(shelf) = lock(&self.shelves).shelf(config) {
            shelf.asked = Instant::now();
        }
        self.refill();
    }

    /// How many shells there are of each shape.
    pub(crate) fn ready_shells(&self) -> Vec<(VmShape, usize)> {
        lock(&self.shelves).by_shape.iter().map(|(config, shelf)| (*config, shelf.shells.len())).collect()
    }

    /// Wakes up the thread that fills the shelves.
    pub(crate) fn refill(&self) {
        self.changed.notify_all();
    }

    /// Says that there is one VM of this shape less.
    pub(crate) fn remove_user(&self, config: VmShape) {
        let mut shelves = lock(&self.shelves);
        if let Some(shelf) = shelves.by_shape.get_mut(&config) {
            shelf.users -= 1;
        }
        self.changed.notify_all();
    }

    /// Ends all shells, and keeps none from now on.
    pub(crate) fn close(&self) {
        let mut shelves = lock(&self.shelves);
        shelves.closed = true;
        shelves.by_shape.clear();
        self.changed.notify_all();
    }

    /// Brings every shelf to where it should be, and says how long that will do.
    fn tend(&self) -> Result<Option<Duration>, Error> {
        let now = Instant::now();
        let mut shelves = lock(&self.shelves);
        if shelves.closed {
            return Ok(None);
        }
        let (mut surplus, mut dead) = (Vec::new(), Vec::new());
        let mut due = None;
        let mut next = CHECK;
        for (config, shelf) in &mut shelves.by_shape {
            dead.extend(shelf.shells.extract_if(.., |shell| shell.link.is_closed()));
            let wanted = shelf.wanted(self.ready, now);
            surplus.extend(shelf.shells.drain(wanted.min(shelf.shells.len())..));
            if shelf.shells.len() == wanted {
                continue;
            }
            match shelf.refill.checked_duration_since(now) {
                Some(wait) if !wait.is_zero() => next = next.min(wait),
                _ => due = Some((*config, wanted - shelf.shells.len())),
            }
        }
        surplus.extend(shelves.let_go(now));
        drop(shelves);
        drop(surplus);
        dead.iter().for_each(tell_why);
        if let Some((config, missing)) = due {
            let shells = self.zygote.spawn(config, false, missing)?;
            let mut shelves = lock(&self.shelves);
            if let Some(shelf) = shelves.by_shape.get_mut(&config) {
                shelf.shells.extend(shells);
            }
            next = Duration::ZERO;
        }
        Ok(Some(next))
    }

    fn wait(&self, limit: Duration) {
        if !limit.is_zero() {
            let shelves = lock(&self.shelves);
            drop(self.changed.wait_timeout(shelves, limit).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Shelves {
    /// The one for this shape, unless there are none any more.
    fn shelf(&mut self, config: VmShape) -> Option<&mut Shelf> {
        let now = Instant::now();
        let empty = || Shelf { shells: Vec::new(), users: 0, standing_by: Arc::default(), asked: now, refill: now };
        (!self.closed).then(|| self.by_shape.entry(config).or_insert_with(empty))
    }

    /// Takes away those whose shape nobody has used for long, and, where there are many that nobody uses, those for which nobody has asked
    /// for longest; gives their shells.
    fn let_go(&mut self, now: Instant) -> Vec<Shell> {
        let mut unused: Vec<(Instant, VmShape)> = self
            .by_shape
            .iter()
            .filter(|(_, shelf)| shelf.users == 0)
            .map(|(config, shelf)| (shelf.asked, *config))
            .collect();
        unused.sort_unstable_by_key(|(asked, _)| Reverse(*asked));
        let is_old = |(number, (asked, _)): &(usize, &(Instant, VmShape))| {
            *number >= MAX_UNUSED || now.duration_since(*asked) >= UNUSED
        };
        let old = unused.iter().enumerate().filter(is_old);
        old.filter_map(|(_, (_, config))| self.by_shape.remove(config)).flat_map(|shelf| shelf.shells).collect()
    }
}

impl Shelf {
    /// How many shells it should have.
    fn wanted(&self, ready: usize, now: Instant) -> usize {
        if now.duration_since(self.asked) >= IDLE { ready.min(1) } else { ready }
    }
}

fn fill(platform: &Weak<Platform>) {
    while let Some(platform) = platform.upgrade() {
        match platform.pool.tend() {
            Ok(None) => return,
            Ok(Some(limit)) => platform.pool.wait(limit),
            Err(error) => {
                tracing::warn!(error = chain(&error), "no shells can be made ready");
                platform.pool.wait(RETRY_DELAY);
            }
        }
    }
}

/// Logs why a shell has ended: it may have said so.
fn tell_why(shell: &Shell) {
    let why: Reason = loop {
        match shell.link.receive() {
            Ok((ToPlatform::Ready, _)) => {}
            Ok((ToPlatform::Failed(why), _)) => break why,
            Ok((other, _)) => break Reason::of(format_args!("it said {other:?}")),
            Err(error) => break Reason::of_error(&error),
        }
    };
    tracing::warn!(pid = shell.process.pid(), why = &*why, "a ready shell has ended");
}

/// What is to be seen of a shell without waiting.
enum Look {
    Built,
    Unbuilt,
    Dead,
}

fn look_at(shell: &Shell) -> Look {
    let mut fds = [PollFd::new(shell.link.as_fd(), PollFlags::POLLIN)];
    let seen = poll(&mut fds, PollTimeout::ZERO).ok().and_then(|_| fds[0].revents()).unwrap_or(PollFlags::empty());
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
        let mut shelves = Shelves::default();
        let shape = |number: u64| VmShape { vcpus: 1, ram_bytes: number << 20 };
        for number in 1..=6 {
            shelves.shelf(shape(number)).unwrap().users = usize::from(number == 1);
        }
        let left = |shelves: &Shelves| shelves.by_shape.keys().map(|config| config.ram_bytes >> 20).collect::<Vec<_>>();
        let now = Instant::now();
        assert!(shelves.let_go(now).is_empty());
        assert_eq!(
            left(&shelves),
            [1, 3, 4, 5, 6],
            "the first one has a user, and the second one is the oldest that has none"
        );
        assert_eq!(shelves.by_shape[&shape(4)].wanted(3, now), 3);
        assert_eq!(shelves.by_shape[&shape(4)].wanted(3, now + IDLE), 1);
        shelves.shelf(shape(5)).unwrap().asked = now + UNUSED;
        shelves.let_go(now + UNUSED);
        assert_eq!(left(&shelves), [1, 5]);
        shelves.closed = true;
        assert!(shelves.shelf(shape(7)).is_none());
    }
}
