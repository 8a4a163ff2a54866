//! Copies of a fork that go to other platforms.
//!
//! To the parent, whoever sends them is one more child for each: it takes the state where all meet, says that
//! they are ready to run once they wait at their targets, and has them run when the parent has committed.

use std::{fs::File, sync::Arc, thread, time::Duration};

use api::{Copied, ForkedVm, Placement};
use base::{clock::wall_clock_ns, error::chain, text::Reason, threads};
use capsule::{Capsule, ChunkSource, ImageMetadata};
use cluster::placement::{Claim, Wish};
use node::fork::rendezvous::Rendezvous;
use types::{CopySpec, Locality, new_id};
use vmfork_abi::{ErrorCode, Location};
use vmm::memory::WorkingSet;

use super::{Fork, Target};
use crate::{
    Error, Platform,
    clone::{
        self,
        outgoing::short,
        page_server::PageServer,
        source::{self, CurrentRetryPolicy, RetryPolicy},
    },
    events::Event,
    launcher::{Launch, list, ordered},
    node_server::Node,
    others::Cluster,
};

/// How many platforms are tried for copies that could not be launched where they were to go.
const MAX_TRIES: usize = 3;

/// How long an image that was sent may take to be sealed, for its digests to be remembered.
const LEARNT_WITHIN: Duration = Duration::from_secs(10);

/// Copies for one other platform.
#[derive(Debug)]
pub(crate) struct RemoteCopies {
    /// Its name.
    platform: String,
    slots: Vec<CopySpec>,
    /// What is counted there until it knows of them itself; none where it was not chosen by its load.
    claim: Option<Claim>,
}

/// Where the copies of a fork go.
#[derive(Debug, Default)]
pub(crate) struct PlacementResult {
    /// Those that stay here.
    pub(crate) here: Vec<CopySpec>,
    /// Those that go away.
    pub(crate) away: Vec<RemoteCopies>,
}

impl PlacementResult {
    /// All of them on one other platform.
    pub(crate) fn on(platform: &str, slots: Vec<CopySpec>) -> Self {
        Self {
            here: Vec::new(),
            away: vec![RemoteCopies { platform: platform.to_owned(), slots, claim: None }],
        }
    }
}

/// What is sent.
enum Sent {
    /// All of it, before the copies run.
    Whole(Arc<ChunkSource>),
    /// A part, and the rest while they run.
    Lazily(Box<Capsule>),
}

/// What all senders of a fork's copies share.
struct Away {
    platform: Arc<Platform>,
    fork: Arc<Fork>,
    rendezvous: Arc<Rendezvous>,
    /// The image's files.
    files: Vec<Arc<File>>,
    metadata: ImageMetadata,
    total: u32,
    target: Target,
    /// Whether they run before all of their memory is there.
    lazy: bool,
    /// Whether they were shown another CPU than this platform's guests are.
    has_foreign_cpu: bool,
    /// What copies write to first, if that is known.
    working_set: Option<WorkingSet>,
}

impl Platform {
    /// Chooses where copies go.
    ///
    /// # Errors
    /// [`Error::Place`] or [`Error::Alone`].
    pub(crate) fn choose(
        &self,
        slots: Vec<CopySpec>,
        wish: &Wish,
        but: &[String],
    ) -> Result<PlacementResult, Error> {
        let Some(cluster) = self.cluster.get() else {
            let is_here = wish.location != Locality::Remote;
            return if is_here {
                Ok(PlacementResult { here: slots, away: Vec::new() })
            } else {
                Err(Error::Alone)
            };
        };
        let shares = cluster.place(wish, but).map_err(|why| Error::Place(Box::new(why)))?;
        let mut slots = slots.into_iter();
        let mut placed = PlacementResult::default();
        for (share, claim) in shares {
            let own: Vec<CopySpec> =
                slots.by_ref().take(usize::try_from(share.count).unwrap_or(usize::MAX)).collect();
            match claim {
                Some(_) => placed.away.push(RemoteCopies { platform: share.platform, slots: own, claim }),
                None => placed.here.extend(own),
            }
        }
        Ok(placed)
    }
}

