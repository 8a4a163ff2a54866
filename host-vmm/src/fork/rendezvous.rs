//! Where a parent and its children meet: a piece of memory that they share until each of them runs.
//!
//! ```text
//!  parent                                     each child
//!  (the platform lists where copies go)       waits, ready, for the state
//!  publish: state, length, phase = Published  ──►
//!                                             restores itself
//!                                        ◄──  arrive: one more arrival
//!  all have arrived
//!  commit: phase = Committed                  ──►  runs
//! ```
//!
//! Words that all sides watch (futexes) take a microsecond or two where a message through a socket takes fifty: nobody else has to
//! wake up. The platform has it too: it can abort a fork whose parent has died, and tell a parent of a child that has. Whoever is
//! first to change the phase from `Published` decides what becomes of the fork.
//!
//! The other sides may write anything at any time. The state is copied out once before it is looked at, and any phase or number
//! does no harm but to those that share it: a parent and what were to be its copies.

use std::{
    fs::File,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    thread::futex::{self, Timespec},
};

use vmfork_abi::{ListedCopy, MAX_CHILDREN};

use crate::{
    capsule,
    memory::{self, Mapping},
    threads,
};

/// Offsets of the words.
const PHASE: usize = 0;
const ARRIVALS: usize = 64;
const LENGTH: usize = 128;
const PARENT_CPU: usize = 192;

/// Offset of the copies, one after the other. Those of most forks lie in the page of the words, which all sides have anyway.
pub(super) const COPIES: usize = 256;

/// Room for the words and the copies.
const WORDS_BYTES: usize = 4096;

/// Offset of the state.
const STATE: usize = (COPIES + MAX_CHILDREN as usize * ListedCopy::BYTES).next_multiple_of(4096);

/// Room for the state. Pages that nobody writes to take no memory.
const BYTES: usize = STATE + capsule::MAX_BYTES;

/// What most states need.
const WARM_BYTES: usize = 28 << 10;

/// Phases.
const OPEN: u32 = 0;
const PUBLISHED: u32 = 1;
const COMMITTED: u32 = 2;
const ABORTED: u32 = 3;

/// Set in the arrivals where one child will not come.
const FAILED: u32 = 1 << 31;

/// How a side looks at a word by itself before it sleeps until it is woken, where a processor is free for that: waking up costs 50 us.
#[derive(Debug, Clone, Copy)]
struct Spin {
    /// For how long: most waits are shorter.
    limit: Duration,
    /// Whether others that wait for this processor may have it meanwhile. If they are not those that this side waits for, they may keep it
    /// for milliseconds.
    yields: bool,
    /// Whether this is for processors only on which the parent does not run.
    beside_parent: bool,
}

/// For the state: platform and parent have work to do before.
const FOR_STATE: Spin = Spin { limit: Duration::from_micros(400), yields: true, beside_parent: true };

/// For the arrivals: children restore themselves.
const FOR_ARRIVALS: Spin = Spin { limit: Duration::from_micros(250), yields: false, beside_parent: false };

/// For the commit: it follows at once.
const FOR_COMMIT: Spin = Spin { limit: Duration::from_micros(60), yields: false, beside_parent: true };

/// How often a side that sleeps looks whether those that could wake it are still there.
const LOOK_AROUND: Duration = Duration::from_millis(500);

