//! The side that sends clones out.

use std::{
    fmt, io, iter,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use api::{
    Copied,
    client::{self, Connection, Content, GoesOn, PooledClient},
};
use base::{sync::lock, text::Reason};
use capsule::{self, ChunkSource};
use hyper::{Method, StatusCode, body::Bytes};
use uuid::Uuid;
use vmm::memory::WorkingSet;

use super::{COMMIT_LIMIT, LEASE, Missing, Order, Stage, page_server::PageServer, rate_limiter::RateLimiter};
use crate::{launcher::LAUNCH_TIMEOUT, others::SendSettings};

/// How long the source waits before it tries again to reach its target, at first and at most.
const FIRST_DELAY: Duration = Duration::from_millis(20);
const MOST_DELAY: Duration = Duration::from_secs(1);

/// How often it asks whether a target is ready that is being prepared.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How long a target may prepare copies: as long as these may take until they are ready there, and the time
/// of a lease.
const PREPARE_LIMIT: Duration = LAUNCH_TIMEOUT.saturating_add(LEASE);

/// Why a clone is not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The target can't be asked, or says no.
    #[error(transparent)]
    Target(#[from] client::Error),
    /// The image can't be described.
    #[error("can't make a capsule of the image")]
    Capsule(#[from] capsule::Error),
    /// The target is elsewhere than it should be.
    #[error("the target says that the clone is {0}")]
    Stage(Reason),
    /// It takes too long there.
    #[error(
        "the target has prepared the copies for longer than {PREPARE_LIMIT:?} and not said that they wait: the clone is \
         called off; see the log there, or send it to another platform"
    )]
    Slow,
    /// It was undone there.
    #[error("the target has undone the clone: {0}")]
    Aborted(Reason),
    /// A thread could not be started, or failed.
    #[error("can't send on several connections")]
    Thread(#[source] io::Error),
    /// The fork was called off meanwhile.
    #[error("the fork was called off")]
    CalledOff,
    /// Nobody knows whether the copies run.
    #[error(
        "the target was told to let the copies run, and it is not known whether they do: it could not be reached any \
         more, has not decided, does not name all of them, or has forgotten the clone; `host-vmm ps` tells it there"
    )]
    Unknown(#[source] Option<client::Error>),
}

/// What is told of a clone while it is sent.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of memory that are to be sent.
    wanted_bytes: AtomicU64,
    /// Bytes of memory that were sent.
    sent_bytes: AtomicU64,
    /// Bytes of memory that need not be sent, since the target has them.
    spared_bytes: AtomicU64,
}

impl Progress {
    /// Bytes that are to be sent, that were, and that need not be.
    pub fn bytes(&self) -> [u64; 3] {
        [&self.wanted_bytes, &self.sent_bytes, &self.spared_bytes].map(|bytes| bytes.load(Ordering::Relaxed))
    }
}

/// Time that a target has to say that it has undone a clone.
const ABORT_TIMEOUT: Duration = Duration::from_secs(1);

/// How often something is begun anew that has gone on for longer than it may take to be heard.
const MAX_ANEW: u32 = 3;

/// How often a target is told that its source is still there, while its copies wait.
const RENEWAL: Duration = Duration::from_secs(LEASE.as_secs() / 4);

/// What the source does when a request about a clone fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RetryPolicy {
    /// It retries the request.
    Retry,
    /// It gives the clone up: either side is taken for gone by its cluster.
    FailFast,
    /// It asks for nothing more: the clone was called off.
    Cancelled,
}

impl From<bool> for RetryPolicy {
    fn from(is_wanted: bool) -> Self {
        if is_wanted { Self::Retry } else { Self::Cancelled }
    }
}

/// Retry policy at present: it changes when a fork is called off, or a side is cut off from its cluster.
pub type CurrentRetryPolicy = Arc<dyn Fn() -> RetryPolicy + Send + Sync>;

