//! The consoles of all VMs: one thread reads them, logs each into a file of its own, and shows them all.
//!
//! The booted VM's output is shown as it comes. A copy's is shown line by line, with its name before it. Who
//! reads what is shown may stand still, and the disk for the logs may be full: VMs go on, what is lost is
//! counted, and that is told.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::{fd::AsFd, unix::fs::FileExt},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use base::{
    outage::Outage,
    output::{Kind, Output, SHOWN_BYTES, Unit, Way},
    sync::lock,
};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use node::wire::{PlatformLink, ToNode, link};
use types::VmIdentity;

use super::{
    Error, Event, Events,
    logs::{Log, Logs},
};

/// Longest line that is held back until it is complete, in bytes; what is longer is shown in pieces.
const MAX_LINE_BYTES: usize = 4096;

/// Longest log of one VM in bytes: a guest that prints for ever must not fill the disk.
const MAX_LOG_BYTES: u64 = 256 << 20;

/// How long input waits for a node to take it.
const INPUT_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// Standard output.
    shown: Output,
    /// What logs lack that could not be written, in bytes; they are all in one folder.
    outage: Mutex<Outage>,
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
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(|errno| Error::Consoles(errno.into()))?;
        let shown = io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let kind = Kind {
            name: "standard output",
            capacity: SHOWN_BYTES,
            unit: Unit::Bytes,
            note: are_left_out,
            way: Way::Background,
        };
        let shown = shown.and_then(|file| Output::new(file, kind)).map_err(Error::Consoles)?;
        let (sources, outage) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { epoll, events, shown, outage, sources, drained: Condvar::new() });
        let reader = Arc::clone(&shared);
        thread::Builder::new()
            .name("consoles".into())
            .spawn(move || reader.read_all())
            .map_err(Error::Consoles)?;
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
        self.shared
            .epoll
            .add(source.pipe.as_fd(), interest)
            .map_err(|errno| Error::Consoles(errno.into()))?;
        sources.open.insert(token, Arc::new(Mutex::new(source)));
        Ok(())
    }

    /// What VMs have written.
    pub(super) fn logs(&self) -> &Logs {
        &self.logs
    }

    /// Waits until what is shown is written, for so long at most, and tells what the logs lack.
    pub(super) fn flush(&self, limit: Duration) {
        self.shared.shown.flush(limit);
        if let Some(bytes) = lock(&self.shared.outage).rest() {
            tracing::warn!(log_dir = %self.log_dir.display(), "{bytes} bytes of console output are missing in the logs");
        }
    }

    /// Waits until all output of VMs that have ended is taken.
    pub(super) fn wait_drained(&self) {
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        let mut sources = lock(&self.shared.sources);
        while !sources.open.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("gave up waiting for the last console output");
                return;
            }
            sources =
                self.shared.drained.wait_timeout(sources, left).unwrap_or_else(PoisonError::into_inner).0;
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
        // The sources are let go at once: new VMs are added meanwhile.
        let Some(source) = lock(&self.sources).open.get(&token).map(Arc::clone) else { return };
        if !lock(&source).read(self) {
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
    fn read(&mut self, to: &Shared) -> bool {
        let mut buffer = [0; 16 * 1024];
        let bytes = match self.pipe.read(&mut buffer) {
            Ok(count) if count > 0 => &buffer[..count],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return true,
            // The node is gone, and with it the other end.
            _ => {
                if !self.line.is_empty() {
                    self.end_line(to);
                }
                return false;
            }
        };
        self.log(bytes, &to.outage);
        if !self.prefixed {
            to.shown.push(bytes);
        }
        self.split(bytes, to);
        true
    }

    /// Writes to the log, for as much as one VM may.
    fn log(&mut self, bytes: &[u8], outage: &Mutex<Outage>) {
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
            Ok(()) => {
                self.log.has_grown(wanted);
                if let Some(lost) = lock(outage).ends(Instant::now()) {
                    tracing::warn!("console output is logged again; {lost} bytes are missing in the logs");
                }
            }
            Err(error) => {
                if lock(outage).begins(wanted, Instant::now()) {
                    tracing::warn!(log = %self.log.path().display(), %error, "console output can't be logged at present");
                }
            }
        }
    }

    /// Adds to the line, and passes on those that are complete now.
    fn split(&mut self, bytes: &[u8], to: &Shared) {
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= MAX_LINE_BYTES {
                self.end_line(to);
            }
        }
    }

    fn end_line(&mut self, to: &Shared) {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(&line));
        if self.prefixed {
            to.shown.push(format!("[{}] {text}\n", self.name).as_bytes());
        }
        to.events.write(&Event::Console { name: &self.name, line: &text });
    }
}

/// The way to a VM's console.
#[derive(Debug)]
pub struct ConsoleInput(pub(super) Arc<PlatformLink>);

impl ConsoleInput {
    /// Types something, and waits until the VM has room for it.
    ///
    /// # Errors [`link::Error`] where the VM has ended. What its node takes too long to take is lost: whoever
    /// types can end it all the same.
    pub fn send(&self, bytes: &[u8]) -> Result<(), link::Error> {
        match self.0.send_within(&ToNode::Input(bytes.to_vec()), &[], INPUT_TIMEOUT) {
            Err(link::Error::Io { source, .. }) if source.kind() == io::ErrorKind::TimedOut => {
                tracing::warn!("console input is lost: the VM's node takes none");
                Ok(())
            }
            sent => sent,
        }
    }

    /// Types something, and says whether the VM had room for it: one that reads nothing is not waited for.
    ///
    /// # Errors
    /// As [`ConsoleInput::send`].
    pub fn try_send(&self, bytes: &[u8]) -> Result<bool, link::Error> {
        match self.0.try_send(&ToNode::Input(bytes.to_vec()), &[]) {
            Ok(()) => Ok(true),
            Err(link::Error::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The note in the place of output.
fn are_left_out(bytes: u64) -> Vec<u8> {
    format!("\n[host-vmm: {bytes} bytes are left out here, which standard output did not take]\n")
        .into_bytes()
}
