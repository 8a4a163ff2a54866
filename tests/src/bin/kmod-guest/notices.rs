//! What processes are told of a fork without having asked for it.

use std::{
    env,
    fs::File,
    io::{ErrorKind, Read},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    process::{Command, Stdio},
    ptr::NonNull,
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow, bail, ensure};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::mman::{MapFlags, ProtFlags, mmap},
};
use serde_json::json;
use vmfork_abi::{Generation, Identity, device::Notice};

use crate::{complaints, device, drain, is_child};

/// The generation page, mapped.
pub(crate) struct Page(NonNull<u64>);

// SAFETY: the mapping belongs to no thread, and is only read.
unsafe impl Send for Page {}

impl Page {
    /// Maps what `file` has at `offset`.
    pub(crate) fn map(file: &File, offset: libc::off_t) -> anyhow::Result<Self> {
        let (read, shared) = (ProtFlags::PROT_READ, MapFlags::MAP_SHARED);
        // SAFETY: the kernel chooses an address that nothing else uses.
        let page = unsafe { mmap(None, 4096.try_into()?, read, shared, file, offset) }?;
        Ok(Self(page.cast()))
    }

    pub(crate) fn generation(&self) -> u64 {
        // SAFETY: the page is mapped to the end, and it is read as memory that somebody else writes.
        unsafe { self.0.as_ptr().read_volatile() }
    }

    /// The rest of what [`Generation`] says, and of the page.
    fn rest(&self) -> Vec<u64> {
        let word = |at: usize| {
            // SAFETY: as above; the page has so many words.
            unsafe { self.0.as_ptr().wrapping_add(at).read_volatile() }
        };
        (1..512).map(word).collect()
    }
}

const _: () = assert!(Generation::BYTES == 64);

fn has_news(file: &File, timeout: PollTimeout) -> nix::Result<bool> {
    let mut polled = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, timeout)?;
    Ok(polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN)))
}

fn notice(file: &mut File) -> anyhow::Result<Notice> {
    let mut bytes = [0; Notice::BYTES];
    ensure!(file.read(&mut bytes)? == Notice::BYTES, "a notice is shorter than it should be");
    Ok(Notice::from_bytes(&bytes))
}

/// Waits for one fork, and says who this is.
fn wait() -> anyhow::Result<Identity> {
    let mut file = device::open()?;
    ensure!(has_news(&file, PollTimeout::NONE)?, "poll returns without news");
    Ok(Identity::from_bytes(&notice(&mut file)?.identity))
}

/// Says that it is ready, waits for one fork, and prints the role.
pub(crate) fn watcher() -> anyhow::Result<()> {
    let mut file = device::open()?;
    println!("ready");
    // By a read that waits, and not by poll.
    let identity = Identity::from_bytes(&notice(&mut file)?.identity);
    println!("{}", identity.role);
    Ok(())
}

pub(crate) fn run() -> anyhow::Result<()> {
    let mut file = device::open()?;
    let page = Page::map(&file, 0)?;
    ensure!(page.rest().iter().all(|word| *word == 0), "the generation page has more than the generation");
    let before = page.generation();
    ensure!(!has_news(&file, PollTimeout::ZERO)?, "there are news before any fork");
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let too_early = file.read(&mut [0; Notice::BYTES]).map_err(|error| error.kind());
    ensure!(too_early == Err(ErrorKind::WouldBlock), "a read that does not wait: {too_early:?}");

    let waiting = thread::spawn(wait);
    let mut watcher = Command::new(env::current_exe()?).arg("watcher").stdout(Stdio::piped()).spawn()?;
    let mut told = watcher.stdout.take().context("a watcher with a standard output")?;
    let mut ready = [0; 6];
    told.read_exact(&mut ready)?;
    // For both to wait in the kernel.
    thread::sleep(Duration::from_millis(500));

    drain()?;
    let forked = device::fork(&file, device::fork_arguments(1)).map_err(|refused| anyhow!("{refused:?}"))?;
    let after = page.generation();
    let by_poll = waiting.join().map_err(|_| anyhow!("a thread panicked"))??;
    let mut by_read = String::new();
    told.read_to_string(&mut by_read)?;
    ensure!(watcher.wait()?.success(), "the watcher failed");
    // The caller too, by its own file, and once.
    let own = notice(&mut file)?;
    let again = file.read(&mut [0; Notice::BYTES]).map_err(|error| error.kind());
    ensure!(again == Err(ErrorKind::WouldBlock), "one fork is told of twice: {again:?}");
    ensure!(Identity::from_bytes(&own.identity) == forked.identity, "the notice tells of somebody else");
    let notices = json!({
        "role": forked.identity.role,
        "generation": [before, after],
        "by_poll": by_poll.role,
        "by_read": by_read.trim(),
        "forks": own.forks,
    });
    println!("NOTICES {notices}");
    complaints()
}

