//! The consoles of all VMs: one thread reads them, logs each into a file of its own, and shows them all.
//!
//! The booted VM's output is shown as it comes. A copy's is shown line by line, with its name before it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::{fd::AsFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::{
    Error, Event, Events,
    logs::{Log, Logs},
};
use crate::{
    machine::VmIdentity,
    sync::lock,
    wire::{PlatformLink, ToNode, link},
};

/// Longest line that is held back until it is complete, in bytes; what is longer is shown in pieces.
const MAX_LINE_BYTES: usize = 4096;

/// Longest log of one VM in bytes: a guest that prints for ever must not fill the disk.
const MAX_LOG_BYTES: u64 = 256 << 20;

/// How long the end waits for output that is still in the pipes.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// All consoles.
#[derive(Debug)]
pub(super) struct Consoles {
    log_dir: PathBuf,
    logs: Logs,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    events: Arc<Events>,
    sources: Mutex<Sources>,
    drained: Condvar,
}

#[derive(Debug, Default)]
struct Sources {
    open: HashMap<u64, Arc<Mutex<Source>>>,
    next: u64,
}

/// One VM's console.
#[derive(Debug)]
struct Source {
    pipe: File,
    log: Arc<Log>,
    /// Its file, made when there is something to log.
    file: Option<File>,
    /// How many bytes the log may still take.
    log_room: u64,
    name: String,
    /// Whether its lines are shown with its name.
    prefixed: bool,
    /// A line that is not complete yet.
    line: Vec<u8>,
}

impl Consoles {
    /// Starts the thread.
    pub(super) fn new(log_dir: PathBuf, events: Arc<Events>) -> Result<Self, Error> {
        fs::create_dir_all(&log_dir).map_err(|source| Error::Log { path: log_dir.clone(), source })?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|errno| Error::Consoles(errno.into()))?;
        let sources = Mutex::new(Sources::default());
        let shared = Arc::new(Shared { epoll, events, sources, drained: Condvar::new() });
        let reader = Arc::clone(&shared);
        thread::Builder::new().name("consoles".into()).spawn(move || reader.read_all()).map_err(Error::Consoles)?;
        Ok(Self { log_dir, logs: Logs::default(), shared })
    }

    /// Takes a VM's console.
    pub(super) fn add(&self, vm: &VmIdentity, pipe: File) -> Result<(), Error> {
        let source = Source {
            log: self.logs.add(vm, self.log_dir.join(format!("{}.log", vm.name))),
            file: None,
            log_room: MAX_LOG_BYTES,
            name: vm.name.clone(),
            prefixed: vm.generation > 0,
            line: Vec::new(),
            pipe,
        };
        let mut sources = lock(&self.shared.sources);
        let token = sources.next;
        sources.next += 1;
        let interest = EpollEvent::new(EpollFlags::EPOLLIN, token);
        self.shared.epoll.add(source.pipe.as_fd(), interest).map_err(|errno| Error::Consoles(errno.into()))?;
        sources.open.insert(token, Arc::new(Mutex::new(source)));
        Ok(())
    }

    /// What VMs have written.
    pub(super) fn logs(&self) -> &Logs {
        &self.logs
    }

    /// Waits until all output of VMs that have ended is written.
    pub(super) fn wait_drained(&self) {
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        let mut sources = lock(&self.shared.sources);
        while !sources.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("gave up waiting for the last console output");
                return;
            }
            sources = self.shared.drained.wait_timeout(sources, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    fn read_all(&self) {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "the consoles can't be read any more");
                    return;
                }
            };
            for event in &ready[..count] {
                self.read_one(event.data());
            }
        }
    }

    fn read_one(&self, token: u64) {
        // The sources are let go at once: a terminal that takes nothing must not keep new VMs from being added.
        let Some(source) = lock(&self.sources).open.get(&token).map(Arc::clone) else { return };
        if !lock(&source).read(&self.events) {
            lock(&self.sources).open.remove(&token);
            self.drained.notify_all();
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.log.has_ended();
    }
}

impl Source {
    /// Takes what the VM has written, and returns whether more can come.
    fn read(&mut self, events: &Events) -> bool {
        let mut buffer = [0; 16 * 1024];
        let bytes = match self.pipe.read(&mut buffer) {
            Ok(count) if count > 0 => &buffer[..count],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            // The node is gone, and with it the other end.
            _ => {
                if !self.line.is_empty() {
                    self.end_line(events);
                }
                return false;
            }
        };
        self.log(bytes);
        if !self.prefixed {
            show(bytes);
        }
        self.split(bytes, events);
        true
    }

    /// Writes to the log, for as much as one VM may.
    fn log(&mut self, bytes: &[u8]) {
        let wanted = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if wanted > self.log_room {
            if self.log_room > 0 {
                tracing::warn!(
                    vm = self.name,
                    "the console log is full at {MAX_LOG_BYTES} bytes; nothing more is logged"
                );
                self.log_room = 0;
            }
            return;
        }
        self.log_room -= wanted;
        let file = match &mut self.file {
            Some(file) => Ok(file),
            none => File::create(self.log.path()).map(|file| none.insert(file)),
        };
        // What could be written in part only is written over.
        match file.and_then(|file| file.write_all_at(bytes, self.log.written_bytes())) {
            Ok(()) => self.log.has_grown(wanted),
            Err(error) => {
                tracing::warn!(log = %self.log.path().display(), %error, "console output is missing in the log");
            }
        }
    }

    /// Adds to the line, and passes on those that are complete now.
    fn split(&mut self, bytes: &[u8], events: &Events) {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= MAX_LINE_BYTES {
                self.end_line(events);
            }
        }
    }

    fn end_line(&mut self, events: &Events) {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(&line));
        if self.prefixed {
            show(format!("[{}] {text}\n", self.name).as_bytes());
        }
        events.write(&Event::Console { name: &self.name, line: &text });
    }
}

/// The way to a VM's console.
#[derive(Debug)]
pub struct ConsoleInput(pub(super) Arc<PlatformLink>);

impl ConsoleInput {
    /// Types something.
    ///
    /// # Errors
    /// [`link::Error`] where the VM has ended.
    pub fn send(&self, bytes: &[u8]) -> Result<(), link::Error> {
        self.0.send(&ToNode::Input(bytes.to_vec()), &[])
    }
}

/// Shows output. Where nobody takes it any more, the logs still do.
fn show(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    if let Err(error) = out.write_all(bytes).and_then(|()| out.flush()) {
        tracing::debug!(%error, "console output can't be shown");
    }
}
