//! Where a parent and its children meet: a piece of memory that they share until each of them runs.
//!
//! ```text
//!  parent                                     each child
//!  (the platform lists where copies go)       waits, ready, for the state
//!  publish: state, length, phase = Published  ──►
//!                                             restores itself
//!                                        ◄──  arrive: one more arrival
//!  all have arrived, and the platform holds nothing
//!  commit: seals, phase = Decided             ──►  runs
//! ```
//!
//! Words that all sides watch (futexes) take a microsecond or two where a message through a socket takes
//! fifty: nobody else has to wake up. The platform has it too: it can abort a fork whose parent has died, and
//! tell a parent of a child that has.
//!
//! The outcome of the fork is the file's seals ([`memory::decide`]): the first to decide, by a commit or by
//! calling it off, decides for all, and the kernel lets nobody change that. The phase only says when to look.
//! A copy that runs can still write the words and the state, and nobody reads them any more: each child has
//! arrived, and so has copied the state out; the parent has copied out where its copies went; and where the
//! platform keeps the image, it holds the fork until it has its own copy of the state ([`Rendezvous::hold`]).
//!
//! Before the commit, children run no guest code. A parent that its guest has taken over may write anything
//! at any time: it can commit before its children are ready, or give each of them another state. That harms
//! nobody but its copies, all of whose state is its own. Each side copies the state out once before it looks
//! at it.