/// A target, which is asked again where it can't be reached.
pub(super) struct Target {
    client: PooledClient,
    path: String,
    retry_policy: CurrentRetryPolicy,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("client", &self.client)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// The one at the end of this link, which is asked for what is below `path`.
    pub(super) fn at(client: PooledClient, path: String, retry_policy: CurrentRetryPolicy) -> Self {
        Self { client, path, retry_policy }
    }

    /// Retries an idempotent request until the target accepts or refuses it, `limit` is over, or the retry
    /// policy ends it. A request that takes long, and breaks off in the middle, has its limit from there on;
    /// but not for ever. A clone that was called off is not waited for in the middle of an answer either.
    pub(super) fn retry_idempotent<T>(
        &self,
        limit: Duration,
        ask: impl FnMut(&mut Connection, &str) -> Result<T, client::Error>,
    ) -> Result<T, client::Error> {
        self.retry_idempotent_if(client::Error::may_pass, limit, MAX_ANEW, ask)
    }

    /// Like `retry_idempotent`, where `may_pass` tells which errors are worth a retry, and a request that has
    /// gone on for as long as the limit is begun anew so often.
    fn retry_idempotent_if<T>(
        &self,
        may_pass: impl Fn(&client::Error) -> bool,
        limit: Duration,
        mut anew: u32,
        mut ask: impl FnMut(&mut Connection, &str) -> Result<T, client::Error>,
    ) -> Result<T, client::Error> {
        let (mut began, mut delay) = (Instant::now(), FIRST_DELAY);
        let retry_policy = Arc::clone(&self.retry_policy);
        let goes_on: GoesOn = Arc::new(move || retry_policy() != RetryPolicy::Cancelled);
        loop {
            let attempt = Instant::now();
            let error = match self.client.ask_while(&goes_on, |connection| ask(connection, &self.path)) {
                Err(error) if may_pass(&error) => error,
                answer => return answer,
            };
            if attempt.elapsed() >= limit && anew > 0 {
                (began, anew) = (Instant::now(), anew - 1);
            }
            if began.elapsed() + delay >= limit || (self.retry_policy)() != RetryPolicy::Retry {
                return Err(error);
            }
            thread::sleep(delay);
            delay = (delay * 2).min(MOST_DELAY);
        }
    }

    /// Fails where the clone was called off.
    fn check_cancelled(&self) -> Result<(), Error> {
        if (self.retry_policy)() == RetryPolicy::Cancelled { Err(Error::CalledOff) } else { Ok(()) }
    }

    /// Tells it what the capsule says of itself, and has it say what it lacks.
    fn describe(&self, head: &Bytes) -> Result<Missing, client::Error> {
        self.retry_idempotent(LEASE, |connection, path| {
            describe(connection, path, iter::once(Ok(head.clone())))
        })
    }

    fn stage(&self, limit: Duration) -> Result<Stage, client::Error> {
        self.retry_idempotent(limit, |connection, path| {
            connection.ask_for(Method::GET, path, Content::none())
        })
    }

    /// Has it launch the copies, and waits until they are ready, for as long as that may take and they are
    /// wanted.
    fn prepare(&self) -> Result<(), Error> {
        let began = Instant::now();
        let mut stage = self.retry_idempotent(LEASE, |connection, path| {
            connection.ask_for(Method::POST, &format!("{path}/prepare"), Content::none())
        })?;
        loop {
            match stage {
                Stage::Prepared | Stage::Committed { .. } => return Ok(()),
                Stage::Aborted { why } => return Err(Error::Aborted(why)),
                Stage::Preparing if began.elapsed() >= PREPARE_LIMIT => return Err(Error::Slow),
                Stage::Preparing => thread::sleep(POLL_INTERVAL),
                Stage::Reserved | Stage::Receiving => {
                    return Err(Error::Stage(Reason::of(format_args!("{stage:?}"))));
                }
            }
            self.check_cancelled()?;
            stage = self.stage(LEASE)?;
        }
    }
}

