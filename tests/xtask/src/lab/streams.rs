//! Standard input and output of the command in the lab.
//!
//! QEMU gets pipes. It would set a terminal's own streams to non-blocking, for this process too, and leave
//! them so if it is killed.

use std::fs;
use std::io::{self, IsTerminal, Read, Write, stdin};
use std::os::unix::fs::FileTypeExt;
use std::process::{ChildStdin, ChildStdout, Stdio};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::sys::termios::{self, InputFlags, LocalFlags, SetArg, Termios};

/// Standard input of QEMU: a pipe, if somebody or something may be writing to ours.
pub(super) fn stdin_of_qemu() -> Result<Stdio> {
    let is_pipe = || io::Result::Ok(fs::metadata("/proc/self/fd/0")?.file_type().is_fifo());
    let connected = stdin().is_terminal() || is_pipe().context("can't look at standard input")?;
    Ok(if connected { Stdio::piped() } else { Stdio::null() })
}

/// Copies `pipe` to `output`, until QEMU ends.
pub(super) fn show(
    mut pipe: ChildStdout,
    mut output: impl Write + Send + 'static,
) -> JoinHandle<io::Result<()>> {
    thread::spawn(move || copy(&mut pipe, &mut output))
}

/// Standard input, once it is connected. Dropping it leaves the terminal as it was.
#[derive(Debug, Default)]
pub(super) struct Input {
    terminal: Option<Termios>,
}

impl Input {
    /// Copies standard input to `pipe` from now on, until one of them ends. A terminal hands over each key as
    /// it is pressed, but still turns Ctrl-C into a signal.
    pub(super) fn connect(&mut self, mut pipe: ChildStdin) -> Result<()> {
        if stdin().is_terminal() {
            let before = termios::tcgetattr(stdin()).context("can't read the terminal's settings")?;
            let mut keys = before.clone();
            keys.input_flags
                .remove(InputFlags::ICRNL | InputFlags::INLCR | InputFlags::IGNCR | InputFlags::IXON);
            keys.local_flags.remove(LocalFlags::ECHO | LocalFlags::ICANON | LocalFlags::IEXTEN);
            termios::tcsetattr(stdin(), SetArg::TCSANOW, &keys)
                .context("can't change the terminal's settings")?;
            self.terminal = Some(before);
        }
        thread::spawn(move || copy(&mut stdin(), &mut pipe));
        Ok(())
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if let Some(before) = &self.terminal
            && let Err(error) = termios::tcsetattr(stdin(), SetArg::TCSANOW, before)
        {
            eprintln!("xtask: can't restore the terminal's settings: {error}");
        }
    }
}

/// Hands on each piece as it comes.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            length => to.write_all(&buffer[..length])?,
        }
        to.flush()?;
    }
}
