//! Seals on the images of forks, by which the kernel forbids everybody to write to them (F_SEAL_WRITE).
//!
//! The node of a parent freezes its memory into an image: nobody can *newly* write to the files then. A
//! writable mapping that exists stays, and only the node could say that there is none. A guest may have
//! broken out into it, so the platform seals the files. The kernel refuses that (EBUSY) for as long as there
//! is such a mapping.
//!
//! ```text
//!  fork is certain ──► Seals::add ──► thread `seals` tries each file again and again
//!                                       ├──► sealed: the image is kept
//!                                       └──► refused for too long: the VMs that share it are ended
//! ```
//!
//! None of this is on the path of a fork. The fork's own copies run before; all other uses wait for the seal.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::File,
    os::unix::fs::MetadataExt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base::{error::chain, sync::lock, threads};
use types::ExitReason;
use uuid::Uuid;
use vmm::memory::{self, SealRetry};

use super::{Error, Platform};

/// Delay of the first attempt after a fork: its children come first, and its parent has to leave its old
/// memory behind.
const GRACE: Duration = Duration::from_millis(5);

/// Most files of one VM's forks that may wait to be sealed, since each is a descriptor of this process. Those
/// of a VM that lets go of its old memory are sealed within milliseconds.
const MAX_UNSEALED: usize = 256;

/// Reason why nothing is sealed any more.
const STOPPING: &str = "the platform is being stopped";

/// The seal of one image: whether all of its files are sealed.
#[derive(Debug, Default)]
pub(super) struct Seal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Files that are not sealed yet, once that is known.
    left: usize,
    /// The decision, once there is one: all are sealed, or the reason why they can't be.
    outcome: Option<Result<(), String>>,
    /// IDs of clones elsewhere that run while the image is sent to them.
    page_servers: Vec<Uuid>,
}

impl Seal {
    /// A seal of an image whose files are sealed already.
    pub(super) fn sealed() -> Arc<Self> {
        let state = State { outcome: Some(Ok(())), ..State::default() };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Whether all files are sealed.
    pub(super) fn is_sealed(&self) -> bool {
        matches!(lock(&self.state).outcome, Some(Ok(())))
    }

    /// Enters a clone elsewhere that runs while the image is sent to it: it ends with the VMs that share the
    /// image here.
    pub(super) fn add_page_server(&self, clone: Uuid) {
        lock(&self.state).page_servers.push(clone);
    }

    /// Waits for the decision, no longer than `limit`, and gives the reason where the files are not sealed
    /// then.
    pub(super) fn wait(&self, limit: Duration) -> Result<(), String> {
        let is_open = |state: &mut State| state.outcome.is_none();
        let waited = self.changed.wait_timeout_while(lock(&self.state), limit, is_open);
        let state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let still_open = || Err("the kernel refuses to seal it so far (EBUSY); try again later".to_owned());
        state.outcome.clone().unwrap_or_else(still_open)
    }

    /// Sets the number of files that are not sealed yet; gives whether it is decided by that, for there are
    /// none.
    fn begin(&self, files: usize) -> bool {
        lock(&self.state).left = files;
        files == 0 && self.decide(Ok(()))
    }

    /// Counts one more sealed file; gives whether it is decided by that, for it was the last one.
    fn one_sealed(&self) -> bool {
        let left = {
            let mut state = lock(&self.state);
            state.left = state.left.saturating_sub(1);
            state.left
        };
        left == 0 && self.decide(Ok(()))
    }

    /// Enters the decision; gives whether there was none before.
    fn decide(&self, outcome: Result<(), String>) -> bool {
        let mut state = lock(&self.state);
        if state.outcome.is_some() {
            return false;
        }
        state.outcome = Some(outcome);
        drop(state);
        self.changed.notify_all();
        true
    }
}

/// The number of files of one VM's forks that wait to be sealed.
#[derive(Debug, Clone, Default)]
pub(super) struct Unsealed(Arc<AtomicUsize>);

impl Unsealed {
    /// Whether so many wait that they have to become fewer before the VM forks again.
    pub(super) fn are_many(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= MAX_UNSEALED
    }

    fn count(&self, files: usize) -> Counted {
        self.0.fetch_add(files, Ordering::Relaxed);
        Counted { of: self.clone(), files }
    }
}

/// Files that are counted until this is dropped.
#[derive(Debug)]
struct Counted {
    of: Unsealed,
    files: usize,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.files, Ordering::Relaxed);
    }
}

/// The image of a fork, as its parent's node froze it.
#[derive(Debug, Clone)]
pub(super) struct Frozen {
    /// Its files, with those that turned out not to be needed.
    pub(super) files: Vec<Arc<File>>,
    /// The parent.
    pub(super) parent: Uuid,
    /// Size of its memory in bytes.
    pub(super) ram_bytes: u64,
    /// Counter of the parent's files.
    pub(super) unsealed: Unsealed,
}

/// Device and inode, which name a file for as long as somebody has it open.
type FileId = (u64, u64);

