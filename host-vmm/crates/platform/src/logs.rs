//! What VMs have written to their consoles, for those who ask: that of VMs that are there, and of the latest
//! that have ended.
//!
//! Which file that is, only the platform knows: nobody else's words become a part of a path. Of a file, no
//! more is read than this platform's VM has written: there may be one of the same name that an earlier
//! platform has left behind.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base::sync::lock;
use tokio::sync::watch;
use types::VmIdentity;
use uuid::Uuid;

/// Most VMs whose logs are known: beyond that, those are forgotten that have ended first. Their files stay.
const MAX_LOGS: usize = 4096;

/// Within what time somebody who follows a log asks again.
const RETURN: Duration = Duration::from_millis(500);

/// Most bytes of a log that are read at once.
pub(super) const MAX_PIECE_BYTES: u64 = 1 << 20;

/// The log of one VM's console.
#[derive(Debug)]
pub(super) struct Log {
    id: Uuid,
    name: String,
    path: PathBuf,
    progress: watch::Sender<Progress>,
}

/// How far a log is.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    written_bytes: u64,
    /// Whether no more will come.
    is_over: bool,
}

/// A piece of a log.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// What it holds; at most 1 MiB.
    pub(crate) bytes: Vec<u8>,
    /// Where the next one begins, in bytes from the log's start.
    pub(crate) next: u64,
    /// Whether the VM has ended, and this is the end of its log.
    pub(crate) is_last: bool,
}

impl Log {
    /// Its file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes of it are in the file.
    pub(super) fn written_bytes(&self) -> u64 {
        self.progress.borrow().written_bytes
    }

    /// Says that so many more bytes are in the file.
    pub(super) fn has_grown(&self, bytes: u64) {
        self.progress.send_modify(|progress| progress.written_bytes += bytes);
    }

    /// Says that no more will come.
    pub(super) fn has_ended(&self) {
        self.progress.send_modify(|progress| progress.is_over = true);
    }

    /// Waits until there is something at an offset, or it is certain that there never will be.
    pub(super) async fn reaches(&self, from: u64) {
        let mut progress = self.progress.subscribe();
        // Who tells of it is there for as long as this is.
        drop(progress.wait_for(|progress| progress.written_bytes > from || progress.is_over).await);
    }

    /// Reads from an offset on.
    ///
    /// # Errors
    /// Where the file can't be read.
    pub(super) fn read(&self, from: u64) -> io::Result<Piece> {
        let Progress { written_bytes, is_over } = *self.progress.borrow();
        let left = written_bytes.saturating_sub(from);
        let count = left.min(MAX_PIECE_BYTES);
        let mut bytes = vec![0; usize::try_from(count).unwrap_or(0)];
        if count > 0 {
            File::open(&self.path)?.read_exact_at(&mut bytes, from)?;
        }
        Ok(Piece { bytes, next: from.saturating_add(count), is_last: is_over && count == left })
    }
}

/// Who follows logs. A platform that comes to its end lets them read that first.
#[derive(Debug, Default)]
struct Followers {
    state: Mutex<Following>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Following {
    /// How many are being answered.
    asking: usize,
    /// When the last one was told that there is more to come.
    comes_again: Option<Instant>,
}

/// Somebody who follows a log, while that is answered.
#[derive(Debug)]
pub(crate) struct Follower {
    followers: Arc<Followers>,
    /// Whether there is more to come.
    pub(crate) comes_again: bool,
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut state = lock(&self.followers.state);
        state.asking -= 1;
        if self.comes_again {
            state.comes_again = Some(Instant::now());
        }
        drop(state);
        self.followers.changed.notify_all();
    }
}

/// The logs of a platform, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Logs {
    known: Mutex<VecDeque<Arc<Log>>>,
    followers: Arc<Followers>,
}

impl Logs {
    /// Says that somebody follows a log.
    pub(super) fn follow(&self) -> Follower {
        lock(&self.followers.state).asking += 1;
        Follower { followers: Arc::clone(&self.followers), comes_again: false }
    }