use std::{
    fs::File,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use base::threads;
use rustix::{
    io::Errno,
    thread::futex::{self, Timespec},
};
use vmm::memory::{self, Mapping};

use vmfork_abi::{ListedCopy, MAX_CHILDREN};

/// Offsets of the words.
const PHASE: usize = 0;
const ARRIVALS: usize = 64;
const HELD: usize = 80;
const LENGTH: usize = 128;
const PARENT_CPU: usize = 192;

/// Offset of the copies, one after the other. Those of most forks lie in the page of the words, which all
/// sides have anyway.
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
const DECIDED: u32 = 2;

/// Set in the arrivals where one child will not come.
const FAILED: u32 = 1 << 31;

/// How a side looks at a word by itself before it sleeps until it is woken, where a processor is free for
/// that: waking up costs 50 us.
#[derive(Debug, Clone, Copy)]
struct Spin {
    /// For how long: most waits are shorter.
    limit: Duration,
    /// Whether others that wait for this processor may have it meanwhile. If they are not those that this
    /// side waits for, they may keep it for milliseconds.
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
        Self::map(memory::fillable("vm-rendezvous", BYTES as u64)?)
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
    /// [`Error::Memory`] where the file could be shrunk, which would kill whoever has it mapped, or has
    /// another size.
    pub fn open(file: File) -> Result<Self, Error> {
        memory::check_unresizable(&file, BYTES as u64)?;
        Self::map(file)
    }

    fn map(file: File) -> Result<Self, Error> {
        let mapping = Mapping::reserve(BYTES)?;
        mapping.map_shared(&file)?;
        Ok(Self { mapping, file, spins: false })
    }

    /// Says that `count` children meet here. Where there is a processor for each side, they look at words for
    /// a while before they sleep.
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

    /// Says on which processor the parent runs: whoever finds himself there too sleeps, instead of taking it
    /// from the parent. When he is woken, Linux finds him another one, if there is one; it does not move a
    /// thread that runs.
    ///
    /// # Errors
    /// As [`Rendezvous::arrive`].
    pub fn occupy(&self) -> Result<(), Error> {
        self.word(PARENT_CPU)?.store(threads::current_processor(), Ordering::Relaxed);
        Ok(())
    }

    /// The processor on which the parent runs, as far as it has told, where each side is to have one for
    /// itself.
    pub fn parents_processor(&self) -> Option<u32> {
        let processor = self.word(PARENT_CPU).ok().filter(|_| self.spins)?;
        Some(processor.load(Ordering::Relaxed))
    }

    /// Writes down where a copy is launched, in place of what was said of it before. Its arrival tells that
    /// this is there.
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
        let published =
            self.word(PHASE)?.compare_exchange(OPEN, PUBLISHED, Ordering::AcqRel, Ordering::Acquire);
        self.wake(PHASE)?;
        if published.is_ok() { Ok(()) } else { Err(Error::Aborted) }
    }

    /// Waits for the state.
    ///
    /// # Errors
    /// [`Error::Aborted`], or [`Error::Gone`] once `is_alone` says so.
    pub fn wait_state(&self, is_alone: impl Fn() -> bool) -> Result<Vec<u8>, Error> {
        match self.wait(PHASE, |phase| phase != OPEN, FOR_STATE, None, is_alone)? {
            PUBLISHED => {}
            _ if memory::decided(&self.file)? == Some(true) => {}
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

    /// Keeps the fork from its commit until the hold is dropped. To be called before a child can arrive.
    ///
    /// # Errors
    /// As [`Rendezvous::arrive`].
    pub fn hold(&self) -> Result<Hold<'_>, Error> {
        self.word(HELD)?.store(1, Ordering::Release);
        Ok(Hold(self))
    }

    fn release(&self) -> Result<(), Error> {
        self.word(HELD)?.store(0, Ordering::Release);
        self.wake(HELD)
    }

    /// Waits until `count` children are ready to run, and nobody [holds](Self::hold) the fork.
    ///
    /// # Errors
    /// [`Error::ChildFailed`], or [`Error::Gone`] after `limit`, or once `is_alone` says so.
    pub fn wait_arrivals(
        &self,
        count: u32,
        limit: Duration,
        is_alone: impl Fn() -> bool,
    ) -> Result<(), Error> {
        let started = Instant::now();
        let there = |arrivals| arrivals & FAILED != 0 || arrivals >= count;
        let mut arrivals = self.wait(ARRIVALS, there, FOR_ARRIVALS, Some(limit), &is_alone)?;
        if arrivals & FAILED == 0 {
            let left = limit.saturating_sub(started.elapsed());
            self.wait(HELD, |held| held == 0, FOR_ARRIVALS, Some(left), is_alone)?;
            arrivals = self.word(ARRIVALS)?.load(Ordering::Acquire);
        }
        if arrivals & FAILED == 0 { Ok(()) } else { Err(Error::ChildFailed) }
    }

    /// Lets the children run. From here on there is no way back.
    ///
    /// # Errors
    /// [`Error::Aborted`] where the fork was called off meanwhile.
    pub fn commit(&self) -> Result<(), Error> {
        if self.decide(true)? { Ok(()) } else { Err(Error::Aborted) }
    }

    /// Calls the fork off, and says whether it is: `false` where the children run already.
    ///
    /// # Errors
    /// As [`Rendezvous::arrive`].
    pub fn abort(&self) -> Result<bool, Error> {
        Ok(!self.decide(false)?)
    }

    /// Whether the fork was called off.
    pub fn is_aborted(&self) -> bool {
        matches!(memory::decided(&self.file), Ok(Some(false)))
    }

    /// True once the parent has committed the fork.
    pub fn is_committed(&self) -> bool {
        matches!(memory::decided(&self.file), Ok(Some(true)))
    }

    /// Waits until the children may run.
    ///
    /// # Errors
    /// [`Error::Aborted`], or [`Error::Gone`] once `is_alone` says so.
    pub fn wait_commit(&self, mut is_alone: impl FnMut() -> bool) -> Result<(), Error> {
        let word = self.word(PHASE)?;
        self.spin(word, |phase| phase != PUBLISHED, FOR_COMMIT)?;
        loop {
            // In this order: whoever decides after this look changes the word, and nobody sleeps then.
            let phase = word.load(Ordering::Acquire);
            match memory::decided(&self.file)? {
                Some(true) => return Ok(()),
                Some(false) => return Err(Error::Aborted),
                None if is_alone() => return Err(Error::Gone),
                None => sleep(word, phase)?,
            }
        }
    }

    /// Decides, unless it is decided, and says whether it is that the children run.
    fn decide(&self, is_commit: bool) -> Result<bool, Error> {
        let is_committed = memory::decide(&self.file, is_commit)?;
        self.word(PHASE)?.store(DECIDED, Ordering::Release);
        self.wake(PHASE)?;
        Ok(is_committed)
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
        if let Some(value) = self.spin(word, &is_right, spin)? {
            return Ok(value);
        }
        loop {
            let value = word.load(Ordering::Acquire);
            if is_right(value) {
                return Ok(value);
            }
            if is_alone() || limit.is_some_and(|limit| started.elapsed() >= limit) {
                return Err(Error::Gone);
            }
            sleep(word, value)?;
        }
    }

    /// Looks at a word for a while, where there is a processor for that; gives its value once that is right.
    fn spin(
        &self,
        word: &AtomicU32,
        is_right: impl Fn(u32) -> bool,
        spin: Spin,
    ) -> Result<Option<u32>, Error> {
        let started = Instant::now();
        let parent_cpu = self.word(PARENT_CPU)?;
        let is_parents =
            || spin.beside_parent && parent_cpu.load(Ordering::Relaxed) == threads::current_processor();
        while self.spins && started.elapsed() < spin.limit && !is_parents() {
            let value = word.load(Ordering::Acquire);
            if is_right(value) {
                return Ok(Some(value));
            }
            if spin.yields { thread::yield_now() } else { std::hint::spin_loop() }
        }
        Ok(None)
    }
}

/// What keeps a fork from its commit until it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Hold<'a>(&'a Rendezvous);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.release() {
            // The parent waits until it is tired of it.
            tracing::error!(%error, "a fork can't be let go of");
        }
    }
}

/// Sleeps while a word has this value, until it is woken, or it is time to look around.
fn sleep(word: &AtomicU32, value: u32) -> Result<(), Error> {
    let nap = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK_AROUND.subsec_nanos()) };
    // Others change it in other processes: the flags don't say "private".
    match futex::wait(word, futex::Flags::empty(), value, Some(&nap)) {
        Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => Ok(()),
        Err(errno) => Err(Error::Wait(errno)),
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
#[path = "rendezvous_test.rs"]
mod tests;
