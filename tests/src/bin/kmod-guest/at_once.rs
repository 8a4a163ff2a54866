//! Many callers at once.

use std::{
    env,
    fs::File,
    process::{Command, Stdio},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, anyhow, ensure};
use nix::{
    errno::Errno,
    sys::{
        pthread::{Pthread, pthread_kill, pthread_self},
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    },
};

use crate::{complaints, device, drain, is_child, power_off};

/// How a thread came out of its forks.
enum End {
    /// It has made so many, and was interrupted so often.
    Original { forks: u32, interrupted: u32 },
    /// It found itself in a copy.
    Copy,
}

pub(crate) fn run(processes: usize, threads: usize, times: u32) -> anyhow::Result<()> {
    let file = device::open()?;
    drain()?;
    let worker = || {
        let program = env::current_exe()?;
        let arguments = ["worker".to_owned(), threads.to_string(), times.to_string()];
        Command::new(program).args(arguments).stdout(Stdio::piped()).spawn()
    };
    let workers: Vec<_> = (0..processes).map(|_| worker()).collect::<Result<_, _>>()?;
    let mut forks = 0;
    for worker in workers {
        let output = worker.wait_with_output()?;
        ensure!(output.status.success(), "a process has ended with {}", output.status);
        let told = String::from_utf8_lossy(&output.stdout);
        forks += told.trim().parse::<u32>().unwrap_or(0);
    }
    if device::identity(&file)?.generation > 0 {
        power_off()?;
    }
    println!("AT-ONCE {forks}");
    complaints()
}

pub(crate) fn worker(threads: usize, times: u32) -> anyhow::Result<()> {
    let start = Arc::new(Barrier::new(threads));
    let threads = (0..threads).map(|_| {
        let start = Arc::clone(&start);
        thread::spawn(move || {
            start.wait();
            fork_times(&device::open()?, times)
        })
    });
    let mut total = 0;
    for thread in threads.collect::<Vec<_>>() {
        match thread.join().map_err(|_| anyhow!("a thread panicked"))?? {
            End::Original { forks, .. } => total += forks,
            End::Copy => power_off()?,
        }
    }
    println!("{total}");
    Ok(())
}

fn fork_times(file: &File, times: u32) -> anyhow::Result<End> {
    let (mut forks, mut interrupted) = (0, 0);
    while forks < times {
        match device::fork(file, device::fork_arguments(1)) {
            Ok(forked) if is_child(&forked.identity) => return Ok(End::Copy),
            Ok(_) => forks += 1,
            Err(refused) => match refused.errno {
                Errno::ESTALE => return Ok(End::Copy),
                // Whoever was not in the middle of a call goes on in a copy too; the VMM lets no copy fork.
                _ if device::identity(file)?.generation > 0 => return Ok(End::Copy),
                Errno::EINTR => interrupted += 1,
                _ => return Err(anyhow!("a fork failed: {refused:?}")),
            },
        }
    }
    Ok(End::Original { forks, interrupted })
}

extern "C" fn nothing(_: libc_int) {}

#[allow(non_camel_case_types, reason = "as C calls it")]
type libc_int = nix::libc::c_int;

/// Each thread forks, while another one sends them signals whose handlers do nothing, and do not restart
/// system calls.
pub(crate) fn signals(threads: usize, times: u32) -> anyhow::Result<()> {
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGUSR1, &action) }?;
    let file = device::open()?;
    drain()?;
    let ended = Arc::new(AtomicBool::new(false));
    let left = Arc::new(AtomicU32::new(u32::try_from(threads)?));
    let (sender, receiver) = std::sync::mpsc::channel::<Pthread>();
    let forking: Vec<_> = (0..threads)
        .map(|_| {
            let (sender, ended, left) = (sender.clone(), Arc::clone(&ended), Arc::clone(&left));
            thread::spawn(move || -> anyhow::Result<End> {
                sender.send(pthread_self()).context("a pester that listens")?;
                let end = fork_times(&device::open()?, times);
                // Nobody may get a signal once it has ended.
                left.fetch_sub(1, Ordering::SeqCst);
                while !ended.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                end
            })
        })
        .collect();
    let pestered: Vec<Pthread> = receiver.iter().take(threads).collect();
    while left.load(Ordering::SeqCst) > 0 {
        for thread in &pestered {
            pthread_kill(*thread, Signal::SIGUSR1)?;
        }
        thread::sleep(Duration::from_micros(300));
    }
    ended.store(true, Ordering::SeqCst);
    let (mut forks, mut interrupted) = (0, 0);
    for thread in forking {
        match thread.join().map_err(|_| anyhow!("a thread panicked"))?? {
            End::Original { forks: more, interrupted: times } => {
                (forks, interrupted) = (forks + more, interrupted + times)
            }
            End::Copy => power_off()?,
        }
    }
    ensure!(device::identity(&file)?.generation == 0, "a copy took itself for the original");
    println!("SIGNALS {forks} {interrupted}");
    complaints()
}
