//! Output that never makes its writers wait: a bounded buffer, and a thread that empties it.
//!
//! A terminal that stands still, a pipe that nobody reads, a full disk: each costs what was to be written
//! there, and delays neither a VM, nor a fork, nor the platform's end. What does not fit into the buffer is
//! left out and counted, and a note in its place tells how much that was. Where writes fail, the buffer is
//! kept and they are tried again.
//!
//! The writers of libraries do not do: tracing-appender 0.2 bounds lines and not bytes, and its end writes to
//! standard error, which may be what stands still.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fmt,
    fs::File,
    io::{self, Write},
    mem,
    os::fd::AsFd,
    panic,
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{SigSet, SigmaskHow},
};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::{outage::Outage, sync::lock, threads};

/// After what time a write that has failed is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Bytes that wait for a terminal or a log to take them: some ten thousand lines.
pub const SHOWN_BYTES: usize = 1 << 20;

/// How long the end of a program waits for its last messages to be taken: long enough for a busy machine.
const LAST_MESSAGES: Duration = Duration::from_secs(2);

/// What is left out where a buffer is full.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    /// Any number of bytes.
    Bytes,
    /// What is written at once: a line, or an entry.
    Messages,
}

/// How an output is called, how much of it waits, and how gaps in it are told.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Name for reports, such as `standard output`.
    pub name: &'static str,
    /// Most bytes that wait to be written.
    pub capacity: usize,
    /// What is counted where something is left out.
    pub unit: Unit,
    /// Makes the note that so many units are left out at this place.
    pub note: fn(u64) -> Vec<u8>,
    /// How the file is written to.
    pub way: Way,
}

/// How a file is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By whoever has something to write, while the file takes it at once, and else by a background thread:
    /// what was written is not lost with this process. The file must have been opened by this process, since
    /// it is made not to wait (O_NONBLOCK).
    Direct,
    /// By a [background](threads::step_back) thread, which takes no processor from a vCPU.
    Background,
    /// By an ordinary thread: messages that nobody may miss on a busy machine.
    Ordinary,
}

/// A way to a file that may take nothing. When it is dropped, what waits is still written, in the background.
#[derive(Debug)]
pub struct Output(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    kind: Kind,
    file: File,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What the thread has not taken yet.
    waiting: Vec<u8>,
    /// How much of what it has taken is not written.
    taken: usize,
    /// What was left out since the last note, in units.
    lost: u64,
    is_failing: bool,
    is_closed: bool,
}

impl State {
    fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.taken == 0 && self.lost == 0
    }
}

