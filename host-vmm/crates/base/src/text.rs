//! Text from outside, cut and escaped once: from then on it can be kept, sent on, logged and shown.
//!
//! Peers, nodes, guests and etcd send reasons and names of any length, with any content: escape sequences
//! that a terminal executes, or bidirectional controls that reorder what it shows. Such text becomes a
//! [`Text`] where it enters, and each message that carries some has it as a [`Text`]. What one side can
//! build, the other accepts: both use one constructor.

use std::{
    error::Error,
    fmt::{self, Display, Write},
    ops::Deref,
};

use serde::{Deserialize, Serialize};

/// A reason for a failure, with its causes: at most 4096 bytes. The longest one of an honest platform, the
/// list of all that a host lacks for a VM, has some 3 KB.
pub type Reason = Text<4096>;

/// A name of a VM or a platform: at most 128 bytes. Valid ones have at most 65 bytes (CLUSTER/NAME).
pub type Name = Text<128>;

/// Mark at the end of a text that was cut.
const CUT: char = '…';

/// Printable text of at most `MAX` bytes.
///
/// Control characters, format characters and combining marks are escaped as Rust escapes them (`\n`,
/// `\u{1b}`). To make a [`Text`] of a [`Text`] changes nothing.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String")]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    /// What a value is displayed as. No more of it is formatted than there is room for.
    pub fn of(value: impl Display) -> Self {
        let mut cutter = Cutter::<MAX> { text: String::new(), fitting: 0, is_cut: false };
        // An error says that there is no room left, and the end of the text says so too.
        if write!(cutter, "{value}").is_err() && !cutter.is_cut {
            cutter.cut();
        }
        Self(cutter.text)
    }

    /// An error and its causes.
    pub fn of_error(error: &dyn Error) -> Self {
        Self::of(Chain(error))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Text that is being made.
struct Cutter<const MAX: usize> {
    text: String,
    /// Length of the text up to which there is room for the mark behind it, in bytes.
    fitting: usize,
    is_cut: bool,
}

impl<const MAX: usize> Cutter<MAX> {
    fn cut(&mut self) {
        self.text.truncate(self.fitting);
        self.text.push(CUT);
        self.is_cut = true;
    }
}

impl<const MAX: usize> Write for Cutter<MAX> {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        const { assert!(MAX >= CUT.len_utf8()) };
        for character in piece.chars() {
            if self.is_cut {
                return Err(fmt::Error);
            }
            match character {
                '"' | '\'' | '\\' => self.text.push(character),
                _ => self.text.extend(character.escape_debug()),
            }
            if self.text.len() > MAX {
                self.cut();
            } else if self.text.len() <= MAX - CUT.len_utf8() {
                self.fitting = self.text.len();
            }
        }
        Ok(())
    }
}

/// An error and its causes, with colons between them.
struct Chain<'a>(&'a dyn Error);

impl Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl<const MAX: usize> Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl<const MAX: usize> fmt::Debug for Text<MAX> {
    /// In quotes; it is escaped already.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl<const MAX: usize> Deref for Text<MAX> {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> From<&str> for Text<MAX> {
    fn from(text: &str) -> Self {
        Self::of(text)
    }
}

impl<const MAX: usize> From<String> for Text<MAX> {
    fn from(text: String) -> Self {
        Self::of(text)
    }
}

impl<const MAX: usize> From<Text<MAX>> for String {
    fn from(text: Text<MAX>) -> Self {
        text.0
    }
}

/// Several lines for a terminal: each is a [`Reason`] of its own.
pub fn lines(text: &str) -> String {
    text.lines().map(|line| String::from(Reason::of(line))).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
#[path = "text_test.rs"]
mod tests;
