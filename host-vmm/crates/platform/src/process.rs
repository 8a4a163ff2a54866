//! The processes of a platform: its zygote, and the nodes that come from it.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, PipeReader, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use base::{output::push_message, sync::lock, text::Text, threads};
use command_fds::{CommandFdExt, FdMapping};
use nix::{
    fcntl::OFlag,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::pipe2,
};
use node::{
    wire::{LINK_FD, PlatformLink, Spawn, Spawned, ZygoteLink},
    zygote::CPU_PROFILE_VARIABLE,
};
use rustix::{
    fs::{OFlags, fcntl_setfl},
    process::{Signal, pidfd_send_signal},
};
use types::VmShape;

use super::Error;

/// Most orders that are sent to the zygote before its answers are read: neither side may wait for room in a
/// socket that the other one does not read.
pub(super) const BATCH: usize = 32;

/// How long the zygote has to start as many nodes: that takes it milliseconds, but it may have to be started
/// itself. Where VMs may stand still for longer for a fork, it has as long.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest line of a node's that is passed on as one, in bytes.
const MAX_LINE_BYTES: u64 = 16 << 10;

/// Longest such line with what is escaped in it, in bytes.
const MAX_ESCAPED_BYTES: usize = 32 << 10;

/// A node's process. Dropping it ends the process.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    handle: OwnedFd,
}

impl Process {
    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.handle.as_fd(), PollFlags::POLLIN)];
        // A call that fails tells nothing.
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Has its first thread leave a processor to others, until that thread itself decides otherwise.
    pub(super) fn keep_off(&self, processor: u32) {
        if let Err(error) = threads::keep_off(Some(self.pid), processor) {
            tracing::debug!(%error, pid = self.pid, processor, "a node can't be kept off a processor");
        }
    }
}

impl AsFd for Process {
    /// Readable once the process has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

impl Drop for Process {
    /// Ends the process, and waits until it has ended. One that has ended by itself stays what it is.
    fn drop(&mut self) {
        match pidfd_send_signal(&self.handle, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => tracing::error!(%errno, pid = self.pid, "a node can't be ended"),
        }
        let mut fds = [PollFd::new(self.handle.as_fd(), PollFlags::POLLIN)];
        while poll(&mut fds, PollTimeout::NONE) == Err(nix::Error::EINTR) {}
    }
}

/// Node of a warm VM: a machine of a certain shape that stands ready for an order, or is about to.
#[derive(Debug)]
pub(super) struct WarmNode {
    pub(super) config: VmShape,
    pub(super) link: Arc<PlatformLink>,
    pub(super) console: File,
    pub(super) process: Process,
}

impl WarmNode {
    /// Ends it before it can see that nobody speaks with it any more, and say so to others.
    pub(super) fn end(self) {
        let Self { link, process, .. } = self;
        drop(process);
        drop(link);
    }
}

/// The zygote. It is started when the first node is, and again when it is gone.
#[derive(Debug)]
pub(super) struct Zygote {
    /// The CPU profile, as text.
    cpu_profile: String,
    /// Longest pause of a VM for a fork.
    max_pause: Duration,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    link: ZygoteLink,
    process: Child,
}

impl Zygote {
    /// One that is yet to be started.
    pub(super) fn new(cpu_profile: String, max_pause: Duration) -> Self {
        Self { cpu_profile, max_pause, running: Mutex::default() }
    }

    /// Starts nodes, all at once. The vCPUs of cold ones run nothing before they get their order.
    pub(super) fn spawn(&self, config: VmShape, is_cold: bool, count: usize) -> Result<Vec<WarmNode>, Error> {
        let mut zygote = lock(&self.running);
        let running = Running::get(&mut zygote, &self.cpu_profile);
        let result = running
            .and_then(|running| running.spawn(Spawn { config, is_cold, max_pause: self.max_pause }, count));
        if let Err(Error::Zygote(_)) = result {
            // Answers may still come, and would be taken for those to later orders. The next one who needs a
            // zygote starts another.
            *zygote = None;
        }
        result
    }
}

impl Running {
    fn get<'z>(zygote: &'z mut Option<Self>, cpu_profile: &str) -> Result<&'z mut Self, Error> {
        if zygote.as_ref().is_some_and(|running| running.link.is_closed()) {
            *zygote = None;
        }
        match zygote {
            Some(running) => Ok(running),
            None => Ok(zygote.insert(Self::start(cpu_profile)?)),
        }
    }

    fn start(cpu_profile: &str) -> Result<Self, Error> {
        // Nodes inherit what this thread may use.
        threads::use_all_processors();
        let (link, theirs) = ZygoteLink::pair().map_err(Error::Zygote)?;
        let mut command = Command::new("/proc/self/exe");
        // A group of its own: what a terminal's keys send is for the platform.
        command.arg("zygote").env(CPU_PROFILE_VARIABLE, cpu_profile);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages()?).process_group(0);
        let mapping = FdMapping { parent_fd: theirs, child_fd: LINK_FD };
        command.fd_mappings(vec![mapping]).map_err(|error| Error::Start(io::Error::other(error)))?;
        let process = command.spawn().map_err(Error::Start)?;
        Ok(Self { link, process })
    }

    fn spawn(&self, spawn: Spawn, count: usize) -> Result<Vec<WarmNode>, Error> {
        let mut nodes = Vec::with_capacity(count);
        while nodes.len() < count {
            let batch = BATCH.min(count - nodes.len());
            // Each is ordered before the first one is waited for, and each that is ordered is answered, also
            // where another one fails: the zygote goes on.
            let (mut ordered, mut failed) = (Vec::with_capacity(batch), Ok(()));
            while failed.is_ok() && ordered.len() < batch {
                failed = self.order(spawn).map(|order| ordered.push(order));
            }
            let until = Instant::now() + spawn.max_pause.max(START_TIMEOUT);
            for (link, console) in ordered {
                match self.take_process(until) {
                    Ok(process) => {
                        nodes.push(WarmNode { config: spawn.config, link: Arc::new(link), console, process })
                    }
                    Err(error @ Error::Zygote(_)) => return Err(error),
                    Err(error) => failed = failed.and(Err(error)),
                }
            }
            failed?;
        }
        Ok(nodes)
    }

    fn order(&self, spawn: Spawn) -> Result<(PlatformLink, File), Error> {
        let (link, their_link) =
            PlatformLink::pair().map_err(|error| Error::Start(io::Error::other(error)))?;
        let (console, their_console) = pipe2(OFlag::O_CLOEXEC).map_err(|errno| Error::Start(errno.into()))?;
        self.link.send(&spawn, &[their_link.as_fd(), their_console.as_fd()]).map_err(Error::Zygote)?;
        Ok((link, File::from(console)))
    }

    /// Takes the next process. A zygote that hangs must not have VMs that fork stand still with it.
    fn take_process(&self, until: Instant) -> Result<Process, Error> {
        self.link.await_message(until).map_err(Error::Zygote)?;
        match self.link.receive().map_err(Error::Zygote)? {
            (Spawned::Process(pid), files) => {
                let handle = files.into_iter().next().map(OwnedFd::from);
                let handle =
                    handle.ok_or_else(|| Error::Start(io::Error::other("a node came without a handle")))?;
                Ok(Process { pid, handle })
            }
            (Spawned::Failed(why), _) => Err(Error::Start(io::Error::other(why.as_str()))),
        }
    }
}