/// Waits for a fork that somebody else asks for, in one thread by poll and in one by read, and prints the
/// role that each is told, and the uevents.
pub(crate) fn others() -> anyhow::Result<()> {
    let socket = uevent_socket()?;
    let waiting = thread::spawn(wait);
    let mut file = device::open()?;
    // For the other one to wait in the kernel.
    thread::sleep(Duration::from_millis(500));
    println!("READY");
    let by_read = Identity::from_bytes(&notice(&mut file)?.identity);
    let by_poll = waiting.join().map_err(|_| anyhow!("a thread panicked"))??;
    println!("TOLD {} {} {:?}", by_read.role, by_poll.role, uevents_of_module(&socket)?);
    complaints()
}

/// A socket that gets the kernel's uevents.
fn uevent_socket() -> anyhow::Result<OwnedFd> {
    // SAFETY: the call touches no memory of this process.
    let socket = unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            libc::NETLINK_KOBJECT_UEVENT,
        )
    };
    let socket = nix::errno::Errno::result(socket)?;
    // SAFETY: the descriptor is new, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: zeros are an address.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    address.nl_family = libc::AF_NETLINK.try_into()?;
    address.nl_groups = 1;
    let length = u32::try_from(size_of::<libc::sockaddr_nl>())?;
    // SAFETY: the address lives until the call returns, and has that length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    nix::errno::Errno::result(bound)?;
    Ok(socket)
}

pub(crate) fn uevents() -> anyhow::Result<()> {
    let socket = uevent_socket()?;
    let file = device::open()?;
    drain()?;
    let forked = device::fork(&file, device::fork_arguments(1)).map_err(|refused| anyhow!("{refused:?}"))?;
    // What there is, is there before FORK returns.
    let events = uevents_of_module(&socket)?;
    println!("UEVENTS {} {events:?}", if is_child(&forked.identity) { "child" } else { "parent" });
    complaints()
}

/// Those that the module has sent by now.
fn uevents_of_module(socket: &OwnedFd) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        match nix::unistd::read(socket, &mut buffer) {
            Ok(bytes) => found.push(String::from_utf8_lossy(&buffer[..bytes]).replace('\0', " ")),
            Err(nix::errno::Errno::EAGAIN) => break,
            Err(errno) => bail!("the uevents can't be read: {errno}"),
        }
    }
    found.retain(|event| event.contains("VMFORK_ROLE"));
    Ok(found)
}

/// What `vmfork watch` prints of a fork by `vmfork fork`, in both VMs.
pub(crate) fn watch() -> anyhow::Result<()> {
    let vmfork = || Command::new("/usr/bin/vmfork");
    let watch = vmfork().args(["watch", "--json", "--count", "1"]).stdout(Stdio::piped()).spawn()?;
    // For it to wait in the kernel.
    thread::sleep(Duration::from_millis(1000));
    let fork = vmfork().args(["fork", "--json"]).output()?;
    let watched = watch.wait_with_output()?;
    ensure!(watched.status.success(), "vmfork watch failed");
    let line = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    println!("FORK {:?} {}", fork.status.code(), line(&fork.stdout));
    println!("WATCHED {}", line(&watched.stdout));
    complaints()
}
