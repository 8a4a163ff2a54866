//! The side that takes clones in.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use uuid::Uuid;
use vmfork_abi::MAX_CHILDREN;

use super::{
    LEASE, MAX_RANGES, Missing, Order, Stage,
    filling::{self, Filling},
    supply::Supplier,
};
use crate::{
    api::Copied,
    capsule::{self, Assembly, Description, Header, Incompatible, header::HEADER_BYTES},
    error::chain,
    platform::{self, Copies, Platform, Reservation, is_slots},
    sync::lock,
};

/// Most clones that are under way at a time.
const MAX_CLONES: usize = 64;

/// For how long it is remembered what became of a clone.
const REMEMBERED: Duration = Duration::from_secs(600);

/// Most clones of which it is remembered what became of them.
const MAX_REMEMBERED: usize = 4096;

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
    Platform(#[from] platform::Error),
    /// The capsule is none.
    #[error("the capsule can't be taken")]
    Capsule(#[from] capsule::Error),
    /// The platform can't run it.
    #[error(transparent)]
    Incompatible(#[from] Incompatible),
    /// The memory of a lazy clone can't be filled.
    #[error("the memory can't be filled")]
    Filling(#[from] filling::Error),
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
    /// Hash of what it has said of itself. Held by whoever takes that in: it takes a while to look for what is here already.
    described: Mutex<Option<blake3::Hash>>,
    /// When something was heard of its source, or it was decided.
    heard: Mutex<Instant>,
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
    Committed(Vec<Copied>),
    Aborted(String),
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
    filling: Arc<Filling>,
    /// Where the rest is to be had from, as soon as the copies run: until then, it would only keep them from that.
    rest: Option<Supplier>,
}

impl Begun {
    /// Has what copies wait for come from their source.
    fn new(platform: &Platform, filling: Arc<Filling>, source: &str, clone: Uuid) -> Result<Self, Error> {
        let supplier = || platform.supplier(&filling, source, clone);
        let (awaited, rest) = (supplier()?, supplier()?);
        filling.serve_faults(awaited).map_err(platform::Error::Start)?;
        Ok(Self { rest: Some(rest), filling })
    }

    /// Has all of it come.
    fn go_on(mut self, platform: &Arc<Platform>) {
        if let Some(rest) = self.rest.take() {
            platform.fill(&self.filling, rest);
        }
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.rest.is_some() {
            self.filling.cancel();
        }
    }
}

/// A memory that comes in.
#[derive(Debug, Clone)]
enum Memory {
    /// As a whole, before the copies run.
    Whole(Arc<Assembly>),
    /// For a part, and the rest while they run.
    Lazy(Arc<Filling>),
}

/// One of which as much has come as its copies need to run.
enum Complete {
    Whole(Box<Assembly>),
    Lazy(Arc<Filling>),
}

impl Memory {
    /// What is to be sent before its copies can run, in not too many ranges.
    fn missing(&self) -> Vec<Range<u32>> {
        match self {
            Self::Whole(assembly) => missing(assembly),
            Self::Lazy(_) => Vec::new(),
        }
    }

    /// Takes it, once nobody puts anything into it any more; else says what has come too early.
    fn into_complete(self) -> Result<Complete, (Self, &'static str)> {
        let assembly = match self {
            Self::Lazy(filling) => return Ok(Complete::Lazy(filling)),
            Self::Whole(assembly) => assembly,
        };
        match Arc::try_unwrap(assembly) {
            Ok(assembly) if assembly.missing().is_empty() => Ok(Complete::Whole(Box::new(assembly))),
            Ok(assembly) => Err((Self::Whole(Arc::new(assembly)), "the end of its memory, of which some is missing,")),
            Err(assembly) => Err((Self::Whole(assembly), "the end of its memory, of which some is on its way,")),
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
            Self::Preparing => Stage::Preparing,
            Self::Prepared(_) => Stage::Prepared,
            Self::Committed(vms) => Stage::Committed { vms: vms.clone() },
            Self::Aborted(why) => Stage::Aborted { why: why.clone() },
        }
    }
}

impl Incoming {
    /// How far it is, for somebody who acts for its source.
    fn progress(&self) -> MutexGuard<'_, Progress> {
        *lock(&self.heard) = Instant::now();
        lock(&self.progress)
    }

    /// Whether something is done for it that may take longer than its source's lease.
    fn is_at_work(&self) -> bool {
        let is_described = matches!(self.described.try_lock(), Err(TryLockError::WouldBlock));
        is_described || matches!(*lock(&self.progress), Progress::Preparing)
    }

    fn refuse(&self, progress: &Progress, what: &'static str) -> Error {
        Error::Stage { id: self.id, stage: progress.name(), what }
    }

    /// Undoes it, unless it is decided.
    fn abort(&self, why: &str) -> Stage {
        let undone = {
            let mut progress = self.progress();
            if progress.is_decided() {
                return progress.stage();
            }
            std::mem::replace(&mut *progress, Progress::Aborted(why.to_owned()))
        };
        // It takes a while to end copies.
        drop(undone);
        Stage::Aborted { why: why.to_owned() }
    }
}

impl Clones {
    fn find(&self, id: Uuid) -> Result<Arc<Incoming>, Error> {
        lock(&self.by_id).get(&id).cloned().ok_or(Error::Unknown(id))
    }

    /// Undoes clones whose source is not heard of any more, and forgets those that were decided long ago. To be called now and then.
    pub fn tend(&self) {
        let all: Vec<Arc<Incoming>> = lock(&self.by_id).values().cloned().collect();
        let is_decided = |incoming: &Incoming| lock(&incoming.progress).is_decided();
        for incoming in &all {
            if !is_decided(incoming) && !incoming.is_at_work() && lock(&incoming.heard).elapsed() >= LEASE {
                tracing::warn!(clone = %incoming.id, source = incoming.order.source, "a clone's source is gone");
                incoming.abort("its source was not heard of for the time of its lease");
            }
        }
        let mut decided: Vec<(Instant, Uuid)> = all
            .iter()
            .filter(|incoming| is_decided(incoming))
            .map(|incoming| (*lock(&incoming.heard), incoming.id))
            .collect();
        decided.sort_unstable();
        let surplus = decided.len().saturating_sub(MAX_REMEMBERED);
        let is_old =
            |(number, (since, _)): &(usize, &(Instant, Uuid))| *number < surplus || since.elapsed() >= REMEMBERED;
        let mut by_id = lock(&self.by_id);
        decided.iter().enumerate().filter(is_old).for_each(|(_, (_, id))| drop(by_id.remove(id)));
    }

    /// Undoes all that are not decided.
    pub fn close(&self) {
        let all: Vec<Arc<Incoming>> = lock(&self.by_id).values().cloned().collect();
        all.iter().for_each(|incoming| drop(incoming.abort("the target is being stopped")));
    }
}

/// What sources ask a platform for.
impl Platform {
    /// Keeps room for the copies of a clone, under an ID that its source has chosen.
    ///
    /// # Errors
    /// [`Error`]: nothing is kept then.
    pub fn order_clone(&self, id: Uuid, order: Order) -> Result<Stage, Error> {
        if !vmfork_abi::is_vm_type(&order.source) || !is_slots(&order.slots, order.total) || order.total > MAX_CHILDREN
        {
            return Err(Error::Order("its copies are too many, or numbered wrongly, or its source has no name"));
        }
        let mut by_id = lock(&self.clones().by_id);
        if let Some(known) = by_id.get(&id) {
            return if known.order == order { Ok(known.progress().stage()) } else { Err(Error::Other(id)) };
        }
        // One that is being started is not among others yet.
        if self.cluster().ok_or(platform::Error::Alone)?.directory.is_partitioned() {
            return Err(Error::CutOff);
        }
        if by_id.values().filter(|incoming| !lock(&incoming.progress).is_decided()).count() >= MAX_CLONES {
            return Err(Error::TooMany);
        }
        let progress = Mutex::new(Progress::Reserved(self.reserve(order.slots.len())?));
        let (heard, received_bytes) = (Mutex::new(Instant::now()), AtomicU64::new(0));
        let described = Mutex::default();
        by_id.insert(id, Arc::new(Incoming { id, order, progress, described, heard, received_bytes }));
        Ok(Stage::Reserved)
    }

    /// Name of the platform that sends a clone.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn clone_source(&self, id: Uuid) -> Result<String, Error> {
        Ok(self.clones().find(id)?.order.source.clone())
    }

    /// Takes in what a capsule says of itself, checks whether it can run here, and says what of its memory is missing.
    ///
    /// # Errors
    /// [`Error`].
    pub fn describe_clone(&self, id: Uuid, capsule: &[u8]) -> Result<Missing, Error> {
        let incoming = self.clones().find(id)?;
        let (header, description) = capsule.split_at_checked(HEADER_BYTES).ok_or(capsule::Error::NoCapsule)?;
        let header = Header::from_bytes(header.try_into().map_err(|_| capsule::Error::NoCapsule)?)?;
        header.check_description(description)?;
        let description = Description::from_bytes(description)?;
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
            Memory::Lazy(Arc::new(Filling::new(description)?))
        } else {
            Memory::Whole(Arc::new(self.assemble(description)?))
        };
        let chunks = memory.missing();
        let mut progress = incoming.progress();
        match std::mem::replace(&mut *progress, Progress::Preparing) {
            Progress::Reserved(reservation) | Progress::Receiving(reservation, _) => {
                *progress = Progress::Receiving(reservation, memory);
                *described = Some(hash);
                Ok(Missing { chunks })
            }
            other => {
                *progress = other;
                Err(incoming.refuse(&progress, "a description"))
            }
        }
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
                        Stage::Reserved | Stage::Receiving => Err(incoming.refuse(&progress, "the end of its memory")),
                        stage => Ok(stage),
                    };
                }
            }
        };
        let prepared = self.launch_clone(&incoming, memory, room);
        let mut progress = incoming.progress();
        // It may have been called off meanwhile.
        match prepared {
            Ok(copies) if matches!(*progress, Progress::Preparing) => *progress = Progress::Prepared(Box::new(copies)),
            Ok(copies) => {
                let stage = progress.stage();
                drop(progress);
                drop(copies);
                return Ok(stage);
            }
            Err(error) => {
                *progress = Progress::Aborted(chain(&error));
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
            Complete::Lazy(filling) => {
                // Copies may wait for memory before they are launched: KVM reads some of it when it is given what vCPUs had in their registers.
                let begun = Begun::new(self, Arc::clone(&filling), source, incoming.id)?;
                let copies = self.launch_lazily(&filling, slots, *total, room)?;
                Ok(Launched { copies, memory: Some(begun) })
            }
        }
    }

    /// Lets the copies of a clone run. Who asks again gets the same answer.
    ///
    /// # Errors
    /// [`Error`]: none of them runs.
    pub fn commit_clone(self: &Arc<Self>, id: Uuid) -> Result<Stage, Error> {
        let incoming = self.clones().find(id)?;
        let mut progress = incoming.progress();
        match std::mem::replace(&mut *progress, Progress::Preparing) {
            Progress::Prepared(launched) => match launched.copies.commit() {
                Ok(vms) => {
                    if let Some(begun) = launched.memory {
                        begun.go_on(self);
                    }
                    let vms = vms.into_iter().map(|vm| Copied { id: vm.id, name: vm.name }).collect();
                    *progress = Progress::Committed(vms);
                    Ok(progress.stage())
                }
                Err(error) => {
                    *progress = Progress::Aborted(chain(&error));
                    Err(error.into())
                }
            },
            other => {
                *progress = other;
                if progress.is_decided() { Ok(progress.stage()) } else { Err(incoming.refuse(&progress, "a commit")) }
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
            Memory::Lazy(filling) => filling.put(chunk, data).map_err(io::Error::other)?,
        }
        incoming.received_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// What is missing, in not too many ranges.
fn missing(assembly: &Assembly) -> Vec<Range<u32>> {
    let mut missing = assembly.missing();
    let mut gap = 1;
    while missing.len() > MAX_RANGES {
        let mut joined: Vec<Range<u32>> = Vec::new();
        for range in missing {
            match joined.last_mut() {
                Some(last) if range.start - last.end <= gap => last.end = range.end,
                _ => joined.push(range),
            }
        }
        (missing, gap) = (joined, gap * 2);
    }
    missing
}
