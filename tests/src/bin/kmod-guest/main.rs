//! What the tests of the kernel module run in Linux guests. Each command tells on the console, in lines that
//! start with a word in capitals, what the test then checks.

mod at_once;
mod device;
mod draws;
mod fuzz;
mod module;
mod notices;
mod refusals;

use std::{
    fs::{self, Permissions},
    io::stdout,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Parser, Subcommand};
use nix::{
    sys::{reboot::RebootMode, termios::tcdrain},
    time::{ClockId, clock_settime},
    unistd::{Gid, Uid, setgid, setgroups, setuid},
};
use serde_json::json;
use vmfork_abi::{Identity, Role};

#[derive(Debug, Parser)]
struct Cli {
    /// Give the device these permissions first, in octal digits.
    #[arg(long)]
    mode: Option<String>,
    /// Become this user first.
    #[arg(long)]
    uid: Option<u32>,
    /// Become a member of this group first, and of no other.
    #[arg(long)]
    gid: Option<u32>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fork once for each count; each copy prints who it is.
    Forks { counts: Vec<u32> },
    /// Set the clock an hour back, fork, and print the time in each copy.
    Clock,
    /// Fork again and again; each child ends at once.
    Repeat { times: u32 },
    /// Fork from several processes of several threads at once.
    AtOnce { processes: usize, threads: usize, times: u32 },
    /// Be one process of those.
    Worker { threads: usize, times: u32 },
    /// Fork from several threads that get signals all the time.
    Signals { threads: usize, times: u32 },
    /// Have a thread and a process wait for a fork, and look at the generation page.
    Notices,
    /// Be that process.
    Watcher,
    /// Have two threads wait for a fork that somebody else asks for.
    Others,
    /// Wait for the uevents of a fork.
    Uevents,
    /// Ask for what must be refused.
    Refusals,
    /// Open the device.
    Open,
    /// Open the device in a user namespace of one's own, as root there.
    OpenInNamespace,
    /// Load and unload the module while it is used.
    Module { rounds: u32 },
    /// Load the module.
    Load,
    /// Ask for a fork of two children again and again; print the codes of those that fail.
    Errors { times: u32 },
    /// Become another program.
    Exec {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Draw random numbers on the last CPU while the VM is forked on the first one.
    Draws { count: u32 },
    /// Draw random numbers while somebody else forks the VM.
    DrawsAlone,
    /// Fork by `vmfork fork` while `vmfork watch` waits for that.
    Watch,
    /// Do what comes to mind.
    Fuzz { seconds: u64, seed: u64 },
    /// Print what the kernel complains of.
    Complaints,
}

fn main() -> anyhow::Result<()> {
    let Cli { mode, uid, gid, command } = Cli::parse();
    if let Some(mode) = mode {
        fs::set_permissions(
            vmfork_abi::device::PATH,
            Permissions::from_mode(u32::from_str_radix(&mode, 8)?),
        )?;
    }
    if let Some(gid) = gid.map(Gid::from_raw) {
        setgroups(&[gid])?;
        setgid(gid)?;
    }
    if let Some(uid) = uid {
        setuid(Uid::from_raw(uid))?;
        // Who changes users has no say over its own /proc otherwise.
        nix::sys::prctl::set_dumpable(true)?;
    }
    match command {
        Command::Forks { counts } => forks(&counts),
        Command::Clock => clock(),
        Command::Repeat { times } => repeat(times),
        Command::AtOnce { processes, threads, times } => at_once::run(processes, threads, times),
        Command::Worker { threads, times } => at_once::worker(threads, times),
        Command::Signals { threads, times } => at_once::signals(threads, times),
        Command::Notices => notices::run(),
        Command::Watcher => notices::watcher(),
        Command::Others => notices::others(),
        Command::Uevents => notices::uevents(),
        Command::Refusals => refusals::run(),
        Command::Open => {
            println!("OPEN {:?}", device::open().map(drop).map_err(|error| error.raw_os_error()));
            Ok(())
        }
        Command::OpenInNamespace => {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)?;
            fs::write("/proc/self/setgroups", "deny")?;
            fs::write("/proc/self/uid_map", format!("0 {} 1", uid.unwrap_or(0)))?;
            fs::write("/proc/self/gid_map", format!("0 {} 1", gid.unwrap_or(0)))?;
            ensure!(Uid::current().is_root(), "not root in a namespace of its own");
            println!("OPEN {:?}", device::open().map(drop).map_err(|error| error.raw_os_error()));
            Ok(())
        }
        Command::Module { rounds } => module::run(rounds),
        Command::Load => {
            println!("LOADED {:?}", module::load());
            Ok(())
        }
        Command::Errors { times } => errors(times),
        Command::Exec { command } => {
            let (program, arguments) = command.split_first().context("a program")?;
            Err(std::process::Command::new(program).args(arguments).exec()).context(program.clone())
        }
        Command::Draws { count } => draws::run(count),
        Command::DrawsAlone => draws::alone(),
        Command::Watch => notices::watch(),
        Command::Fuzz { seconds, seed } => fuzz::run(seconds, seed),
        Command::Complaints => complaints(),
    }
}

