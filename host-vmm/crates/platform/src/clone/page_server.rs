//! Page server and page client: the two sides of a lazy clone's memory, which comes while the clone runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use api::{
    client::{self, Content, PooledClient},
    steady::LEAST_RATE,
};
use base::sync::lock;
use capsule::{
    self, Capsule, Description, Digests, Header, Manifest,
    chunk_stream::{self, ChunkDecoder},
};
use http_body_util::channel::{Channel, Sender};
use hyper::{Method, body::Bytes};
use types::PAGE_BYTES;
use uuid::Uuid;
use vmm::{
    arch::layout::{self, Gpa},
    memory::{Image, WorkingSet},
};

use super::{
    LEASE, Need,
    postcopy::Positions,
    rate_limiter::RateLimiter,
    source::{CurrentRetryPolicy, Target},
};

/// Most chunks that are had at once.
pub const MAX_AT_ONCE: usize = 64;

/// Bytes of records from which on they are sent, and not kept until there are more of them.
const PIECE_BYTES: usize = 64 << 10;

/// How long a source has to look at all of a memory.
const LOOKED_AT: Duration = Duration::from_secs(300);

/// How long a source keeps a memory for a target that does not ask for it.
const KEPT: Duration = Duration::from_secs(60);

/// Pages from the start of the guest's memory that are sent before the clone runs: a KVM that emulates page
/// tables can't wait for the first one.
const FIRST_PAGES: u64 = 1;

