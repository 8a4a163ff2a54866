//! The side that takes clones in.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use api::Copied;
use base::{sync::lock, text::Reason};
use capsule::{self, Description, Header, Incompatible, header::HEADER_BYTES};
use types::are_copies_of_fork;
use uuid::Uuid;
use vmfork_abi::MAX_CHILDREN;
use vmm::memory::Grant;

use super::{
    LEASE, Missing, Order, Stage,
    decisions::{Decision, MAX_IN_ALL, MAX_REMEMBERED, evictable},
    incoming_memory::{Complete, Memory},
    page_server::PageClient,
    postcopy::{self, PostcopyMemory},
};
use crate::{Copies, Platform, Reservation};

/// Most clones that are under way at a time.
const MAX_CLONES: usize = 64;

/// Decisions of one source from which on those are forgotten that may be: so many at a time that it is seldom
/// done.
const MANY: usize = 2 * MAX_REMEMBERED;

/// Why a clone is not taken in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The order can't be one.
    #[error("the order for a clone is not valid: {0}")]
    Order(&'static str),
    /// The ID stands for another one.
    #[error("the clone {0} was ordered otherwise before")]
    Other(Uuid),
    /// There are too many.
    #[error("{MAX_CLONES} clones are under way already")]
    TooMany,
    /// There would be too many to remember what became of them.
    #[error(
        "this platform remembers what became of {MAX_IN_ALL} clones, since their sources may still ask for that, and takes \
         no more until it may forget some: send this one again in two minutes, or to another platform"
    )]
    TooManyRemembered,
    /// Others may take the platform for gone, and have its VMs made anew.
    #[error("this platform is cut off from its cluster: it takes no VMs until it is back; ask another one")]
    CutOff,
    /// Nobody has ordered it, or it was forgotten.
    #[error("there is no clone {0}")]
    Unknown(Uuid),
    /// It is not the time for that.
    #[error("the clone {id} is {stage}: {what} can't come now")]
    Stage {
        /// Which clone.
        id: Uuid,
        /// How far it is.
        stage: &'static str,
        /// What has come.
        what: &'static str,
    },
    /// The platform has no room, or is being stopped.
    #[error(transparent)]
    Platform(#[from] crate::Error),
    /// The capsule is none.
    #[error("the capsule can't be taken")]
    Capsule(#[from] capsule::Error),
    /// The platform can't run it.
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    /// The memory of a lazy clone can't be filled.
    #[error("the memory can't be filled")]
    Postcopy(#[from] postcopy::Error),
    /// A chunk came that nobody could make use of.
    #[error("chunks can't be taken")]
    Chunks(#[source] io::Error),
}

/// The clones that a platform takes in.
#[derive(Debug, Default)]
pub struct Clones {
    by_id: Mutex<BTreeMap<Uuid, Arc<Incoming>>>,
}

/// One of them.
#[derive(Debug)]
struct Incoming {
    id: Uuid,
    order: Order,
    progress: Mutex<Progress>,
    /// Hash of what it has said of itself. Held by whoever takes that in: it takes a while to look for what
    /// is here already.
    described: Mutex<Option<blake3::Hash>>,
    /// When something was heard of its source, or it was decided.
    last_contact: Mutex<Instant>,
    /// Bytes of memory that have come.
    received_bytes: AtomicU64,
}

/// How far it is, with what is there of it.
#[derive(Debug)]
enum Progress {
    Reserved(Reservation),
    Receiving(Reservation, Memory),
    Preparing,
    Prepared(Box<Launched>),
    /// Its copies are let run, or ended since one of them is gone, which takes a while. Nobody waits for that
    /// with a lock.
    Committing,
    Committed(Vec<Copied>),
    Aborted(Reason),
}

/// Copies that wait until they may run.
#[derive(Debug)]
struct Launched {
    copies: Copies,
    /// Their memory, where some of it is missing.
    memory: Option<Begun>,
}

/// A memory that nobody needs any more once this is dropped, unless the rest of it is on its way.
#[derive(Debug)]
struct Begun {
    postcopy: Arc<PostcopyMemory>,
    /// Where the rest is to be had from, as soon as the copies run: until then, it would only keep them from
    /// that.
    rest: Option<PageClient>,
}

impl Begun {
    /// Has what copies wait for come from their source.
    fn new(
        platform: &Platform,
        postcopy: Arc<PostcopyMemory>,
        source: &str,
        clone: Uuid,
    ) -> Result<Self, Error> {
        let page_client = || platform.page_client(&postcopy, source, clone);
        let (awaited, rest) = (page_client()?, page_client()?);
        postcopy.serve_faults(awaited).map_err(crate::Error::Start)?;
        Ok(Self { rest: Some(rest), postcopy })
    }

    /// Has all of it come.
    fn go_on(mut self, platform: &Arc<Platform>) {
        if let Some(rest) = self.rest.take() {
            platform.fill(&self.postcopy, rest);
        }
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.rest.is_some() {
            self.postcopy.cancel();
        }
    }
}

impl Progress {
    fn name(&self) -> &'static str {
        match self {
            Self::Reserved(_) => "reserved",
            Self::Receiving(..) => "being received",
            Self::Preparing => "being prepared",
            Self::Prepared(_) => "prepared",
            Self::Committing => "being committed",
            Self::Committed(_) => "committed",
            Self::Aborted(_) => "aborted",
        }
    }

    fn is_decided(&self) -> bool {
        matches!(self, Self::Committed(_) | Self::Aborted(_))
    }

    fn stage(&self) -> Stage {
        match self {
            Self::Reserved(_) => Stage::Reserved,
            Self::Receiving(..) => Stage::Receiving,
            Self::Preparing | Self::Committing => Stage::Preparing,
            Self::Prepared(_) => Stage::Prepared,
            Self::Committed(vms) => Stage::Committed { vms: vms.clone() },
            Self::Aborted(why) => Stage::Aborted { why: why.clone() },
        }
    }
}

impl Incoming {
    /// How far it is, for somebody who acts for its source.
    fn progress(&self) -> MutexGuard<'_, Progress> {
        *lock(&self.last_contact) = Instant::now();
        lock(&self.progress)
    }

    fn is_decided(&self) -> bool {
        lock(&self.progress).is_decided()
    }

    /// Whether something is done for it that may take longer than its source's lease.
    fn is_at_work(&self) -> bool {
        let is_described = matches!(self.described.try_lock(), Err(TryLockError::WouldBlock));
        is_described || matches!(*lock(&self.progress), Progress::Preparing | Progress::Committing)
    }

    fn refuse(&self, progress: &Progress, what: &'static str) -> Error {
        Error::Stage { id: self.id, stage: progress.name(), what }
    }

    /// What became of it, once that is decided.
    fn decision(&self) -> Option<Decision> {
        let is_committed = match *lock(&self.progress) {
            Progress::Committed(_) => true,
            Progress::Aborted(_) => false,
            _ => return None,
        };
        Some(Decision {
            id: self.id,
            source: self.order.source.clone(),
            since: *lock(&self.last_contact),
            is_committed,
        })
    }

    /// Undoes it, unless it is decided, or about to be.
    fn abort(&self, why: &str) -> Stage {
        let undone = {
            let mut progress = self.progress();
            if progress.is_decided() || matches!(*progress, Progress::Committing) {
                return progress.stage();
            }
            std::mem::replace(&mut *progress, Progress::Aborted(why.into()))
        };
        // It takes a while to end copies.
        drop(undone);
        Stage::Aborted { why: why.into() }
    }
}

impl Clones {
    fn find(&self, id: Uuid) -> Result<Arc<Incoming>, Error> {
        lock(&self.by_id).get(&id).cloned().ok_or(Error::Unknown(id))
    }

    /// Undoes clones whose source is not heard of any more, and forgets those that were decided long ago. To
    /// be called now and then.
    pub fn sweep(&self) {
        let all: Vec<Arc<Incoming>> = lock(&self.by_id).values().cloned().collect();
        for incoming in &all {
            if !incoming.is_decided()
                && !incoming.is_at_work()
                && lock(&incoming.last_contact).elapsed() >= LEASE
            {
                tracing::warn!(clone = %incoming.id, source = incoming.order.source, "a clone's source is gone");
                incoming.abort("its source was not heard of for the time of its lease");
            }
        }
        self.evict(Instant::now());
    }

    /// Forgets what became of clones for which nobody asks any more.
    fn evict(&self, now: Instant) {
        let mut by_id = lock(&self.by_id);
        let decisions = by_id.values().filter_map(|incoming| incoming.decision()).collect();
        let evicted: Vec<_> = evictable(decisions, now).iter().filter_map(|id| by_id.remove(id)).collect();
        drop(by_id);
        drop(evicted);
    }

    /// How many clones of a source are decided.
    fn decided_of(&self, source: &str) -> usize {
        let is_one = |incoming: &&Arc<Incoming>| incoming.order.source == source && incoming.is_decided();
        lock(&self.by_id).values().filter(is_one).count()
    }

    /// Undoes all that are not decided.
    pub fn close(&self) {
        let all: Vec<Arc<Incoming>> = lock(&self.by_id).values().cloned().collect();
        all.iter().for_each(|incoming| drop(incoming.abort("the target is being stopped")));
    }
}

/// Checks whether there may be one more beside these.
fn check_count(by_id: &BTreeMap<Uuid, Arc<Incoming>>) -> Result<(), Error> {
    let decided = by_id.values().filter(|incoming| incoming.is_decided()).count();
    if by_id.len() - decided >= MAX_CLONES {
        Err(Error::TooMany)
    } else if decided >= MAX_IN_ALL {
        Err(Error::TooManyRemembered)
    } else {
        Ok(())
    }
}

/// What sources ask a platform for.
impl Platform {
    /// Keeps room for the copies of a clone, under an ID that its source has chosen.
    ///
    /// # Errors
    /// [`Error`]: nothing is kept then.
    pub fn order_clone(&self, id: Uuid, order: Order) -> Result<Stage, Error> {
        if !vmfork_abi::is_vm_type(&order.source)
            || !are_copies_of_fork(&order.slots, order.total)
            || order.total > MAX_CHILDREN
        {
            return Err(Error::Order(
                "its copies are too many, or numbered wrongly, or its source has no name",
            ));
        }
        // Nobody may have them be remembered without end, between one look after them and the next.
        if self.clones().decided_of(&order.source) >= MANY {
            self.clones().evict(Instant::now());
        }
        let mut by_id = lock(&self.clones().by_id);
        if let Some(known) = by_id.get(&id).cloned() {
            drop(by_id);
            return if known.order == order { Ok(known.progress().stage()) } else { Err(Error::Other(id)) };
        }
        // One that is being started is not among others yet.
        if self.cluster().ok_or(crate::Error::Alone)?.directory.is_partitioned() {
            return Err(Error::CutOff);
        }
        check_count(&by_id)?;
        let progress = Mutex::new(Progress::Reserved(self.reserve(order.slots.len())?));
        let (last_contact, received_bytes) = (Mutex::new(Instant::now()), AtomicU64::new(0));
        let described = Mutex::default();
        by_id.insert(id, Arc::new(Incoming { id, order, progress, described, last_contact, received_bytes }));
        Ok(Stage::Reserved)
    }

    /// Name of the platform that sends a clone.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn clone_source(&self, id: Uuid) -> Result<String, Error> {
        Ok(self.clones().find(id)?.order.source.clone())
    }

    /// Takes in what a capsule says of itself, checks whether it can run here, and says what of its memory is
    /// missing. `grant` is for what it says of itself.
    ///
    /// # Errors
    /// [`Error`].
    pub fn describe_clone(&self, id: Uuid, capsule: &[u8], grant: Grant) -> Result<Missing, Error> {
        let incoming = self.clones().find(id)?;
        let (header, description) =
            capsule.split_at_checked(HEADER_BYTES).ok_or(capsule::Error::NoCapsule)?;
        let header = Header::from_bytes(header.try_into().map_err(|_| capsule::Error::NoCapsule)?)?;
        header.check_description(description)?;
        let description = Description::from_bytes(description)?.held_by(grant);
        self.check_compatible(&description.requirements)??;
        let mut described = lock(&incoming.described);
        let hash = blake3::hash(capsule);
        if let Progress::Receiving(_, memory) = &*incoming.progress()
            && *described == Some(hash)
        {
            // Some of it may have come since its source has said so before.
            return Ok(Missing { chunks: memory.missing() });
        }
        self.expect(&description, incoming.order.slots.len())?;
        let memory = if incoming.order.lazy {
            Memory::Lazy(Arc::new(self.begin_postcopy(description)?))
        } else {
            Memory::Whole(Arc::new(self.assemble(description)?))
        };
        let chunks = memory.missing();
        let mut progress = incoming.progress();
        let (reservation, replaced) = match std::mem::replace(&mut *progress, Progress::Preparing) {
            Progress::Reserved(reservation) => (reservation, None),
            Progress::Receiving(reservation, memory) => (reservation, Some(memory)),
            other => {
                *progress = other;
                return Err(incoming.refuse(&progress, "a description"));
            }
        };
        *progress = Progress::Receiving(reservation, memory);
        *described = Some(hash);
        // It takes a while to give memory back.
        drop((progress, described));
        drop(replaced);
        Ok(Missing { chunks })
    }

    /// The way in for the chunks of a clone.
    ///
    /// # Errors
    /// [`Error`].
    pub fn clone_memory(&self, id: Uuid) -> Result<Intake, Error> {
        let incoming = self.clones().find(id)?;
        let progress = incoming.progress();
        match &*progress {
            Progress::Receiving(..) => Ok(Intake(Arc::clone(&incoming))),
            other => Err(incoming.refuse(other, "a chunk of memory")),
        }
    }

    /// Launches the copies of a clone whose memory is complete. They wait until they may run.
    ///
    /// # Errors
    /// [`Error`]: nothing is left of the clone then, unless its memory is not complete yet.
    pub fn prepare_clone(self: &Arc<Self>, id: Uuid) -> Result<Stage, Error> {
        let incoming = self.clones().find(id)?;
        let (room, memory) = {
            let mut progress = incoming.progress();
            match std::mem::replace(&mut *progress, Progress::Preparing) {
                Progress::Receiving(reservation, memory) => match memory.into_complete() {
                    Ok(complete) => (reservation, complete),
                    Err((memory, what)) => {
                        *progress = Progress::Receiving(reservation, memory);
                        return Err(incoming.refuse(&progress, what));
                    }
                },
                other => {
                    *progress = other;
                    return match progress.stage() {
                        Stage::Reserved | Stage::Receiving => {
                            Err(incoming.refuse(&progress, "the end of its memory"))
                        }
                        stage => Ok(stage),
                    };
                }
            }
        };
        let prepared = self.launch_clone(&incoming, memory, room);
        let mut progress = incoming.progress();
        // It may have been called off meanwhile.
        match prepared {
            Ok(copies) if matches!(*progress, Progress::Preparing) => {
                *progress = Progress::Prepared(Box::new(copies))
            }
            Ok(copies) => {
                let stage = progress.stage();
                drop(progress);
                drop(copies);
                return Ok(stage);
            }
            Err(error) => {
                *progress = Progress::Aborted(Reason::of_error(&error));
                return Err(error);
            }
        }
        Ok(progress.stage())
    }

    fn launch_clone(
        self: &Arc<Self>,
        incoming: &Incoming,
        memory: Complete,
        room: Reservation,
    ) -> Result<Launched, Error> {
        let Order { source, slots, total, .. } = &incoming.order;
        match memory {
            Complete::Whole(assembly) => {
                let (capsule, description) = assembly.finish()?;
                let copies = self.launch_capsule(capsule, description, slots, *total, room)?;
                Ok(Launched { copies, memory: None })
            }
            Complete::Lazy(postcopy) => {
                // Copies may wait for memory before they are launched: KVM reads some of it when it is given
                // what vCPUs had in their registers.
                let begun = Begun::new(self, Arc::clone(&postcopy), source, incoming.id)?;
                let copies = self.launch_lazily(&postcopy, slots, *total, room)?;
                Ok(Launched { copies, memory: Some(begun) })
            }
        }
    }

    /// Lets the copies of a clone run. Who asks again gets the same answer; who does so meanwhile, that they
    /// are being prepared.
    ///
    /// # Errors
    /// [`Error`]: none of them runs.
    pub fn commit_clone(self: &Arc<Self>, id: Uuid) -> Result<Stage, Error> {
        let incoming = self.clones().find(id)?;
        let launched = {
            let mut progress = incoming.progress();
            match std::mem::replace(&mut *progress, Progress::Committing) {
                Progress::Prepared(launched) => launched,
                other => {
                    *progress = other;
                    let is_answer = progress.is_decided() || matches!(*progress, Progress::Committing);
                    return if is_answer {
                        Ok(progress.stage())
                    } else {
                        Err(incoming.refuse(&progress, "a commit"))
                    };
                }
            }
        };
        let Launched { copies, memory } = *launched;
        match copies.commit() {
            Ok(vms) => {
                if let Some(begun) = memory {
                    begun.go_on(self);
                }
                let vms = vms.into_iter().map(|vm| Copied { id: vm.id, name: vm.name.into() }).collect();
                let mut progress = incoming.progress();
                *progress = Progress::Committed(vms);
                Ok(progress.stage())
            }
            Err(error) => {
                *incoming.progress() = Progress::Aborted(Reason::of_error(&error));
                Err(error.into())
            }
        }
    }

    /// Undoes a clone, unless its copies run already, and says how far it is.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn abort_clone(&self, id: Uuid) -> Result<Stage, Error> {
        Ok(self.clones().find(id)?.abort("its source has called it off"))
    }

    /// How far a clone is.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn clone_stage(&self, id: Uuid) -> Result<Stage, Error> {
        Ok(self.clones().find(id)?.progress().stage())
    }
}

/// Takes in chunks of one clone's memory.
#[derive(Debug)]
pub struct Intake(Arc<Incoming>);

impl Intake {
    /// Takes in one.
    ///
    /// # Errors
    /// Where it is not what the description says, there is no memory for it, or it comes too late.
    pub fn take(&self, chunk: u32, data: &[u8]) -> io::Result<()> {
        let Self(incoming) = self;
        let memory = match &*incoming.progress() {
            Progress::Receiving(_, memory) => memory.clone(),
            other => return Err(io::Error::other(incoming.refuse(other, "a chunk of memory"))),
        };
        match &memory {
            Memory::Whole(assembly) => {
                let number = usize::try_from(chunk).map_err(io::Error::other)?;
                assembly.put(number, data).map_err(io::Error::other)?;
            }
            Memory::Lazy(postcopy) => postcopy.put(chunk, data).map_err(io::Error::other)?,
        }
        incoming.received_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
#[path = "target_test.rs"]
mod tests;
