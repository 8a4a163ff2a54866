//! The terminal as a VM's console: keys go to the guest as they are pressed.

use std::{
    io::{self, Read},
    os::fd::AsFd,
};

use nix::{
    sys::termios::{InputFlags, LocalFlags, SetArg, Termios, tcgetattr, tcsetattr},
    unistd::isatty,
};

/// Ctrl-A, the key before a command to the terminal itself.
const ESCAPE: u8 = 0x01;

/// The key behind it that ends the VMs.
const QUIT: u8 = b'x';

/// Standard input, in raw mode where it is a terminal; it is put back on drop.
#[derive(Debug)]
pub struct Terminal {
    before: Option<Termios>,
}

impl Terminal {
    /// Switches a terminal to raw mode. Its output stays as it is, so that other programs' lines still start
    /// at the left.
    ///
    /// # Errors
    /// Where the terminal can't be switched.
    pub fn raw() -> io::Result<Self> {
        let stdin = io::stdin();
        if !isatty(&stdin).unwrap_or(false) {
            return Ok(Self { before: None });
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.local_flags &= !(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG | LocalFlags::IEXTEN);
        raw.input_flags &= !(InputFlags::ICRNL | InputFlags::IXON | InputFlags::INLCR | InputFlags::IGNCR);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Self { before: Some(before) })
    }

    /// Whether there is a terminal.
    pub fn is_interactive(&self) -> bool {
        self.before.is_some()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(errno) = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, before)
        {
            tracing::warn!(%errno, "the terminal stays in raw mode; `stty sane` puts it right");
        }
    }
}

/// What a reader of keys is to do.
#[derive(Debug, PartialEq, Eq)]
enum Keys {
    /// Pass these on.
    Pass(Vec<u8>),
    /// Pass these on, and end the VMs.
    Quit(Vec<u8>),
}

/// Reads standard input to its end and passes it on. Where it is a terminal, Ctrl-A x calls `quit`, and
/// Ctrl-A twice is one Ctrl-A.
pub fn read_keys(interactive: bool, mut pass: impl FnMut(&[u8]) -> bool, quit: impl FnOnce()) {
    let mut buffer = [0; 256];
    let mut escaped = false;
    loop {
        let bytes = match io::stdin().read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => &buffer[..count],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return tracing::warn!(%error, "standard input can't be read any more"),
        };
        let keys = if interactive { unescape(bytes, &mut escaped) } else { Keys::Pass(bytes.to_vec()) };
        match keys {
            Keys::Pass(bytes) => {
                if !bytes.is_empty() && !pass(&bytes) {
                    return;
                }
            }
            Keys::Quit(bytes) => {
                pass(&bytes);
                return quit();
            }
        }
    }
}

fn unescape(bytes: &[u8], escaped: &mut bool) -> Keys {
    let mut keys = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        match (std::mem::take(escaped), byte) {
            (true, QUIT) => return Keys::Quit(keys),
            (false, ESCAPE) => *escaped = true,
            (_, byte) => keys.push(byte),
        }
    }
    Keys::Pass(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_a_prefix() {
        let mut escaped = false;
        assert_eq!(unescape(b"ab\x01", &mut escaped), Keys::Pass(b"ab".to_vec()));
        assert!(escaped);
        assert_eq!(unescape(b"\x01c", &mut escaped), Keys::Pass(b"\x01c".to_vec()));
        assert_eq!(unescape(b"x\x01xy", &mut escaped), Keys::Quit(b"x".to_vec()));
    }
}