/// Why memory can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source can't be asked, or says no.
    #[error(transparent)]
    Source(#[from] client::Error),
    /// It says something else than it should.
    #[error("the source has sent something else")]
    Answer(#[source] io::Error),
    /// What it sends can't be used.
    #[error("what the source has sent can't be used")]
    Take(#[source] Box<super::postcopy::Error>),
}

/// Page client: the target's side of one connection to the source.
#[derive(Debug)]
pub struct PageClient(Target);

impl PageClient {
    /// Has the memory of a clone from its source, for as long as `retry_policy` says so.
    pub fn new(source: PooledClient, id: Uuid, retry_policy: CurrentRetryPolicy) -> Self {
        Self(Target::at(source, format!("/v1/supplies/{id}"), retry_policy))
    }

    /// Has some chunks, and gives each of them to `take`. They come before others where somebody waits for
    /// them.
    ///
    /// # Errors
    /// [`Error`].
    pub fn fetch(
        &mut self,
        chunks: &[u32],
        urgent: bool,
        mut take: impl FnMut(u32, &[u8]) -> Result<(), super::postcopy::Error>,
    ) -> Result<(), Error> {
        let mut needs = chunks.chunks(MAX_AT_ONCE).map(|chunks| Need { chunks: chunks.to_vec(), urgent });
        needs.try_for_each(|need| self.fetch_at_once(&need, &mut take))
    }

    fn fetch_at_once(
        &mut self,
        need: &Need,
        take: &mut impl FnMut(u32, &[u8]) -> Result<(), super::postcopy::Error>,
    ) -> Result<(), Error> {
        let most = chunk_stream::MAX_BYTES.saturating_mul(need.chunks.len() as u64);
        let answer = self.0.retry_idempotent(LEASE, |connection, path| {
            connection.ask_long(Method::POST, &format!("{path}/chunks"), Content::json(need)?, most)
        })?;
        let (mut decoder, mut failure) = (ChunkDecoder::default(), None);
        let mut awaited: BTreeSet<u32> = need.chunks.iter().copied().collect();
        let taken = decoder.push(&answer, |chunk, data| {
            if !awaited.remove(&chunk) {
                return Err(io::Error::other(format!("nobody has asked for the chunk {chunk}")));
            }
            take(chunk, data).map_err(|error| {
                failure = Some(error);
                io::ErrorKind::InvalidData.into()
            })
        });
        match (failure, taken.and_then(|()| decoder.finish())) {
            (Some(error), _) => Err(Error::Take(Box::new(error))),
            (None, Ok(())) if !awaited.is_empty() => {
                let why = format!("{} of the chunks that were asked for did not come", awaited.len());
                Err(Error::Answer(io::Error::other(why)))
            }
            (None, ended) => ended.map_err(Error::Answer),
        }
    }

    /// Asks for the digests of all of a memory whose layers are known.
    ///
    /// # Errors
    /// [`Error::Source`], or [`Error::Answer`].
    pub fn manifest(&mut self, sparse: &Manifest) -> Result<Manifest, Error> {
        let most = sparse.most_bytes();
        let answer = self.0.retry_idempotent(LEASE, |connection, path| {
            connection.set_timeout(LOOKED_AT);
            connection.ask_long(Method::GET, &format!("{path}/manifest"), Content::none(), most)
        })?;
        let manifest =
            capsule::codec::decode(&answer).map_err(|error| Error::Answer(io::Error::other(error)))?;
        Ok(manifest)
    }

    /// Says that all of it is there.
    pub fn is_done(&mut self) {
        let told = self.0.retry_idempotent(Duration::ZERO, |connection, path| {
            connection.ask(Method::DELETE, path, Content::none()).map(drop)
        });
        if let Err(error) = told {
            tracing::debug!(%error, "a source keeps a memory for a while that nobody needs any more");
        }
    }
}

/// Page server: a memory that is sent while copies of it run already.
#[derive(Debug)]
pub struct PageServer {
    /// Name of the platform that may have it.
    target: String,
    image: Image,
    description: Description,
    /// Header and description, as they travel: without what is in the memory.
    head: Bytes,
    positions: Positions,
    files: Vec<Arc<File>>,
    rate_limiter: RateLimiter,
    /// What all of it is, once somebody has wanted to know that.
    manifest: Mutex<Option<Bytes>>,
    began: Instant,
    /// Longest time that it is kept, whatever is asked: the time that all of it takes at the least rate, and
    /// that of a target that does not ask.
    longest: Duration,
    asked: Mutex<Instant>,
}

/// Reason for which a memory is not kept for its target any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expiry {
    /// Nobody has asked for it in a while.
    Idle,
    /// All of it could have been sent, however slowly.
    Late,
}

impl PageServer {
    /// The memory of an image, for one other platform, which gets no more of it within a second than
    /// `bandwidth`.
    ///
    /// # Errors
    /// [`capsule::Error`].
    pub fn of(capsule: &Capsule, target: &str, bandwidth: Option<u64>) -> Result<Self, capsule::Error> {
        let (description, image) = capsule.describe_sparse()?;
        let bytes = description.to_bytes()?;
        let header = Header::new(false, 0, &bytes);
        let file_bytes = description.memory.file_bytes();
        let files = image.layers().iter().map(|layer| Arc::clone(&layer.file)).collect();
        Ok(Self {
            target: target.to_owned(),
            head: [header.to_bytes().as_slice(), &bytes].concat().into(),
            positions: Positions::of(&description.memory),
            description,
            image,
            files,
            rate_limiter: RateLimiter::new(bandwidth),
            manifest: Mutex::default(),
            began: Instant::now(),
            longest: KEPT.saturating_add(Duration::from_secs(file_bytes / LEAST_RATE)),
            asked: Mutex::new(Instant::now()),
        })
    }

    /// Header and description, as they travel.
    pub fn head(&self) -> &Bytes {
        &self.head
    }

    /// Name of the platform that may have it.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// Reason to keep it no longer, if there is one.
    fn expiry(&self, is_in_use: bool, now: Instant) -> Option<Expiry> {
        if now.saturating_duration_since(self.began) >= self.longest {
            return Some(Expiry::Late);
        }
        let is_idle = now.saturating_duration_since(*lock(&self.asked)) >= KEPT;
        (is_idle && !is_in_use).then_some(Expiry::Idle)
    }

    /// The chunks that are sent before the clone runs: the first ones, what vCPUs need to go on, and those of
    /// a working set.
    pub fn first_chunks(&self, working_set: Option<&WorkingSet>) -> Vec<u32> {
        let first = (0, FIRST_PAGES);
        let vcpus = self.description.machine.vcpus.iter();
        let next = vcpus.flat_map(|vcpu| vcpu.next_addresses(|gpa| self.word(gpa)));
        let next = next.filter_map(|gpa| Some((layout::ram_page(Gpa(gpa))?, 1)));
        let runs =
            std::iter::once(first).chain(next).chain(working_set.into_iter().flat_map(WorkingSet::runs));
        let pages = runs.flat_map(|(page, pages)| page..page.saturating_add(pages).min(self.image.pages()));
        let mut chunks: Vec<u32> =
            pages.filter_map(|page| self.positions.of_guest_page(&self.image, page)).collect();
        chunks.sort_unstable();
        chunks.dedup();
        chunks
    }

    /// The 64 bits at an address of the guest's memory that they do not cross a page from.
    fn word(&self, gpa: u64) -> Option<u64> {
        let (layer, page) = self.image.find(layout::ram_page(Gpa(gpa))?)?;
        let mut word = [0; 8];
        self.files[layer].read_exact_at(&mut word, page * PAGE_BYTES + gpa % PAGE_BYTES).ok()?;
        Some(u64::from_le_bytes(word))
    }

    /// Appends a chunk to others, as it travels.
    fn append(&self, position: u32, records: &mut Vec<u8>) -> io::Result<()> {
        let (layer, number) = self.positions.find(position).ok_or(io::ErrorKind::NotFound)?;
        let (layer, file) = (&self.description.memory.layers[layer], &self.files[layer]);
        chunk_stream::append(records, position, |data| layer.read_unknown(file, number, data))
    }

    /// A chunk as it travels, once it may be sent.
    ///
    /// # Errors
    /// Where it does not exist, or can't be read.
    pub fn record_in_turn(&self, position: u32) -> io::Result<Bytes> {
        let mut record = Vec::new();
        self.append(position, &mut record)?;
        self.rate_limiter.wait(record.len() as u64);
        Ok(record.into())
    }

    /// Some chunks, for a target that asks for them, each as soon as it may be sent.
    ///
    /// # Errors
    /// Where there is one that does not exist, or they are too many.
    pub fn chunks(self: Arc<Self>, Need { chunks, urgent }: Need) -> io::Result<Channel<Bytes, io::Error>> {
        if chunks.len() > MAX_AT_ONCE {
            return Err(io::Error::other(format!("more than {MAX_AT_ONCE} chunks at once")));
        }
        if chunks.iter().any(|chunk| self.positions.find(*chunk).is_none()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        *lock(&self.asked) = Instant::now();
        let (mut sender, body) = Channel::new(1);
        tokio::spawn(async move {
            if let Err(error) = self.send(&chunks, urgent, &mut sender).await {
                sender.abort(error);
            }
        });
        Ok(body)
    }

    async fn send(
        &self,
        chunks: &[u32],
        urgent: bool,
        body: &mut Sender<Bytes, io::Error>,
    ) -> io::Result<()> {
        let mut records = Vec::new();
        for (chunk, left) in chunks.iter().zip((0..chunks.len()).rev()) {
            self.append(*chunk, &mut records)?;
            if records.len() >= PIECE_BYTES || left == 0 {
                self.rate_limiter.wait_for_turn(records.len() as u64, urgent).await;
                // For a target that takes nothing of what it has asked for, it is not kept either.
                let taken =
                    tokio::time::timeout(KEPT, body.send_data(std::mem::take(&mut records).into())).await;
                taken.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)?;
                *lock(&self.asked) = Instant::now();
            }
        }
        Ok(())
    }

    /// What all of it is: each chunk is looked at for that, once.
    ///
    /// # Errors
    /// [`capsule::Error`].
    pub fn manifest(&self, digests: &Digests) -> Result<Bytes, capsule::Error> {
        // Who asks again because it takes long waits for the first one.
        let mut manifest = lock(&self.manifest);
        let found = match manifest.take() {
            Some(found) => found,
            None => capsule::codec::encode(&Manifest::of(&self.image, digests)?)?.into(),
        };
        *manifest = Some(found.clone());
        *lock(&self.asked) = Instant::now();
        Ok(found)
    }
}

/// Page servers of a platform: the memories that it still sends.
#[derive(Debug, Default)]
pub struct PageServers {
    by_id: Mutex<BTreeMap<Uuid, Arc<PageServer>>>,
    changed: Condvar,
}

impl PageServers {
    /// Adds one, for the clone with this ID.
    pub fn add(&self, id: Uuid, page_server: &Arc<PageServer>) {
        lock(&self.by_id).insert(id, Arc::clone(page_server));
    }

    /// The one for a clone.
    pub fn find(&self, id: Uuid) -> Option<Arc<PageServer>> {
        lock(&self.by_id).get(&id).cloned()
    }

    /// Lets go of one.
    pub fn remove(&self, id: Uuid) {
        // With the last one that has it, its memory is given back, which takes a while.
        let removed = lock(&self.by_id).remove(&id);
        self.changed.notify_all();
        drop(removed);
    }

    /// Lets go of all.
    pub fn close(&self) {
        let removed = std::mem::take(&mut *lock(&self.by_id));
        self.changed.notify_all();
        drop(removed);
    }

    /// Waits until there is none.
    pub fn wait_empty(&self) {
        let by_id = lock(&self.by_id);
        drop(
            self.changed.wait_while(by_id, |by_id| !by_id.is_empty()).unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Lets go of those that nobody has asked for in a while, and nobody works with; and of those that their
    /// targets have not got within the longest time. To be called now and then.
    pub fn sweep(&self) {
        self.sweep_at(Instant::now());
    }

    fn sweep_at(&self, now: Instant) {
        let expiry =
            |page_server: &Arc<PageServer>| page_server.expiry(Arc::strong_count(page_server) > 1, now);
        let evicted: Vec<_> =
            lock(&self.by_id).extract_if(.., |_, page_server| expiry(page_server).is_some()).collect();
        self.changed.notify_all();
        for (clone, page_server) in &evicted {
            let platform = &page_server.target;
            match page_server.expiry(false, now) {
                Some(Expiry::Late) => tracing::warn!(
                    %clone,
                    platform,
                    longest = ?page_server.longest,
                    "the memory of a clone is not kept for it any more: it has not got all of it within the longest time"
                ),
                _ => tracing::warn!(
                    %clone,
                    platform,
                    kept = ?KEPT,
                    "the memory of a clone is not kept for it any more: it has not asked for any of it in a while"
                ),
            }
        }
        drop(evicted);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capsule::samples::capsule;

    #[test]
    fn a_memory_is_not_kept_for_ever_for_a_target_that_asks_now_and_then() {
        let (page_servers, id) = (PageServers::default(), Uuid::from_u128(1));
        let add = || {
            let page_server = Arc::new(PageServer::of(&capsule(&[]), "b", None).unwrap());
            page_servers.add(id, &page_server);
            page_server
        };
        let page_server = add();
        let (began, longest) = (page_server.began, page_server.longest);
        assert_eq!(longest, KEPT + Duration::from_secs(40 * PAGE_BYTES / LEAST_RATE));
        let moment = Duration::from_millis(1);
        let last = began + longest - moment;
        // Somebody works with it, or has just asked.
        page_servers.sweep_at(last);
        *lock(&page_server.asked) = last;
        drop(page_server);
        page_servers.sweep_at(last);
        let page_server = page_servers.find(id).expect("it is kept");
        page_servers.sweep_at(began + longest);
        assert!(page_servers.find(id).is_none(), "it has had its time");
        drop(page_server);
        // Without anybody who asks, it is not kept for so long.
        let asked = *lock(&add().asked);
        page_servers.sweep_at(asked + KEPT - moment);
        assert!(page_servers.find(id).is_some());
        page_servers.sweep_at(asked + KEPT);
        assert!(page_servers.find(id).is_none());
    }
}