fn describe(
    connection: &mut Connection,
    path: &str,
    capsule: impl Iterator<Item = io::Result<Bytes>> + Send + 'static,
) -> Result<Missing, client::Error> {
    let capsule = Content::Pieces(Box::new(capsule));
    let missing: Missing = connection.ask_for(Method::PUT, &format!("{path}/capsule"), capsule)?;
    if missing.is_sound() {
        Ok(missing)
    } else {
        Err(connection.answer_error("it misses what can't be missing"))
    }
}

/// A clone whose copies wait at their target until they may run. Dropping it ends them.
#[derive(Debug)]
#[must_use]
pub struct Prepared {
    id: Uuid,
    target: Target,
    /// What the target asks for once the copies run: it is not forgotten until then.
    page_server: Option<Arc<PageServer>>,
    /// When the target has last heard of it.
    last_contact: Instant,
    is_decided: bool,
}

/// Sends an image to a target, and has copies of it launched there, which wait.
///
/// # Errors
/// [`Error`]: nothing is left of it at the target, or will be once that has not heard of it for the time of a
/// lease.
pub fn send(
    client: PooledClient,
    id: Uuid,
    order: &Order,
    chunk_source: &Arc<ChunkSource>,
    settings: &SendSettings,
    progress: &Arc<Progress>,
    retry_policy: CurrentRetryPolicy,
) -> Result<Prepared, Error> {
    let mut prepared = Prepared::order(client, id, order, retry_policy)?;
    let target = &prepared.target;
    target.check_cancelled()?;
    let Missing { chunks } = target.describe(chunk_source.head())?;
    send_memory(target, chunk_source, chunks, settings, progress)?;
    target.check_cancelled()?;
    target.prepare()?;
    prepared.last_contact = Instant::now();
    Ok(prepared)
}

/// Has copies of an image launched at a target, which wait, before all of their memory is there: it will be
/// had from here.
///
/// # Errors
/// As [`send`].
pub fn send_lazily(
    client: PooledClient,
    id: Uuid,
    order: &Order,
    page_server: &Arc<PageServer>,
    working_set: Option<&WorkingSet>,
    retry_policy: CurrentRetryPolicy,
) -> Result<Prepared, Error> {
    let mut prepared = Prepared::order(client, id, order, retry_policy)?;
    prepared.page_server = Some(Arc::clone(page_server));
    let target = &prepared.target;
    let first = page_server.first_chunks(working_set);
    target.check_cancelled()?;
    target.retry_idempotent(LEASE, |connection, path| {
        let (head, page_server, retry_policy) =
            (page_server.head().clone(), Arc::clone(page_server), Arc::clone(&target.retry_policy));
        let chunks = first.clone().into_iter().map(move |chunk| {
            check_cancelled(&retry_policy)?;
            page_server.record_in_turn(chunk)
        });
        describe(connection, path, iter::once(Ok(head)).chain(chunks))
    })?;
    target.check_cancelled()?;
    target.prepare()?;
    prepared.last_contact = Instant::now();
    Ok(prepared)
}

impl Prepared {
    /// Has a target keep room for a clone.
    fn order(
        client: PooledClient,
        id: Uuid,
        order: &Order,
        retry_policy: CurrentRetryPolicy,
    ) -> Result<Self, Error> {
        let target = Target::at(client, format!("/v1/clones/{id}"), retry_policy);
        target.check_cancelled()?;
        let prepared =
            Self { id, target, page_server: None, last_contact: Instant::now(), is_decided: false };
        let stage: Stage = prepared.target.retry_idempotent(LEASE, |connection, path| {
            connection.ask_for(Method::PUT, path, Content::json(order)?)
        })?;
        match stage {
            Stage::Reserved | Stage::Receiving => Ok(prepared),
            stage => Err(Error::Stage(Reason::of(format_args!("{stage:?}")))),
        }
    }