/// A file that waits to be sealed.
#[derive(Debug)]
struct Pending {
    file: Arc<File>,
    /// Seals of the images that it belongs to.
    seals: Vec<Weak<Seal>>,
    retry: SealRetry,
    due: Instant,
    counted: Counted,
}

/// An image whose files were not looked at yet.
#[derive(Debug)]
struct Arrived {
    seal: Weak<Seal>,
    frozen: Frozen,
    due: Instant,
    counted: Counted,
}

#[derive(Debug, Default)]
struct Queue {
    arrived: Vec<Arrived>,
    files: BTreeMap<FileId, Pending>,
    /// Time at which the thread wakes up by itself; `None` where it waits for others.
    wakes: Option<Instant>,
    is_closed: bool,
}

impl Queue {
    fn next(&self) -> Option<Instant> {
        self.arrived.iter().map(|arrived| arrived.due).chain(self.files.values().map(|file| file.due)).min()
    }

    /// Has a file wait. Where it waits already, for another image, that one's attempts go on for both.
    fn put(&mut self, id: FileId, pending: Pending) {
        match self.files.entry(id) {
            Entry::Vacant(place) => drop(place.insert(pending)),
            Entry::Occupied(mut place) => place.get_mut().seals.extend(pending.seals),
        }
    }
}

/// An image whose seal was decided a moment ago.
#[derive(Debug)]
struct Decided {
    seal: Arc<Seal>,
    /// Reason why it can't be sealed; `None` where it is.
    refused: Option<String>,
}

/// Queue of a platform's images that are not sealed yet.
#[derive(Debug, Default)]
pub(super) struct Seals {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Seals {
    /// Has the files of an image sealed in the background. Here the kernel is asked for their seals alone,
    /// which takes no time: the copies run by now.
    fn add(&self, seal: &Arc<Seal>, frozen: Frozen) {
        let due = Instant::now() + GRACE;
        // Most are those of earlier images, which are sealed. What can't be looked at is refused later.
        let unsealed = frozen.files.iter().filter(|file| !memory::is_sealed(file).unwrap_or(false));
        let counted = frozen.unsealed.count(unsealed.count());
        let mut queue = lock(&self.queue);
        if queue.is_closed {
            seal.decide(Err(STOPPING.to_owned()));
            return;
        }
        queue.arrived.push(Arrived { seal: Arc::downgrade(seal), frozen, due, counted });
        let is_late = queue.wakes.is_none_or(|wakes| wakes > due);
        drop(queue);
        if is_late {
            self.changed.notify_all();
        }
    }

    /// Tries the files that are due, or all of one VM's forks, and gives the images that were decided by
    /// that.
    fn work(&self, of: Option<&Unsealed>) -> Vec<Decided> {
        let (mut decided, now) = (Vec::new(), Instant::now());
        let is_wanted = |due: Instant, unsealed: &Unsealed| match of {
            Some(of) => Arc::ptr_eq(&of.0, &unsealed.0),
            None => due <= now,
        };
        let arrived: Vec<_> = {
            let mut queue = lock(&self.queue);
            queue.arrived.extract_if(.., |arrived| is_wanted(arrived.due, &arrived.frozen.unsealed)).collect()
        };
        for arrived in arrived {
            self.look_at(arrived, now, &mut decided);
        }
        let due: Vec<_> = {
            let mut queue = lock(&self.queue);
            queue.files.extract_if(.., |_, file| is_wanted(file.due, &file.counted.of)).collect()
        };
        for (id, pending) in due {
            self.try_one(id, pending, &mut decided);
        }
        decided
    }

    /// Has those files of an image wait that are not sealed yet.
    fn look_at(&self, arrived: Arrived, now: Instant, decided: &mut Vec<Decided>) {
        let Arrived { seal, frozen: Frozen { files, ram_bytes, unsealed, .. }, counted, .. } = arrived;
        // All those that share it have ended.
        let Some(seal) = seal.upgrade() else { return };
        let mut unsealed_files = Vec::new();
        for file in files {
            match memory::is_sealed(&file).and_then(|is_sealed| Ok((is_sealed, id(&file)?))) {
                Ok((true, _)) => {}
                Ok((false, id)) => unsealed_files.push((id, file)),
                Err(error) => return refuse(seal, chain(&error), decided),
            }
        }
        unsealed_files.sort_by_key(|(id, _)| *id);
        unsealed_files.dedup_by_key(|(id, _)| *id);
        if seal.begin(unsealed_files.len()) {
            decided.push(Decided { seal, refused: None });
            return;
        }
        let mut queue = lock(&self.queue);
        for (id, file) in unsealed_files {
            let (seals, retry) = (vec![Arc::downgrade(&seal)], SealRetry::new(now, ram_bytes));
            queue.put(id, Pending { file, seals, retry, due: now, counted: unsealed.count(1) });
        }
        drop((queue, counted));
    }