impl Fork {
    /// Sends copies away, in the background.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub(crate) fn send_away(
        self: &Arc<Self>,
        platform: &Arc<Platform>,
        rendezvous: &Arc<Rendezvous>,
        launch: &Launch<'_>,
        target: &Target,
        shares: Vec<RemoteCopies>,
        files: &[Arc<File>],
    ) -> Result<(), Error> {
        let metadata = ImageMetadata {
            id: new_id().map_err(Error::Id)?,
            created_ns: wall_clock_ns(),
            vm_type: launch.vm_type.to_owned(),
            original: launch.original.clone(),
            config: launch.config,
            seq: launch.seq,
        };
        let lazy = match target {
            Target::Chosen(_) => platform.cluster.get().is_some_and(|cluster| cluster.sending.lazy),
            Target::Platform { lazy, .. } => *lazy,
        };
        let away = Away {
            platform: Arc::clone(platform),
            fork: Arc::clone(self),
            rendezvous: Arc::clone(rendezvous),
            files: files.to_vec(),
            metadata,
            total: launch.total,
            target: target.clone(),
            lazy,
            has_foreign_cpu: launch.has_foreign_cpu,
            working_set: launch.history.of_next_fork(),
        };
        let count = shares.iter().map(|share| share.slots.len()).sum();
        self.expect(count);
        let sent = thread::Builder::new().name("away".into()).spawn(move || away.send(shares));
        sent.map(drop).map_err(|error| {
            self.settled(count);
            Error::Start(error)
        })
    }
}

impl Away {
    fn send(&self, shares: Vec<RemoteCopies>) {
        match self.content() {
            // To make it takes a while.
            Ok(_) if self.fork.is_off() => self.gone(&shares, "the fork was called off".into()),
            Ok(content) => {
                self.dispatch(PlacementResult { here: Vec::new(), away: shares }, &content, &[]);
                drop(content);
                self.learn_digests();
            }
            Err(error) => self.gone(&shares, Reason::of_error(&error)),
        }
    }

    /// Reports that no copies of these shares will run.
    fn gone(&self, shares: &[RemoteCopies], why: Reason) {
        self.fork.gone(shares.iter().map(|share| share.slots.len()).sum(), why);
    }

    /// Reads the image once more when it is sealed: digests from before are remembered by nobody. The next
    /// fork, while which its parent stands still, need not read the same files then.
    fn learn_digests(&self) {
        if self.lazy || self.fork.is_off() {
            return;
        }
        threads::step_back();
        if self.fork.seal().wait(LEARNT_WITHIN).is_ok()
            && let Err(error) = self.platform.digests.learn(&self.files)
        {
            tracing::debug!(
                error = chain(&error),
                "an image that was sent is read again when it is sent again"
            );
        }
    }

    /// Takes the state, once it is there, and makes of it what can be sent.
    fn content(&self) -> Result<Sent, Error> {
        let state = self.rendezvous.wait_state(|| self.fork.is_off())?;
        let capsule = Capsule { metadata: self.metadata.clone(), state, files: self.files.clone() };
        if self.lazy {
            return Ok(Sent::Lazily(Box::new(capsule)));
        }
        let chunk_source = ChunkSource::of_while(&capsule, &self.platform.digests, &|| !self.fork.is_off());
        Ok(Sent::Whole(Arc::new(chunk_source.map_err(Error::Capsule)?)))
    }

    /// Has copies launched where they are to go, all at once. `tried` are platforms that could not.
    fn dispatch(&self, PlacementResult { here, away }: PlacementResult, content: &Sent, tried: &[String]) {
        thread::scope(|scope| {
            for share in away {
                let (count, send) = (share.slots.len(), move || self.send_share(share, content, tried));
                if let Err(error) = thread::Builder::new().name("away".into()).spawn_scoped(scope, send) {
                    let why = Reason::of(format_args!("can't send to several platforms at once: {error}"));
                    self.fork.gone(count, why);
                }
            }
            if !here.is_empty() {
                self.launch_here(&here);
            }
        });
    }

