//! The log of a VM's console, as it is read from afar.

use std::time::Duration;

use hyper::{HeaderMap, Method, body::Bytes};

use super::{Connection, Content, Endpoint, connect, vm_path};
use crate::{LAST_PIECE, NEXT_OFFSET};

/// A log that is being read.
#[derive(Debug)]
pub struct Log {
    connection: Connection,
    path: String,
    /// Where the next piece begins, in bytes from its start.
    next: u64,
}

/// A piece of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// What it holds; nothing where nothing has come since the last one.
    pub bytes: Bytes,
    /// Whether the VM has ended, and nothing comes after it.
    pub is_last: bool,
}

impl Log {
    /// The log of a VM of this platform, or of the only one that this user runs.
    ///
    /// # Errors
    /// Where there is no platform, or it does not answer.
    pub fn open(platform: Option<&Endpoint>, vm: &str) -> anyhow::Result<Self> {
        Ok(Self { path: vm_path(vm)?, connection: connect(platform)?, next: 0 })
    }

    /// Reads the next piece. Where there is nothing, it is waited for a while for more.
    ///
    /// # Errors
    /// Where the platform does not answer, or has no such VM.
    pub fn read(&mut self, wait: Duration) -> anyhow::Result<Piece> {
        let path = format!("{}/log?from={}&wait_ms={}", self.path, self.next, wait.as_millis());
        let (head, bytes) = self.connection.exchange(Method::GET, &path, Content::none())?;
        let (next, is_last) = position(&head)
            .ok_or_else(|| anyhow::anyhow!("the platform does not say where it is in the log"))?;
        self.next = next;
        Ok(Piece { bytes, is_last })
    }
}

/// Where the next piece begins, and whether there is none.
fn position(head: &HeaderMap) -> Option<(u64, bool)> {
    let text = |name| head.get(name)?.to_str().ok();
    Some((text(NEXT_OFFSET)?.parse().ok()?, text(LAST_PIECE)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_tells_where_the_next_piece_begins() {
        let head = |next: &'static str, last: &'static str| {
            let fields = [(NEXT_OFFSET, next), (LAST_PIECE, last)];
            fields.into_iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
        };
        assert_eq!(position(&head("17", "false")), Some((17, false)));
        assert_eq!(position(&head("18446744073709551615", "true")), Some((u64::MAX, true)));
        for (next, last) in [("", "true"), ("-1", "true"), ("1", "yes"), ("18446744073709551616", "true")] {
            assert_eq!(position(&head(next, last)), None, "{next} {last}");
        }
        assert_eq!(position(&HeaderMap::new()), None);
    }
}