    /// Tries to seal one file, and has it wait again where the kernel refuses that for now.
    fn try_one(&self, id: FileId, mut pending: Pending, decided: &mut Vec<Decided>) {
        pending.seals.retain(|seal| seal.strong_count() > 0);
        if pending.seals.is_empty() {
            return;
        }
        let refused = match memory::try_seal(&pending.file) {
            Ok(true) => {
                let seals = pending.seals.iter().filter_map(Weak::upgrade).filter(|seal| seal.one_sealed());
                return decided.extend(seals.map(|seal| Decided { seal, refused: None }));
            }
            Ok(false) => match pending.retry.refused(Instant::now()) {
                Some(pause) => {
                    pending.due = Instant::now() + pause;
                    return lock(&self.queue).put(id, pending);
                }
                None => chain(&memory::Error::Busy),
            },
            Err(error) => chain(&error),
        };
        for seal in pending.seals.iter().filter_map(Weak::upgrade) {
            refuse(seal, refused.clone(), decided);
        }
    }

    /// Waits until something is due; gives `false` when the platform comes to its end.
    fn wait(&self) -> bool {
        let mut queue = lock(&self.queue);
        loop {
            if queue.is_closed {
                drop(queue);
                // What was worked on meanwhile waits again.
                self.close();
                return false;
            }
            let now = Instant::now();
            let next = queue.next();
            if next.is_some_and(|next| next <= now) {
                // Whoever adds something while the thread works need not wake it up.
                queue.wakes = Some(now);
                return true;
            }
            queue.wakes = next;
            queue = self.sleep(queue, next.map(|next| next - now));
        }
    }

    fn sleep<'q>(&'q self, queue: MutexGuard<'q, Queue>, limit: Option<Duration>) -> MutexGuard<'q, Queue> {
        match limit {
            Some(limit) => self.changed.wait_timeout(queue, limit).unwrap_or_else(PoisonError::into_inner).0,
            None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// Drops all that wait, and ends the thread.
    pub(super) fn close(&self) {
        let mut queue = lock(&self.queue);
        queue.is_closed = true;
        let (arrived, files) = (std::mem::take(&mut queue.arrived), std::mem::take(&mut queue.files));
        drop(queue);
        self.changed.notify_all();
        let seals =
            arrived.iter().map(|arrived| &arrived.seal).chain(files.values().flat_map(|file| &file.seals));
        for seal in seals.filter_map(Weak::upgrade) {
            seal.decide(Err(STOPPING.to_owned()));
        }
    }
}

fn refuse(seal: Arc<Seal>, why: String, decided: &mut Vec<Decided>) {
    if seal.decide(Err(why.clone())) {
        decided.push(Decided { seal, refused: Some(why) });
    }
}

fn id(file: &File) -> Result<FileId, memory::Error> {
    let name = || "from another process".to_owned();
    let failed = |source| memory::Error::File { operation: "look at", name: name(), source };
    let metadata = file.metadata().map_err(failed)?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Platform {
    /// Starts the thread that seals images.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub(super) fn seal_in_background(self: &Arc<Self>) -> Result<(), Error> {
        let platform = Arc::downgrade(self);
        let seal = move || {
            while let Some(platform) = platform.upgrade().filter(|platform| platform.seals.wait()) {
                platform.decided(platform.seals.work(None));
            }
        };
        threads::background("seals", seal).map(drop).map_err(Error::Start)
    }

    /// Has the image of a certain fork sealed. From here on its parent counts among the VMs that share it.
    pub(super) fn seal(&self, seal: &Arc<Seal>, frozen: Frozen) {
        self.registry.shares(frozen.parent, seal);
        self.seals.add(seal, frozen);
    }

    /// Checks whether a VM may fork again whose earlier images may not be sealed yet. Where too many files
    /// are not, they are tried at once.
    ///
    /// # Errors
    /// [`Error::Unsealed`].
    pub(super) fn check_unsealed(&self, unsealed: &Unsealed) -> Result<(), Error> {
        if !unsealed.are_many() {
            return Ok(());
        }
        self.decided(self.seals.work(Some(unsealed)));
        if unsealed.are_many() { Err(Error::Unsealed(MAX_UNSEALED)) } else { Ok(()) }
    }

    fn decided(&self, decided: Vec<Decided>) {
        for Decided { seal, refused } in decided {
            let out = self.images.decided(&seal, refused.is_none());
            self.release(out);
            let Some(why) = refused else { continue };
            let why = format!(
                "{why}; a guest may have broken out into its node: start a new VM, and don't trust this one"
            );
            for clone in std::mem::take(&mut lock(&seal.state).page_servers) {
                self.page_servers.remove(clone);
            }
            let vms = self.registry.end_sharing(&seal, &ExitReason::Unsealed(why.as_str().into()));
            tracing::error!(
                vms = vms.join(", "),
                why,
                "VMs are ended, for the image that they share could be changed"
            );
        }
    }
}

#[cfg(test)]
#[path = "seals_test.rs"]
mod tests;