/// Why a rendezvous fails.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no memory for it, or it is not what it should be.
    #[error("can't share memory with the other side of a fork")]
    Memory(#[from] memory::Error),
    /// The state is too large.
    #[error("a state of {0} bytes is too large")]
    TooLarge(usize),
    /// A fork has no such copy.
    #[error("a fork has no copy {0}, but 1 to {MAX_CHILDREN}")]
    NoCopy(u32),
    /// It was called off.
    #[error("the fork was called off")]
    Aborted,
    /// A child will not come.
    #[error("a child failed")]
    ChildFailed,
    /// Nothing happened for too long, or nobody is there any more who could make it happen.
    #[error("the other side of a fork is gone")]
    Gone,
    /// Waiting failed.
    #[error("can't wait for the other side of a fork")]
    Wait(#[source] Errno),
}

/// One side's hold on it.
#[derive(Debug)]
pub struct Rendezvous {
    mapping: Mapping,
    file: File,
    /// Whether a processor is free to look at words.
    spins: bool,
}

impl Rendezvous {
    /// A new one.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn new() -> Result<Self, Error> {
        Self::map(memory::unresizable("vm-rendezvous", BYTES as u64)?)
    }

    /// Makes the pages that most states need.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn warm_up(&self) -> Result<(), Error> {
        self.mapping.populate(0, WORDS_BYTES)?;
        Ok(self.mapping.populate(STATE, WARM_BYTES)?)
    }

    /// The one that this file holds.
    ///
    /// # Errors
    /// [`Error::Memory`] where the file could be shrunk, which would kill whoever has it mapped, or has another size.
    pub fn open(file: File) -> Result<Self, Error> {
        memory::check_unresizable(&file, BYTES as u64)?;
        Self::map(file)
    }

    fn map(file: File) -> Result<Self, Error> {
        let mapping = Mapping::reserve(BYTES)?;
        mapping.map_shared(&file)?;
        Ok(Self { mapping, file, spins: false })
    }

    /// Says that `count` children meet here. Where there is a processor for each side, they look at words for a while before they sleep.
    #[must_use]
    pub fn with_children(mut self, count: u32) -> Self {
        self.spins = usize::try_from(count).is_ok_and(|count| count < threads::processors());
        self
    }

    /// Whether there is a processor for each side.
    pub fn spins(&self) -> bool {
        self.spins
    }

    /// The file that the other sides open.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn word(&self, at: usize) -> Result<&AtomicU32, Error> {
        Ok(self.mapping.word(at)?)
    }

    /// Says on which processor the parent runs: whoever finds himself there too sleeps, instead of taking it from the parent. When he is
    /// woken, Linux finds him another one, if there is one; it does not move a thread that runs.
    ///
    /// # Errors
    /// As [`Rendezvous::arrive`].
    pub fn occupy(&self) -> Result<(), Error> {
        self.word(PARENT_CPU)?.store(threads::current_processor(), Ordering::Relaxed);
        Ok(())
    }

    /// The processor on which the parent runs, as far as it has told, where each side is to have one for itself.
    pub fn parents_processor(&self) -> Option<u32> {
        let processor = self.word(PARENT_CPU).ok().filter(|_| self.spins)?;
        Some(processor.load(Ordering::Relaxed))
    }

    /// Writes down where a copy is launched, in place of what was said of it before. Its arrival tells that this is there.
    ///
    /// # Errors
    /// [`Error::NoCopy`].
    pub fn list(&self, copy: &ListedCopy) -> Result<(), Error> {
        Ok(self.mapping.write(copy_offset(copy.index)?, &copy.to_bytes())?)
    }

    /// What is written down of a copy, unchecked. To be called when it has arrived.
    ///
    /// # Errors
    /// [`Error::NoCopy`].
    pub fn listed(&self, index: u32) -> Result<ListedCopy, Error> {
        let mut copy = [0; ListedCopy::BYTES];
        self.mapping.read(copy_offset(index)?, &mut copy)?;
        Ok(ListedCopy::from_bytes(&copy))
    }

    /// Gives the children their state. To be called once.
    ///
    /// # Errors
    /// [`Error::TooLarge`], or [`Error::Aborted`] where the fork was called off meanwhile.
    pub fn publish(&self, state: &[u8]) -> Result<(), Error> {
        if state.len() > capsule::MAX_BYTES {
            return Err(Error::TooLarge(state.len()));
        }
        self.mapping.write(STATE, state)?;
        let length = u32::try_from(state.len()).map_err(|_| Error::TooLarge(state.len()))?;
        self.word(LENGTH)?.store(length, Ordering::Release);
        if self.change_phase(OPEN, PUBLISHED)? { Ok(()) } else { Err(Error::Aborted) }
    }

    /// Waits for the state.
    ///
    /// # Errors
    /// [`Error::Aborted`], or [`Error::Gone`] once `is_alone` says so.
    pub fn wait_state(&self, is_alone: impl Fn() -> bool) -> Result<Vec<u8>, Error> {
        match self.wait(PHASE, |phase| phase != OPEN, FOR_STATE, None, is_alone)? {
            PUBLISHED | COMMITTED => {}
            _ => return Err(Error::Aborted),
        }
        let length = self.word(LENGTH)?.load(Ordering::Acquire);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > capsule::MAX_BYTES {
            return Err(Error::TooLarge(length));
        }
        let mut state = vec![0; length];
        self.mapping.read(STATE, &mut state)?;
        Ok(state)
    }

    /// Says that one more child of `count` is ready to run. The last one wakes the parent.
    ///
    /// # Errors
    /// [`Error::Memory`] never, for as long as the layout is right.
    pub fn arrive(&self, count: u32) -> Result<(), Error> {
        let before = self.word(ARRIVALS)?.fetch_add(1, Ordering::AcqRel);
        if before.wrapping_add(1) >= count { self.wake(ARRIVALS) } else { Ok(()) }
    }

    /// Says that a child will not come.
    ///
    /// # Errors
    /// As [`Rendezvous::arrive`].
    pub fn fail(&self) -> Result<(), Error> {
        self.word(ARRIVALS)?.fetch_or(FAILED, Ordering::AcqRel);
        self.wake(ARRIVALS)
    }

    /// Waits until `count` children are ready to run.
    ///
    /// # Errors
    /// [`Error::ChildFailed`], or [`Error::Gone`] after `limit`, or once `is_alone` says so.
    pub fn wait_arrivals(&self, count: u32, limit: Duration, is_alone: impl Fn() -> bool) -> Result<(), Error> {
        let there = |arrivals| arrivals & FAILED != 0 || arrivals >= count;
        let arrivals = self.wait(ARRIVALS, there, FOR_ARRIVALS, Some(limit), is_alone)?;
        if arrivals & FAILED == 0 { Ok(()) } else { Err(Error::ChildFailed) }
    }

    /// Lets the children run. From here on there is no way back.
    ///
    /// # Errors
    /// [`Error::Aborted`] where the fork was called off meanwhile.
    pub fn commit(&self) -> Result<(), Error> {
        if self.change_phase(PUBLISHED, COMMITTED)? { Ok(()) } else { Err(Error::Aborted) }
    }

    /// Calls the fork off, and says whether it is: `false` where the children run already.
    ///
    /// # Errors
    /// As [`Rendezvous::arrive`].
    pub fn abort(&self) -> Result<bool, Error> {
        if self.change_phase(OPEN, ABORTED)? || self.change_phase(PUBLISHED, ABORTED)? {
            return Ok(true);
        }
        Ok(self.word(PHASE)?.load(Ordering::Acquire) != COMMITTED)
    }

    /// Waits until the children may run.
    ///
    /// # Errors
    /// [`Error::Aborted`], or [`Error::Gone`] once `is_alone` says so.
    pub fn wait_commit(&self, is_alone: impl FnMut() -> bool) -> Result<(), Error> {
        match self.wait(PHASE, |phase| phase != PUBLISHED, FOR_COMMIT, None, is_alone)? {
            COMMITTED => Ok(()),
            _ => Err(Error::Aborted),
        }
    }

    fn change_phase(&self, from: u32, to: u32) -> Result<bool, Error> {
        let changed = self.word(PHASE)?.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok();
        self.wake(PHASE)?;
        Ok(changed)
    }

    fn wake(&self, at: usize) -> Result<(), Error> {
        // Others may sleep on it in other processes: the flags don't say "private".
        futex::wake(self.word(at)?, futex::Flags::empty(), u32::MAX >> 1).map_err(Error::Wait)?;
        Ok(())
    }

    /// Waits until a word is as it should be, and gives what it is then.
    fn wait(
        &self,
        at: usize,
        is_right: impl Fn(u32) -> bool,
        spin: Spin,
        limit: Option<Duration>,
        mut is_alone: impl FnMut() -> bool,
    ) -> Result<u32, Error> {
        let word = self.word(at)?;
        let started = Instant::now();
        let parent_cpu = self.word(PARENT_CPU)?;
        let is_parents = || spin.beside_parent && parent_cpu.load(Ordering::Relaxed) == threads::current_processor();
        while self.spins && started.elapsed() < spin.limit && !is_parents() {
            let value = word.load(Ordering::Acquire);
            if is_right(value) {
                return Ok(value);
            }
            if spin.yields { thread::yield_now() } else { std::hint::spin_loop() }
        }
        loop {
            let value = word.load(Ordering::Acquire);
            if is_right(value) {
                return Ok(value);
            }
            if is_alone() || limit.is_some_and(|limit| started.elapsed() >= limit) {
                return Err(Error::Gone);
            }
            let nap = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK_AROUND.subsec_nanos()) };
            match futex::wait(word, futex::Flags::empty(), value, Some(&nap)) {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
                Err(errno) => return Err(Error::Wait(errno)),
            }
        }
    }
}