    /// Waits until all who follow logs have read them to their ends, or don't come again; no longer than
    /// `limit`.
    pub(super) fn wait_read(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = lock(&self.followers.state);
        loop {
            let back_by = state.comes_again.map(|since| since + RETURN);
            let now = Instant::now();
            let until =
                if state.asking > 0 { Some(deadline) } else { back_by.filter(|back_by| *back_by > now) };
            let Some(until) = until.filter(|_| now < deadline) else { return };
            let left = until.min(deadline).saturating_duration_since(now);
            state =
                self.followers.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Adds that of a VM.
    pub(super) fn add(&self, vm: &VmIdentity, path: PathBuf) -> Arc<Log> {
        let progress = watch::Sender::new(Progress::default());
        let log = Arc::new(Log { id: vm.id, name: vm.name.clone(), path, progress });
        let mut logs = lock(&self.known);
        if logs.len() >= MAX_LOGS
            && let Some(oldest) = logs.iter().position(|log| log.progress.borrow().is_over)
        {
            logs.remove(oldest);
        }
        logs.push_back(Arc::clone(&log));
        log
    }

    /// That of a VM.
    pub(super) fn find(&self, id: Uuid) -> Option<Arc<Log>> {
        lock(&self.known).iter().rev().find(|log| log.id == id).cloned()
    }

    /// IDs and names of all VMs whose logs are known.
    pub(super) fn known(&self) -> Vec<(Uuid, String)> {
        lock(&self.known).iter().map(|log| (log.id, log.name.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use tempfile::NamedTempFile;

    use super::*;

    fn vm(id: u128) -> VmIdentity {
        VmIdentity {
            id: Uuid::from_u128(id),
            parent: Uuid::nil(),
            name: format!("web.{id}"),
            vm_type: "web".into(),
            index: 0,
            count: 0,
            generation: 0,
        }
    }

    #[test]
    fn a_log_is_read_from_where_the_last_piece_ended() {
        let mut file = NamedTempFile::new().unwrap();
        let log = Logs::default().add(&vm(1), file.path().to_owned());
        // What an earlier platform has left there is nobody's.
        file.write_all(b"old").unwrap();
        assert_eq!(log.read(0).unwrap(), Piece { bytes: Vec::new(), next: 0, is_last: false });
        fs::write(file.path(), "hello, world").unwrap();
        log.has_grown(5);
        assert_eq!(log.read(0).unwrap(), Piece { bytes: b"hello".into(), next: 5, is_last: false });
        log.has_grown(7);
        log.has_ended();
        assert_eq!(log.read(5).unwrap(), Piece { bytes: b", world".into(), next: 12, is_last: true });
        for beyond in [12, 13, u64::MAX] {
            assert_eq!(log.read(beyond).unwrap(), Piece { bytes: Vec::new(), next: beyond, is_last: true });
        }
    }

    #[test]
    fn a_long_log_is_read_in_pieces() {
        let file = NamedTempFile::new().unwrap();
        let all: Vec<u8> = (0..=u8::MAX).cycle().take(5 << 19).collect();
        fs::write(file.path(), &all).unwrap();
        let log = Logs::default().add(&vm(1), file.path().to_owned());
        log.has_grown(all.len() as u64);
        log.has_ended();
        let (mut read, mut from) = (Vec::new(), 0);
        loop {
            let piece = log.read(from).unwrap();
            assert!(piece.bytes.len() as u64 <= MAX_PIECE_BYTES);
            read.extend(piece.bytes);
            from = piece.next;
            if piece.is_last {
                break;
            }
        }
        assert!(read == all);
    }

    #[tokio::test]
    async fn who_waits_hears_of_what_comes_and_of_the_end() {
        let log = Logs::default().add(&vm(1), PathBuf::new());
        let (grown, ended) = (log.reaches(4), log.reaches(5));
        let write = async {
            log.has_grown(4);
            tokio::task::yield_now().await;
            log.has_grown(1);
        };
        tokio::join!(grown, write);
        let end = async { log.has_ended() };
        tokio::join!(ended, end);
        log.reaches(u64::MAX).await;
    }

    #[test]
    fn a_log_that_is_gone_is_an_error() {
        let file = NamedTempFile::new().unwrap();
        let log = Logs::default().add(&vm(1), file.path().to_owned());
        log.has_grown(1);
        assert!(log.read(0).is_err());
    }

    #[test]
    fn of_too_many_those_are_forgotten_that_have_ended_first() {
        let logs = Logs::default();
        let first = logs.add(&vm(0), PathBuf::new());
        for id in 1..MAX_LOGS as u128 {
            logs.add(&vm(id), PathBuf::new()).has_ended();
        }
        logs.add(&vm(5000), PathBuf::new());
        assert!(logs.find(Uuid::from_u128(1)).is_none());
        assert!(Arc::ptr_eq(&logs.find(Uuid::from_u128(0)).unwrap(), &first));
        assert_eq!(logs.known().len(), MAX_LOGS);
    }
}
