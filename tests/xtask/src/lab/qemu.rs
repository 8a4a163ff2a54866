//! The process that is the lab.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::streams::{self, Input};
use crate::setup::QEMU;

/// Exit code of a run that took too long, as timeout(1) has it.
const TIMED_OUT: u8 = 124;

/// Exit code of a run that was interrupted, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;

/// Time that QEMU has to end before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// Number of lines of the console that are shown when the lab fails, or the command in it. What KVM says of a
/// guest that it can't enter takes 70.
const CONSOLE_LINES: usize = 100;

/// Words of lines that are always on the console: KVM says that a Linux guest has looked for performance
/// counters, and the kernel that it ends.
const EXPECTED_LINES: [&str; 2] = ["Unhandled WRMSR(0xc0010007)", "reboot: Power down"];

/// The kernel's command line. The emulated TSC is as steady as this machine's, but doesn't say so: without
/// `tsc=reliable`, the kernel would take every time from an emulated HPET.
///
/// Its timer ticks all the time, instead of being set for each event. QEMU's processor thread changes the
/// word of its pending interrupts when a nested guest is entered and left, and takes no lock for that: an
/// interrupt of this very moment is forgotten. It stays in the local APIC, but nothing wakes the processor
/// for it until another one comes. Where it was that of the only timer, which is set once the last event has
/// come, the lab stood still for ever.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable nohz=off \
    highres=off random.trust_cpu=on";

/// The machine. EPYC-Rome with `svm` is an AMD CPU with nested paging. It has no XSAVE, since QEMU does not
/// let a nested hypervisor see a guest's XSETBV: the guest's kernel would warn that sizes contradict each
/// other, and lose AVX state.
///
/// It has one processor. QEMU 7.2, which Debian 12 has, now and then goes on executing what was there before
/// one processor changed code that another one runs, as Linux does when the first VM starts or the last one
/// ends: with two processors, about one guest in thirty stood still, or took the lab with it.
const MACHINE: &str = "-machine q35 -accel tcg -smp 1 -m 4096 \
    -cpu EPYC-Rome,+svm,+npt,-xsave,-xsaveopt,-xsavec,-xgetbv1,-xsaves,-avx,-avx2,-f16c,-fma \
    -nodefaults -no-user-config -no-reboot -display none";

/// QEMU says on every start what of this CPU it doesn't emulate, a line each with these words.
const EXPECTED_MESSAGE: &str = "TCG doesn't support requested feature";

/// End of a run.
enum End {
    ByItself,
    Interrupted,
    TimedOut,
}

/// Files that the lab writes.
struct Records {
    /// Progress of the command: see [`exit_code`].
    status: File,
    /// Messages of QEMU.
    messages: File,
    /// The kernel's console. It stays there when the lab fails.
    console: PathBuf,
}

/// Boots `kernel` with `initrd`, and returns the exit code of the command in it, whose output goes to
/// `output`. `dir` is for the console's log.
pub(super) fn run(
    kernel: &Path,
    initrd: &File,
    dir: &Path,
    limit: Duration,
    output: impl Write + Send + 'static,
) -> Result<u8> {
    let file = || tempfile::tempfile_in(dir).with_context(|| format!("can't write in {}", dir.display()));
    let console = dir.join(format!("console-{}.log", process::id()));
    let mut records = Records { status: file()?, messages: file()?, console };
    // From here on these signals only end QEMU; afterwards, this process ends by itself.
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).context("can't handle signals")?;
    }
    let mut qemu = spawn(kernel, initrd, &records)?;
    let output = qemu.stdout.take().map(|pipe| streams::show(pipe, output));
    let end = wait(&mut qemu, &records.status, limit, &interrupted)?;
    if let Some(Ok(result)) = output.map(JoinHandle::join) {
        result.context("can't show the lab's output")?;
    }
    let code = match end {
        End::ByItself => exit_code(&text(&mut records.status)?),
        End::Interrupted => Some(INTERRUPTED),
        End::TimedOut => {
            eprintln!("xtask: the lab was ended after {} s. {}", limit.as_secs(), records.last_words()?);
            return Ok(TIMED_OUT);
        }
    };
    let Some(code) = code else {
        bail!("the lab ended before the command in it did. {}", records.last_words()?)
    };
    if code != 0 {
        // Most commands fail for reasons of their own.
        records.console_end().iter().for_each(|line| eprintln!("xtask: the lab's kernel: {line}"));
    }
    fs::remove_file(&records.console)
        .with_context(|| format!("can't remove {}", records.console.display()))?;
    Ok(code)
}