    /// The clone's ID.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Tells the target now and then that its source is still there, and says whether the copies still wait
    /// there. To be called often.
    pub fn is_waiting(&mut self) -> bool {
        if self.last_contact.elapsed() < RENEWAL {
            return true;
        }
        self.last_contact = Instant::now();
        match self.target.stage(Duration::ZERO) {
            Ok(stage) => matches!(stage, Stage::Prepared),
            // It may be there again before its lease is over.
            Err(error) => error.may_pass(),
        }
    }

    /// Lets the copies run, and says who they are. From the first attempt on there is no way back: it asks
    /// until it is certain.
    ///
    /// # Errors
    /// [`Error::Aborted`] where none of them runs, [`Error::Unknown`] where nobody can tell.
    pub fn commit(mut self) -> Result<Vec<Copied>, Error> {
        self.is_decided = true;
        self.target.retry_policy = Arc::new(|| RetryPolicy::Retry);
        // Whoever can't be trusted or understood is not the target: only that knows what has come of the
        // clone.
        let is_open = |error: &client::Error| !matches!(error, client::Error::Refused { .. });
        let began = Instant::now();
        loop {
            let left = COMMIT_LIMIT.saturating_sub(began.elapsed());
            let stage = self.target.retry_idempotent_if(is_open, left, 0, |connection, path| {
                connection.ask_for(Method::POST, &format!("{path}/commit"), Content::none())
            });
            match stage {
                Ok(Stage::Committed { vms }) => return Ok(vms),
                Ok(Stage::Aborted { why }) => return Err(Error::Aborted(why)),
                // Somebody's earlier question is being answered.
                Ok(Stage::Preparing) if began.elapsed() < COMMIT_LIMIT => thread::sleep(POLL_INTERVAL),
                Ok(_) => return Err(Error::Unknown(None)),
                Err(client::Error::Refused { status, why }) if is_undone(status) => {
                    return Err(Error::Aborted(why));
                }
                Err(error) => return Err(Error::Unknown(Some(error))),
            }
        }
    }
}

/// Whether a target that refuses to commit with this status says that none of the copies runs: it has tried
/// to, or has not come so far. Else, its answer to an earlier question may have been lost: one that knows no
/// such clone has forgotten what became of it, or was started anew.
fn is_undone(status: StatusCode) -> bool {
    status == StatusCode::CONFLICT || status.is_server_error()
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // Whom this does not reach undoes it by itself, and nobody waits for long to find that out.
        if self.is_decided || (self.target.retry_policy)() == RetryPolicy::FailFast {
            return;
        }
        let told = self.target.client.ask(|connection| {
            connection.set_timeout(ABORT_TIMEOUT);
            connection.ask(Method::DELETE, &self.target.path, Content::none())
        });
        match told {
            Ok(_) | Err(client::Error::Refused { status: StatusCode::NOT_FOUND, .. }) => {}
            Err(error) => tracing::debug!(%error, "a target was not told that a clone was called off"),
        }
    }
}

/// Fails where the clone was called off, so that no more of it is sent.
fn check_cancelled(retry_policy: &CurrentRetryPolicy) -> io::Result<()> {
    if retry_policy() == RetryPolicy::Cancelled {
        Err(io::Error::other("the clone was called off"))
    } else {
        Ok(())
    }
}

/// What records were in that were sent, for those to come: new memory has to be made page by page.
type Buffers = Arc<Mutex<Vec<Vec<u8>>>>;

/// A record on its way.
struct Sent {
    record: Vec<u8>,
    buffers: Buffers,
}

impl AsRef<[u8]> for Sent {
    fn as_ref(&self) -> &[u8] {
        &self.record
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        lock(&self.buffers).push(std::mem::take(&mut self.record));
    }
}