/// Standard error for a zygote and its nodes: what this process does not take at once is left out, and no VM
/// waits for that.
fn messages() -> Result<Stdio, Error> {
    let (reader, writer) = io::pipe().map_err(Error::Start)?;
    fcntl_setfl(&writer, OFlags::NONBLOCK).map_err(|errno| Error::Start(errno.into()))?;
    threads::background("messages", move || pass_on(reader)).map_err(Error::Start)?;
    Ok(writer.into())
}

/// Passes on what nodes say, line by line, until there are none.
fn pass_on(pipe: PipeReader) {
    let (mut pipe, mut line) = (BufReader::new(pipe), Vec::new());
    loop {
        line.clear();
        match pipe.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => push_message(&escaped(&line)),
            Err(error) => return tracing::warn!(%error, "what nodes say can't be read any more"),
        }
    }
}

/// A line for a terminal: a guest may have broken out into the node that has written it.
fn escaped(line: &[u8]) -> Vec<u8> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut line = Text::<MAX_ESCAPED_BYTES>::of(String::from_utf8_lossy(line)).to_string().into_bytes();
    line.push(b'\n');
    line
}

impl Drop for Running {
    fn drop(&mut self) {
        self.link.shut_down();
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            tracing::error!(%error, "the zygote can't be ended");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use node::wire::Link;
    use types::MIN_RAM_BYTES;

    /// A zygote that answers so many orders, each by its number, or as one that has failed; then it is gone.
    fn zygote(answers: u32, failing: u32) -> (Zygote, thread::JoinHandle<()>) {
        let (link, theirs) = ZygoteLink::pair().unwrap();
        let theirs = Link::<Spawned, Spawn>::new(theirs);
        let answers = thread::spawn(move || {
            let handle = File::open("/dev/null").unwrap();
            for number in 0..answers {
                theirs.receive().unwrap();
                let answer = if number == failing {
                    Spawned::Failed("no process".into())
                } else {
                    Spawned::Process(number)
                };
                theirs.send(&answer, &[handle.as_fd()]).unwrap();
            }
        });
        let process = Command::new("sleep").arg("1000").spawn().unwrap();
        let zygote = Zygote::new("host".to_owned(), Duration::from_secs(1));
        *lock(&zygote.running) = Some(Running { link, process });
        (zygote, answers)
    }

    const CONFIG: VmShape = VmShape { vcpus: 1, ram_bytes: MIN_RAM_BYTES };

    #[test]
    fn after_a_failed_start_the_zygote_goes_on_and_no_order_gets_the_answer_to_another() {
        let (zygote, answers) = zygote(6, 1);
        let failed = zygote.spawn(CONFIG, false, 4).map(drop);
        assert!(matches!(failed, Err(Error::Start(_))), "{failed:?}");
        let nodes = zygote.spawn(CONFIG, false, 2).unwrap();
        assert_eq!(nodes.iter().map(|node| node.process.pid()).collect::<Vec<_>>(), [4, 5]);
        answers.join().unwrap();
    }

    #[test]
    fn a_zygote_that_goes_away_amid_its_answers_is_given_up() {
        let (zygote, answers) = zygote(2, u32::MAX);
        let failed = zygote.spawn(CONFIG, false, 4).map(drop);
        assert!(matches!(failed, Err(Error::Zygote(_))), "{failed:?}");
        assert!(lock(&zygote.running).is_none());
        answers.join().unwrap();
    }

    #[test]
    fn what_a_node_writes_gives_a_terminal_no_orders() {
        assert_eq!(escaped(b"host-vmm: \x1b]52;c;eA==\x07\n"), b"host-vmm: \\u{1b}]52;c;eA==\\u{7}\n");
        assert_eq!(escaped(b"\xff\n"), "\u{fffd}\n".as_bytes());
        assert!(escaped(&[0; 16 << 10]).len() <= MAX_ESCAPED_BYTES + 1);
    }
}