/// Offset of what is written down of a copy.
fn copy_offset(index: u32) -> Result<usize, Error> {
    match index {
        1..=MAX_CHILDREN => Ok(COPIES + (index - 1) as usize * ListedCopy::BYTES),
        _ => Err(Error::NoCopy(index)),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair(count: u32) -> (Rendezvous, Rendezvous) {
        let parent = Rendezvous::new().unwrap().with_children(count);
        let child = Rendezvous::open(parent.file().try_clone().unwrap()).unwrap().with_children(count);
        (parent, child)
    }

    #[test]
    fn a_child_gets_the_state_and_runs_when_all_are_there() {
        for count in [1, 3] {
            let (parent, _) = pair(count);
            thread::scope(|scope| {
                for _ in 0..count {
                    let child = Rendezvous::open(parent.file().try_clone().unwrap()).unwrap().with_children(count);
                    scope.spawn(move || {
                        assert_eq!(child.wait_state(|| false).unwrap(), b"state");
                        child.arrive(count).unwrap();
                        child.wait_commit(|| false).unwrap();
                    });
                }
                parent.publish(b"state").unwrap();
                parent.wait_arrivals(count, PATIENCE, || false).unwrap();
                parent.commit().unwrap();
            });
            assert!(!parent.abort().unwrap(), "the children run");
        }
    }

    #[test]
    fn copies_are_where_they_were_listed_last() {
        let (parent, platform) = pair(1);
        parent.publish(b"state").unwrap();
        let copy = |index, location| ListedCopy { vm_id: [7; 16], index, location, ..Default::default() };
        for (index, location) in [(1, 1), (2, 2), (1, 2), (MAX_CHILDREN, 1)] {
            platform.list(&copy(index, location)).unwrap();
        }
        for (index, location) in [(1, 2), (2, 2), (MAX_CHILDREN, 1)] {
            assert_eq!(parent.listed(index).unwrap(), copy(index, location));
        }
        assert_eq!(parent.listed(3).unwrap(), ListedCopy::default());
        for index in [0, MAX_CHILDREN + 1, u32::MAX] {
            assert!(matches!(platform.list(&copy(index, 1)), Err(Error::NoCopy(bad)) if bad == index));
            assert!(matches!(parent.listed(index), Err(Error::NoCopy(bad)) if bad == index));
        }
        assert_eq!(platform.wait_state(|| true).unwrap(), b"state");
    }

    #[test]
    fn what_was_called_off_does_not_run() {
        let (parent, child) = pair(1);
        assert!(child.abort().unwrap());
        assert!(matches!(parent.publish(b""), Err(Error::Aborted)));
        assert!(matches!(child.wait_state(|| false), Err(Error::Aborted)));
        let (parent, child) = pair(1);
        parent.publish(b"").unwrap();
        assert!(parent.abort().unwrap());
        assert!(matches!(child.wait_commit(|| false), Err(Error::Aborted)));
        assert!(matches!(parent.commit(), Err(Error::Aborted)));
    }

    #[test]
    fn nobody_waits_for_those_that_do_not_come() {
        let (parent, child) = pair(2);
        child.arrive(2).unwrap();
        assert!(matches!(parent.wait_arrivals(2, Duration::from_millis(1), || false), Err(Error::Gone)));
        assert!(matches!(child.wait_state(|| true), Err(Error::Gone)));
        child.fail().unwrap();
        assert!(matches!(parent.wait_arrivals(2, PATIENCE, || false), Err(Error::ChildFailed)));
    }

    #[test]
    fn forged_words_do_no_harm() {
        let (parent, child) = pair(1);
        parent.publish(b"").unwrap();
        parent.word(LENGTH).unwrap().store(u32::MAX, Ordering::Release);
        assert!(matches!(child.wait_state(|| false), Err(Error::TooLarge(_))));
        parent.word(PHASE).unwrap().store(77, Ordering::Release);
        assert!(matches!(child.wait_state(|| false), Err(Error::Aborted)));
        assert!(matches!(child.wait_commit(|| false), Err(Error::Aborted)));
    }

    #[test]
    fn only_what_can_not_shrink_is_opened() {
        let file = memory::unsealed("test", BYTES as u64).unwrap();
        assert!(Rendezvous::open(file).is_err());
        let file = memory::unresizable("test", 4096).unwrap();
        assert!(Rendezvous::open(file).is_err());
    }
}