    /// Sends copies to where they are to go, or, where that can't be, to the next platform that may take
    /// them.
    fn send_share(&self, mut share: RemoteCopies, content: &Sent, tried: &[String]) {
        let error = match self.prepare(&mut share, content) {
            Ok(prepared) => return self.finish(&share, prepared),
            Err(error) => error,
        };
        let RemoteCopies { platform, slots, .. } = share;
        let count = slots.len();
        if self.fork.is_off() {
            return self.fork.gone(count, Reason::of_error(&error));
        }
        tracing::warn!(platform, error = chain(&error), "copies can't be sent there");
        let Target::Chosen(location) = self.target else {
            return self.fork.gone(count, Reason::of_error(&error));
        };
        let tried = [tried, &[platform]].concat();
        match self.platform.choose(slots, &self.wish(count, location), &tried) {
            Ok(placed) if tried.len() < MAX_TRIES => self.dispatch(placed, content, &tried),
            _ => self.fork.gone(count, Reason::of_error(&error)),
        }
    }

    fn prepare(&self, share: &mut RemoteCopies, content: &Sent) -> Result<source::Prepared, Error> {
        let cluster = self.platform.cluster.get().ok_or(Error::Alone)?;
        let failed = |error| Error::Send { platform: share.platform.clone(), source: Box::new(error) };
        let client = cluster.find(&share.platform).map_err(Error::Cluster)?;
        let platform = short(&share.platform);
        list(&self.rendezvous, &share.slots, platform, Location::Remote)?;
        let (source, slots) = (cluster.name.clone(), share.slots.clone());
        let order = clone::Order { source, slots, total: self.total, lazy: self.lazy };
        let (id, retry_policy) = (new_id().map_err(Error::Id)?, self.retry_policy_at(&share.platform));
        // The first thing that the target does is to keep room for them.
        drop(share.claim.take());
        let listed = self.platform.transfers.list(id, &self.metadata, &share.platform);
        match content {
            Sent::Whole(chunk_source) => source::send(
                client,
                id,
                &order,
                chunk_source,
                &cluster.sending,
                &listed.progress,
                retry_policy,
            )
            .map_err(failed),
            Sent::Lazily(capsule) => {
                let page_server = Arc::new(
                    PageServer::of(capsule, platform, cluster.sending.bandwidth).map_err(Error::Capsule)?,
                );
                self.platform.page_servers.add(id, &page_server);
                self.fork.seal().add_page_server(id);
                let sent = source::send_lazily(
                    client,
                    id,
                    &order,
                    &page_server,
                    self.working_set.as_ref(),
                    retry_policy,
                );
                sent.inspect_err(|_| self.platform.page_servers.remove(id)).map_err(failed)
            }
        }
    }

    /// Says how much copies are wanted on a platform. Their parent stands still until they are ready: it does
    /// not wait for one that is taken for gone, or while this one is cut off itself.
    fn retry_policy_at(&self, platform: &str) -> CurrentRetryPolicy {
        let (fork, own, name) = (Arc::clone(&self.fork), Arc::clone(&self.platform), platform.to_owned());
        Arc::new(move || match own.cluster.get() {
            _ if fork.is_off() => RetryPolicy::Cancelled,
            Some(Cluster { directory, .. }) if directory.is_partitioned() => RetryPolicy::FailFast,
            Some(cluster) if cluster.find(&name).is_err() => RetryPolicy::FailFast,
            _ => RetryPolicy::Retry,
        })
    }