impl Output {
    /// A way to a file, with a thread of its own, which takes no signals.
    ///
    /// # Errors
    /// Where there is no thread.
    pub fn new(file: File, kind: Kind) -> io::Result<Self> {
        if kind.way == Way::Direct {
            fcntl_setfl(&file, fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        }
        let shared = Arc::new(Shared { kind, file, state: Mutex::default(), changed: Condvar::new() });
        let writer = Arc::clone(&shared);
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let started = thread::Builder::new().name("output".into()).spawn(move || {
            if kind.way != Way::Ordinary {
                threads::step_back();
            }
            writer.write_all();
        });
        before.thread_set_mask()?;
        started.map(|_| Self(shared))
    }

    /// Writes something as a whole, or leaves it out as a whole. Waits for nothing but other writers.
    pub fn push(&self, mut bytes: &[u8]) {
        let Shared { kind, file, state, changed } = &*self.0;
        let mut state = lock(state);
        if kind.way == Way::Direct && state.is_done() {
            // What goes wrong does so again in the thread, and is dealt with there.
            let mut file = file;
            bytes = &bytes[file.write(bytes).unwrap_or(0)..];
            if bytes.is_empty() {
                return;
            }
        }
        let note = if state.lost > 0 { (kind.note)(state.lost) } else { Vec::new() };
        let room = kind.capacity.saturating_sub(state.waiting.len() + state.taken);
        let was_idle = state.waiting.is_empty() && state.lost == 0;
        if note.len() + bytes.len() > room {
            state.lost += match kind.unit {
                Unit::Bytes => bytes.len() as u64,
                Unit::Messages => 1,
            };
        } else {
            state.waiting.extend_from_slice(&note);
            state.waiting.extend_from_slice(bytes);
            state.lost = 0;
        }
        drop(state);
        if was_idle {
            changed.notify_all();
        }
    }

    /// Waits until all is written, but no longer than `limit`, and not where writes fail. Says whether it is.
    pub fn flush(&self, limit: Duration) -> bool {
        let Shared { state, changed, .. } = &*self.0;
        let is_going_on = |state: &mut State| !state.is_done() && !state.is_failing;
        let waited = changed.wait_timeout_while(lock(state), limit, is_going_on);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_done()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        lock(&self.0.state).is_closed = true;
        self.0.changed.notify_all();
    }
}

impl Write for &Output {
    /// As [`Output::push`].
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    /// Writes what comes, until nothing can come any more.
    fn write_all(&self) {
        let (mut file, mut outage) = (&self.file, Outage::default());
        while let Some(batch) = self.next() {
            let mut rest = &batch[..];
            while !rest.is_empty() {
                match file.write(rest) {
                    Ok(count @ 1..) => {
                        rest = &rest[count..];
                        self.wrote(rest.len());
                        if outage.ends(Instant::now()).is_some() {
                            tracing::warn!("{} takes what is written to it again", self.kind.name);
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => await_room(file),
                    failed => {
                        let error = failed.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                        if outage.begins(0, Instant::now()) {
                            tracing::warn!(%error, "{} takes nothing at present; it is tried again", self.kind.name);
                        }
                        if !self.failed() {
                            return;
                        }
                    }
                }
            }
        }
    }

    /// Waits for the next batch; `None` at the end.
    fn next(&self) -> Option<Vec<u8>> {
        let is_idle = |state: &mut State| state.waiting.is_empty() && state.lost == 0 && !state.is_closed;
        let waited = self.changed.wait_while(lock(&self.state), is_idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.waiting.is_empty() && state.lost > 0 {
            state.waiting = (self.kind.note)(mem::take(&mut state.lost));
        }
        let batch = mem::take(&mut state.waiting);
        state.taken = batch.len();
        (!batch.is_empty()).then_some(batch)
    }

    fn wrote(&self, left: usize) {
        let mut state = lock(&self.state);
        (state.taken, state.is_failing) = (left, false);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until a write may be tried again, and says whether somebody still wants that.
    fn failed(&self) -> bool {
        let mut state = lock(&self.state);
        state.is_failing = true;
        self.changed.notify_all();
        let waited = self.changed.wait_timeout_while(state, RETRY, |state| !state.is_closed);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_closed
    }
}

/// Waits until a file that was opened not to wait takes something.
fn await_room(file: &File) {
    let limit = PollTimeout::try_from(RETRY).unwrap_or(PollTimeout::NONE);
    // Whatever comes of it, the next write tells.
    if let Err(errno) = poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLOUT)], limit) {
        tracing::debug!(%errno, "an output can't be waited for");
    }
}

/// Standard error of this process, once it is [set up](take_messages).
static MESSAGES: OnceLock<Output> = OnceLock::new();

/// The note in the place of messages.
fn messages_are_missing(count: u64) -> Vec<u8> {
    format!("host-vmm: {count} messages are left out here, which standard error did not take\n").into_bytes()
}

/// Has all messages, logs and panics of this process go to standard error by a buffer: from here on, nobody
/// waits for who reads that.
///
/// # Errors
/// Where there is no thread for it.
pub fn take_messages() -> io::Result<()> {
    let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let note = messages_are_missing;
    let kind = Kind {
        name: "standard error",
        capacity: SHOWN_BYTES,
        unit: Unit::Messages,
        note,
        way: Way::Ordinary,
    };
    if MESSAGES.set(Output::new(file, kind)?).is_ok() {
        panic::set_hook(Box::new(|panic| {
            let thread = thread::current();
            say(format_args!("the thread {} {panic}", thread.name().unwrap_or("without a name")));
            let backtrace = Backtrace::capture();
            if backtrace.status() == BacktraceStatus::Captured {
                push_message(format!("{backtrace}\n").as_bytes());
            }
        }));
    }
    Ok(())
}

/// Tells the user something, behind the program's name.
pub fn say(text: fmt::Arguments<'_>) {
    push_message(format!("host-vmm: {text}\n").as_bytes());
}

/// Writes whole lines to standard error.
pub fn push_message(lines: &[u8]) {
    match MESSAGES.get() {
        Some(messages) => messages.push(lines),
        // Nobody to tell.
        None => drop(io::stderr().write_all(lines)),
    }
}

/// Waits until the last messages are written, for two seconds at most.
pub fn end_messages() {
    if let Some(messages) = MESSAGES.get() {
        messages.flush(LAST_MESSAGES);
    }
}

/// Where logs are written: one message at a time.
#[derive(Debug, Clone, Copy)]
pub struct Messages;

impl Write for Messages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        push_message(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where nodes and their zygote write logs: their standard error, a pipe to the platform that refuses what it
/// has no room for. That is left out, and counted.
#[derive(Debug, Clone, Copy)]
pub struct NodeMessages;

impl Write for NodeMessages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        static LOST: AtomicU64 = AtomicU64::new(0);
        let lost = LOST.swap(0, Ordering::Relaxed);
        let note = if lost > 0 { messages_are_missing(lost) } else { Vec::new() };
        if io::stderr().write_all(&[&note, bytes].concat()).is_err() {
            LOST.fetch_add(lost + 1, Ordering::Relaxed);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "output_test.rs"]
mod tests;