/// Waits until the console has sent everything: what is still to be sent, every copy would send.
fn drain() -> anyhow::Result<()> {
    tcdrain(stdout()).context("the console does not take its output")
}

fn is_child(identity: &Identity) -> bool {
    identity.role == Role::Child.number()
}

/// Ends this VM at once.
fn power_off() -> anyhow::Result<()> {
    let never = nix::sys::reboot::reboot(RebootMode::RB_POWER_OFF)?;
    match never {}
}

fn forks(counts: &[u32]) -> anyhow::Result<()> {
    let file = device::open()?;
    for &count in counts {
        drain()?;
        let forked = match device::fork(&file, device::fork_arguments(count)) {
            Ok(forked) => forked,
            Err(refused) => bail!("no fork: {refused:?}"),
        };
        let identity = forked.identity;
        ensure!(identity.seed == [0; 64], "the kernel's seed came out");
        ensure!(device::identity(&file)? == identity, "IDENTITY says something else");
        let mut random = [0; 16];
        getrandom::fill(&mut random).context("getrandom")?;
        let ids: Vec<_> = forked.copies.iter().map(|copy| copy.vm_id).collect();
        let copy = json!({
            "role": identity.role,
            "index": identity.index,
            "count": identity.count,
            "generation": identity.generation,
            "vm_id": identity.vm_id,
            "parent_id": identity.parent_id,
            "listed": forked.listed,
            "copies": ids,
            "random": random,
        });
        println!("COPY {copy}");
        if is_child(&identity) {
            break;
        }
    }
    complaints()
}

fn clock() -> anyhow::Result<()> {
    let now = || Ok::<_, anyhow::Error>(SystemTime::now().duration_since(UNIX_EPOCH)?);
    clock_settime(ClockId::CLOCK_REALTIME, (now()? - Duration::from_secs(3600)).into())?;
    drain()?;
    let forked = device::fork(&device::open()?, device::fork_arguments(1));
    let forked = forked.map_err(|refused| anyhow!("no fork: {refused:?}"))?;
    let wall_ms = now()?.as_millis();
    println!("CLOCK {} {wall_ms}", if is_child(&forked.identity) { "child" } else { "parent" });
    complaints()
}

fn repeat(times: u32) -> anyhow::Result<()> {
    let file = device::open()?;
    let before = device::status(&file)?.forks;
    drain()?;
    for number in 1..=times {
        match device::fork(&file, device::fork_arguments(1)) {
            Ok(forked) if is_child(&forked.identity) => power_off()?,
            Ok(_) => {}
            Err(refused) => bail!("fork {number} of {times} failed: {refused:?}"),
        }
    }
    let forks = device::status(&file)?.forks - before;
    println!("REPEATED {forks}");
    complaints()
}

fn errors(times: u32) -> anyhow::Result<()> {
    let file = device::open()?;
    for _ in 0..times {
        drain()?;
        match device::fork(&file, device::fork_arguments(2)) {
            Ok(forked) => {
                println!("FORKED {}", forked.identity.index);
                if is_child(&forked.identity) {
                    return Ok(());
                }
            }
            Err(refused) => println!("ERROR {:?} {}", refused.errno, refused.code),
        }
    }
    complaints()
}

/// Prints the lines of the kernel's log that tell of something wrong, or that there are none.
fn complaints() -> anyhow::Result<()> {
    const BAD: [&str; 14] = [
        "WARNING",
        "cut here",
        "Call Trace",
        "BUG",
        "Oops",
        "possible circular locking",
        "possible recursive locking",
        "inconsistent lock state",
        "held lock freed",
        "suspicious RCU usage",
        "soft lockup",
        "rcu: INFO",
        "hung task",
        "refcount_t",
    ];
    let output = std::process::Command::new("dmesg").output().context("dmesg")?;
    let log = String::from_utf8_lossy(&output.stdout);
    for line in log.lines().filter(|line| BAD.iter().any(|bad| line.contains(bad))) {
        println!("COMPLAINT {line}");
    }
    println!("COMPLAINTS none but those above");
    Ok(())
}