    /// Says that these copies are ready, and has them run when all are.
    fn finish(&self, RemoteCopies { platform, slots, .. }: &RemoteCopies, mut prepared: source::Prepared) {
        // The parent is about to go on: who is woken up on its processor waits for the next tick.
        if let Some(processor) = self.fork.parents_processor()
            && let Err(error) = threads::keep_off(None, processor)
        {
            tracing::debug!(%error, "copies may run later than they could");
        }
        let arrived = slots.iter().try_for_each(|_| self.rendezvous.arrive(self.total));
        let is_over = || self.fork.is_off() || !prepared.is_waiting();
        let decided = arrived.and_then(|()| match self.rendezvous.wait_commit(is_over) {
            // Nobody may commit any more once this is undone. Who has done so before that was first.
            Err(error) if self.rendezvous.abort()? => Err(error),
            _ => Ok(()),
        });
        if let Err(error) = decided {
            // The parent does not wait until the target is told.
            self.fork.fail(ErrorCode::Place, Reason::of_error(&error));
            self.platform.page_servers.remove(prepared.id());
            drop(prepared);
            return self.fork.settled(slots.len());
        }
        self.fork.is_certain(&self.platform);
        let vms = self.commit(platform, slots, prepared);
        let platform = short(platform);
        for vm in &vms {
            self.platform.events.write(&Event::Sent {
                id: vm.id,
                name: &vm.name,
                platform,
                seq: self.metadata.seq,
            });
        }
        let copy = |CopySpec { id, index }: &CopySpec| {
            let name = vms.iter().find(|vm| vm.id == *id)?.name.clone();
            let (platform, placement) = (platform.into(), Placement::Remote);
            Some(ForkedVm { id: *id, name, index: *index, platform, placement })
        };
        self.fork.sent(slots.len(), slots.iter().filter_map(copy));
    }

    /// Lets copies run, and gives those that do.
    fn commit(&self, platform: &str, slots: &[CopySpec], prepared: source::Prepared) -> Vec<Copied> {
        let id = prepared.id();
        match prepared.commit().map(|vms| ordered(slots, vms)) {
            Ok(vms) => {
                // Of those that it does not name, it has said nothing.
                let unknown = slots.len().saturating_sub(vms.len());
                if unknown > 0 {
                    tracing::error!(platform, unknown, "copies that were to run there were not named");
                }
                self.fork.lost_sight(unknown);
                vms
            }
            Err(error) => {
                if let source::Error::Unknown(_) = error {
                    // What runs may still need its memory.
                    self.fork.lost_sight(slots.len());
                } else {
                    self.platform.page_servers.remove(id);
                }
                tracing::error!(platform, error = chain(&error), "copies that were sent there may not run");
                Vec::new()
            }
        }
    }

    /// Launches copies here after all.
    fn launch_here(&self, slots: &[CopySpec]) {
        let history = Arc::default();
        let launch = Launch {
            arrivals: self.total,
            has_foreign_cpu: self.has_foreign_cpu,
            ..Launch::of_image(&self.metadata, &history, slots, self.total)
        };
        let files = std::iter::once(self.rendezvous.file()).chain(self.files.iter().map(AsRef::as_ref));
        let listed =
            list(&self.rendezvous, slots, self.platform.name(), Location::Local).map_err(Error::from);
        let room = || self.platform.reserve(slots.len());
        let launched = listed.and_then(|()| {
            self.fork.launch(&self.platform, launch, &files.collect::<Vec<_>>(), None, room()?)
        });
        match launched.and_then(|nodes| nodes.into_iter().try_for_each(Node::serve)) {
            Ok(()) => self.fork.settled(slots.len()),
            Err(error) => self.fork.gone(slots.len(), Reason::of_error(&error)),
        }
    }

    fn wish(&self, count: usize, location: Locality) -> Wish {
        Wish {
            vm_type: self.metadata.vm_type.clone(),
            count: u32::try_from(count).unwrap_or(u32::MAX),
            config: self.metadata.config,
            location,
            images: Vec::new(),
            source: self.platform.name().to_owned(),
        }
    }
}