/// The exit code in what the lab's `/init` writes: `ready`, and the code when there is one.
fn exit_code(written: &str) -> Option<u8> {
    written.split_whitespace().nth(1)?.parse().ok()
}

fn spawn(kernel: &Path, initrd: &File, records: &Records) -> Result<Child> {
    let mut command = Command::new(QEMU);
    command
        .args(MACHINE.split_whitespace())
        .args(["-append", COMMAND_LINE])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(path_of(initrd))
        .args(["-serial", &format!("file:{}", records.console.display())])
        .args(["-serial", "stdio"])
        .args(["-serial", &format!("file:{}", path_of(&records.status).display())])
        .stdin(streams::stdin_of_qemu()?)
        .stdout(Stdio::piped())
        .stderr(records.messages.try_clone().context("can't copy a file's descriptor")?);
    let end_with_parent = || Ok(prctl::set_pdeathsig(Signal::SIGTERM)?);
    // SAFETY: between fork and exec, this only makes a system call: it neither allocates nor takes a lock.
    unsafe { command.pre_exec(end_with_parent) };
    command.spawn().with_context(|| format!("can't run {QEMU}"))
}

/// The path by which QEMU opens a file of this process that has no name, and so needs no removal.
fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", process::id(), file.as_raw_fd()).into()
}

/// Waits for QEMU to end, or ends it. Connects its input when the lab is ready.
fn wait(qemu: &mut Child, status: &File, limit: Duration, interrupted: &AtomicBool) -> Result<End> {
    let start = Instant::now();
    let mut input = Input::default();
    loop {
        let ended = qemu.try_wait().context("can't wait for QEMU")?.is_some();
        // Ctrl-C reaches QEMU too.
        if interrupted.load(Ordering::Relaxed) {
            terminate(qemu)?;
            return Ok(End::Interrupted);
        }
        if ended {
            return Ok(End::ByItself);
        }
        if start.elapsed() > limit {
            terminate(qemu)?;
            return Ok(End::TimedOut);
        }
        let is_ready = status.metadata().context("can't look at the lab's status")?.len() > 0;
        if is_ready && let Some(pipe) = qemu.stdin.take() {
            input.connect(pipe)?;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Ends QEMU, by force if need be.
fn terminate(qemu: &mut Child) -> Result<()> {
    let start = Instant::now();
    while qemu.try_wait().context("can't wait for QEMU")?.is_none() {
        if start.elapsed() > GRACE {
            qemu.kill().context("can't kill QEMU")?;
            qemu.wait().context("can't wait for QEMU")?;
            break;
        }
        kill(Pid::from_raw(qemu.id().cast_signed()), Signal::SIGTERM).context("can't end QEMU")?;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Records {
    /// Messages that may explain a failure.
    fn last_words(&mut self) -> Result<String> {
        let messages = text(&mut self.messages)?;
        let messages = messages.lines().filter(|line| !line.contains(EXPECTED_MESSAGE));
        let heading = format!("The end of its console, {}:", self.console.display());
        let console = self.console_end();
        let console = [&heading].into_iter().chain(&console).map(String::as_str);
        Ok(messages.chain(console).collect::<Vec<_>>().join("\n"))
    }

    /// The last lines of the console, but those that are always there.
    fn console_end(&self) -> Vec<String> {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines =
            console.lines().filter(|line| !EXPECTED_LINES.iter().any(|expected| line.contains(expected)));
        let mut last: Vec<_> = lines.rev().take(CONSOLE_LINES).map(str::to_owned).collect();
        last.reverse();
        last
    }
}

/// All that was written to `file`.
fn text(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).context("can't read what the lab wrote")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_code_follows_ready() {
        assert_eq!(exit_code("ready\r\n255\r\n"), Some(255));
        assert_eq!(exit_code("ready\r\n"), None);
        assert_eq!(exit_code(""), None);
    }
}