/// Chunks on their way, made while they are sent.
struct Pieces {
    chunk_source: Arc<ChunkSource>,
    share: std::vec::IntoIter<u32>,
    rate_limiter: Arc<RateLimiter>,
    progress: Arc<Progress>,
    retry_policy: CurrentRetryPolicy,
    buffers: Buffers,
}

impl Iterator for Pieces {
    type Item = io::Result<Bytes>;

    fn next(&mut self) -> Option<io::Result<Bytes>> {
        let number = self.share.next()?;
        if let Err(error) = check_cancelled(&self.retry_policy) {
            return Some(Err(error));
        }
        let bytes = self.chunk_source.data_bytes(number);
        self.rate_limiter.wait(bytes);
        self.progress.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
        let mut record = lock(&self.buffers).pop().unwrap_or_default();
        record.clear();
        let made = self.chunk_source.record(number, &mut record);
        Some(made.map(|()| Bytes::from_owner(Sent { record, buffers: Arc::clone(&self.buffers) })))
    }
}

/// Sends chunks on several connections, each its own share.
fn send_memory(
    target: &Target,
    chunk_source: &Arc<ChunkSource>,
    wanted: Vec<Range<u32>>,
    settings: &SendSettings,
    progress: &Arc<Progress>,
) -> Result<(), Error> {
    let count = chunk_source.chunks();
    let wanted: Vec<u32> =
        wanted.into_iter().flat_map(|range| range.start.min(count)..range.end.min(count)).collect();
    let wanted_bytes: u64 = wanted.iter().map(|chunk| chunk_source.data_bytes(*chunk)).sum();
    progress.wanted_bytes.store(wanted_bytes, Ordering::Relaxed);
    progress.spared_bytes.store(chunk_source.memory_bytes().saturating_sub(wanted_bytes), Ordering::Relaxed);
    if wanted.is_empty() {
        return Ok(());
    }
    let rate_limiter = Arc::new(RateLimiter::new(settings.bandwidth));
    let shares = wanted.chunks(wanted.len().div_ceil(settings.connections.max(1)));
    thread::scope(|scope| {
        let senders = shares.map(|share| {
            let (rate_limiter, retry_policy) = (&rate_limiter, &target.retry_policy);
            thread::Builder::new().name("clone".into()).spawn_scoped(scope, move || {
                let (mut rest, mut again) = (share.to_vec(), false);
                target.retry_idempotent(LEASE, |connection, path| {
                    // What has come before the connection broke need not come again.
                    if std::mem::replace(&mut again, true) {
                        let missing =
                            describe(connection, path, iter::once(Ok(chunk_source.head().clone())))?;
                        rest.retain(|chunk| missing.has(*chunk));
                    }
                    let pieces = Pieces {
                        chunk_source: Arc::clone(chunk_source),
                        share: rest.clone().into_iter(),
                        rate_limiter: Arc::clone(rate_limiter),
                        progress: Arc::clone(progress),
                        retry_policy: Arc::clone(retry_policy),
                        buffers: Buffers::default(),
                    };
                    connection.ask(Method::POST, &format!("{path}/chunks"), Content::Pieces(Box::new(pieces)))
                })
            })
        });
        let senders: Vec<_> = senders.collect::<io::Result<_>>().map_err(Error::Thread)?;
        senders.into_iter().try_for_each(|sender| Ok(joined(sender)?.map(drop)?))
    })
}

/// What a thread has to say.
fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> Result<T, Error> {
    thread.join().map_err(|_| Error::Thread(io::Error::other("a thread panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_undone_is_taken_for_that() {
        for undone in [409, 500, 503] {
            assert!(is_undone(StatusCode::from_u16(undone).unwrap()), "{undone}");
        }
        for unknown in [400, 403, 404, 413, 429] {
            assert!(!is_undone(StatusCode::from_u16(unknown).unwrap()), "{unknown}");
        }
    }
}
