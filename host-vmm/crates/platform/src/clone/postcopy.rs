//! Postcopy: the memory of a clone that is received while the clone runs.
//!
//! ```text
//!  guest touches a page ──► fault ──►  postcopy  ── asks for its chunk ──►  source
//!  goes on              ◄── wakes ───  writes it to the layer's file  ◄──
//!                                      meanwhile: all other chunks, in order
//!                                      in the end: compares all that is there, seals the files
//! ```
//!
//! Chunks have positions here: they are numbered through all layers, whether there is something in them or
//! not, since that is not known yet. Until all is there, the clone depends on its source. If that is gone,
//! the clone ends: it never runs with memory that is not its own.

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use base::{error::chain, sync::lock, threads};
use capsule::{
    self, CHUNK_BYTES, CHUNK_PAGES, Capsule, Chunk, Description, Digests, LayerManifest, Manifest,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};
use rustix::fs::{FallocateFlags, fallocate};
use types::PAGE_BYTES;
use vmm::memory::{self, Budget, Faults, Grant, Image, Layer};

use super::page_server::{Error as PageError, PageClient};

/// Chunks that are asked for at once where nobody waits for one.
const BATCH: usize = 32;

/// How long copies have to themselves, once they run, until all else comes.
const GRACE: Duration = Duration::from_millis(20);

/// How long it is waited for faults, until it is looked whether there is anything else to do.
const POLL_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes of memory for each chunk beside its content: in the manifest of what has come, in the source's, and
/// in that as it was sent.
const CHUNK_COST: u64 = 3 * size_of::<Chunk>() as u64;

/// Why a memory can't be filled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source does not give it.
    #[error("the source of its memory is gone")]
    Source(#[from] PageError),
    /// What came makes no sense, or there is no memory for it.
    #[error("the memory that came can't be used")]
    Capsule(#[from] capsule::Error),
    /// A page can't be made, or a fault not be dealt with.
    #[error("can't deal with a fault")]
    Memory(#[from] memory::Error),
    /// Somebody else has come to an end with it.
    #[error("the transfer of its memory has ended already")]
    Over,
    /// What came is not what the source has.
    #[error("the memory that was received differs from the source's")]
    Different,
    /// Memory is there that nobody has put there.
    #[error(
        "a node has changed the memory that it runs in, or this kernel fills more of it than one page at a time"
    )]
    Changed,
    /// Nobody could tell what copies lack.
    #[error(
        "this host has no /dev/userfaultfd, or this user may not open it, and a clone can't depend on its source so"
    )]
    NoFaults(#[source] io::Error),
    /// Memory can't be filled page by page.
    #[error(
        "this kernel fills shared memory by huge pages (see shmem_enabled), and a clone can't depend on its source so"
    )]
    HugePages,
}

/// Observer of a memory, who is told what becomes of it: one of the VMs that run in it.
pub trait MemoryObserver: std::fmt::Debug + Send + Sync {
    /// All of it is there.
    fn is_whole(&self);
    /// It will not come any more.
    fn is_lost(&self, why: &str);
}

/// VM that runs in the memory, and depends on it.
#[derive(Debug)]
struct DependentVm {
    faults: Faults,
    /// Address of the memory in the VM's process.
    start: u64,
    observer: Arc<dyn MemoryObserver>,
}

/// Memory of a lazy clone, from its first chunks to the end of its transfer.
#[derive(Debug)]
pub struct PostcopyMemory {
    description: Description,
    files: Vec<Arc<File>>,
    /// Where each page of the guest's memory is.
    image: Image,
    positions: Positions,
    /// Positions of the chunks that were received: those with the same remainder together.
    received: [Mutex<BTreeSet<u32>>; 16],
    vms: Mutex<Vec<Arc<DependentVm>>>,
    /// Written to when there is another VM, or an end.
    wake_event: EventFd,
    outcome: OnceLock<Result<(), String>>,
    missing: AtomicU64,
    /// Memory for what tells of chunks.
    _grant: Grant,
}

impl PostcopyMemory {
    /// An empty memory, for all of which there is room in the budget: what is in it is not known yet.
    ///
    /// # Errors
    /// [`Error`] where the description is none of a memory, or there can be no files for it, or no room.
    pub fn new(description: Description, budget: &Budget) -> Result<Self, Error> {
        check_single_pages()?;
        memory::faults::device().map(drop).map_err(Error::NoFaults)?;
        let memory = &description.memory;
        let bytes = |layer: &LayerManifest| layer.file_pages.saturating_mul(PAGE_BYTES);
        let positions = Positions::of(memory);
        let cost = u64::from(positions.count()).saturating_mul(CHUNK_COST);
        let all = memory.layers.iter().fold(cost, |sum, layer| sum.saturating_add(bytes(layer)));
        let mut grant = budget.reserve(all).map_err(capsule::Error::from)?;
        let file =
            |layer: &LayerManifest| Ok(Arc::new(memory::fillable("vm-lazy", layer.file_pages * PAGE_BYTES)?));
        let files: Vec<Arc<File>> = memory.layers.iter().map(file).collect::<Result<_, memory::Error>>()?;
        memory.layers.iter().zip(&files).for_each(|(layer, file)| grant.pass_on(file, bytes(layer)));
        let layers = memory.layers.iter().zip(&files);
        let layer = |(layer, file): (&LayerManifest, &Arc<File>)| {
            Arc::new(Layer { file: Arc::clone(file), runs: layer.runs.clone() })
        };
        let image = Image::new(memory.pages, layers.map(layer).collect())?;
        let wake_event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let wake_event = wake_event
            .map_err(|errno| memory::Error::Faults { operation: "get ready for", source: errno.into() })?;
        Ok(Self {
            files,
            image,
            received: Default::default(),
            missing: AtomicU64::new(u64::from(positions.count())),
            positions,
            vms: Mutex::default(),
            wake_event,
            outcome: OnceLock::new(),
            description,
            _grant: grant,
        })
    }

    /// What is said of it.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// What copies need. They can read its memory, and not write to it.
    ///
    /// # Errors
    /// [`Error::Capsule`].
    pub fn capsule(&self) -> Result<Capsule, Error> {
        let files = self.files.iter().map(|file| memory::read_only(file).map(Arc::new));
        let files = files.collect::<Result<_, memory::Error>>()?;
        Ok(Capsule::from_description(&self.description, files)?)
    }

    /// Bytes of memory of which it is not known yet what is there.
    pub fn missing_bytes(&self) -> u64 {
        self.missing.load(Ordering::Relaxed) * CHUNK_BYTES
    }

    /// Whether all of it is there, or will not be.
    pub fn is_over(&self) -> bool {
        self.outcome.get().is_some()
    }

    /// Takes a chunk in.
    ///
    /// # Errors
    /// [`Error::Capsule`] where it can't be one of this memory, or there is no memory for it.
    pub fn put(&self, position: u32, data: &[u8]) -> Result<(), Error> {
        let (layer, number) =
            self.positions.find(position).ok_or(capsule::Error::Invalid("there is no such chunk"))?;
        let mut received = self.received(position);
        if !received.contains(&position) {
            // A node that reads where nobody watches makes an empty page be there, for all others too.
            let start = u64::from(number) * CHUNK_BYTES;
            if memory::has_data(&self.files[layer], start..start + CHUNK_BYTES)? {
                return Err(Error::Changed);
            }
            self.description.memory.layers[layer].write_unknown(&self.files[layer], number, data)?;
            received.insert(position);
            self.missing.fetch_sub(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn is_there(&self, position: u32) -> bool {
        self.received(position).contains(&position)
    }

    fn received(&self, position: u32) -> MutexGuard<'_, BTreeSet<u32>> {
        lock(&self.received[position as usize % self.received.len()])
    }

    /// Deals with the faults of one more VM, in whose process the memory is at this address.
    pub fn add_vm(&self, faults: Faults, start: u64, observer: Arc<dyn MemoryObserver>) {
        let mut vms = lock(&self.vms);
        match self.outcome.get() {
            Some(outcome) => notify(&*observer, outcome),
            None => vms.push(Arc::new(DependentVm { faults, start, observer })),
        }
        drop(vms);
        self.wake();
    }

    fn wake(&self) {
        if let Err(errno) = self.wake_event.write(1) {
            tracing::debug!(%errno, "who deals with faults hears of a change a second later");
        }
    }

    /// Says that nobody needs it any more.
    pub fn cancel(&self) {
        self.decide(Err("its clone was called off".to_owned()));
    }

    /// Says what becomes of it, once.
    fn decide(&self, outcome: Result<(), String>) {
        let vms = {
            let mut vms = lock(&self.vms);
            if self.outcome.set(outcome).is_err() {
                return;
            }
            std::mem::take(&mut *vms)
        };
        if let Some(outcome) = self.outcome.get() {
            vms.iter().for_each(|vm| notify(&*vm.observer, outcome));
        }
        self.wake();
    }

    /// Deals with faults, in the background: what somebody waits for is had from `source`.
    ///
    /// # Errors
    /// Where there is no thread for it.
    pub fn serve_faults(self: &Arc<Self>, mut source: PageClient) -> io::Result<()> {
        let postcopy = Arc::clone(self);
        let deal = move || {
            while !postcopy.is_over() {
                if let Err(error) = postcopy.deal_with_faults(&mut source) {
                    postcopy.decide(Err(chain(&error)));
                }
            }
        };
        thread::Builder::new().name("faults".into()).spawn(deal).map(drop)
    }

    /// Has all come from `source` that nobody waits for, in the background. Once all is there, that is given
    /// to `whole`.
    pub fn receive_in_background(
        self: &Arc<Self>,
        mut source: PageClient,
        whole: impl FnOnce(Capsule, Description) + Send + 'static,
    ) {
        let postcopy = Arc::clone(self);
        let started = threads::background("postcopy", move || {
            thread::sleep(GRACE);
            match postcopy.stream(&mut source) {
                Ok((capsule, description)) => {
                    postcopy.decide(Ok(()));
                    whole(capsule, description);
                }
                Err(error) => postcopy.decide(Err(chain(&error))),
            }
        });
        if let Err(error) = started {
            self.decide(Err(format!("can't start a thread that has its memory come: {error}")));
        }
    }

    /// Waits for faults, and has done what they wait for.
    fn deal_with_faults(&self, source: &mut PageClient) -> Result<(), Error> {
        let vms = lock(&self.vms).clone();
        let mut fds = vec![PollFd::new(self.wake_event.as_fd(), PollFlags::POLLIN)];
        fds.extend(vms.iter().map(|vm| PollFd::new(vm.faults.as_fd(), PollFlags::POLLIN)));
        let limit = PollTimeout::try_from(POLL_TIMEOUT).unwrap_or(PollTimeout::NONE);
        match poll(&mut fds, limit) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => {
                return Err(memory::Error::Faults { operation: "wait for", source: errno.into() }.into());
            }
        }
        match self.wake_event.read() {
            // Nobody has written to it.
            Ok(_) | Err(nix::Error::EAGAIN) => {}
            Err(errno) => {
                return Err(memory::Error::Faults { operation: "hear of", source: errno.into() }.into());
            }
        }
        let is_ready = fds[1..].iter().map(|fd| fd.any().unwrap_or(true));
        let mut waiting = Vec::new();
        for (vm, _) in vms.iter().zip(is_ready).filter(|(_, is_ready)| *is_ready) {
            match vm.faults.read() {
                Ok(addresses) => waiting.extend(addresses.into_iter().map(|address| (vm, address))),
                // Its process is gone.
                Err(_) => lock(&self.vms).retain(|other| !Arc::ptr_eq(other, vm)),
            }
        }
        let places: Vec<_> =
            waiting.iter().map(|(vm, address)| self.place(address.wrapping_sub(vm.start))).collect();
        let position = |place: &Option<(usize, u64)>| {
            let (layer, file_page) = (*place)?;
            self.positions.of_page(layer, file_page)
        };
        let mut wanted: Vec<u32> =
            places.iter().filter_map(position).filter(|chunk| !self.is_there(*chunk)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        if !wanted.is_empty() {
            source.fetch(&wanted, true, |chunk, data| self.put(chunk, data))?;
        }
        for ((vm, address), place) in waiting.iter().zip(places) {
            let Some((layer, file_page)) = place else {
                lock(&self.vms).retain(|other| !Arc::ptr_eq(other, vm));
                vm.observer.is_lost("it waits for memory that it does not have");
                continue;
            };
            make(&self.files[layer], file_page)?;
            // Who is gone waits for nothing.
            drop(vm.faults.wake(address - address % PAGE_BYTES, PAGE_BYTES));
        }
        Ok(())
    }

    /// Layer, and page of its file, of what is at an offset of the guest's memory.
    fn place(&self, offset: u64) -> Option<(usize, u64)> {
        self.image.find(offset / PAGE_BYTES)
    }

    /// Has all come that is not there yet, checks it, and seals it.
    fn stream(&self, source: &mut PageClient) -> Result<(Capsule, Description), Error> {
        let all: Vec<u32> = (0..self.positions.count()).collect();
        for batch in all.chunks(BATCH) {
            let wanted: Vec<u32> = batch.iter().copied().filter(|chunk| !self.is_there(*chunk)).collect();
            if self.is_over() {
                return Err(Error::Over);
            }
            if !wanted.is_empty() {
                source.fetch(&wanted, false, |chunk, data| self.put(chunk, data))?;
            }
        }
        // Both sides look at all of it meanwhile. Nothing was looked at as it came: somebody may have waited
        // for it.
        let (here, there) = thread::scope(|scope| {
            let here = scope.spawn(|| Manifest::of(&self.image, &Digests::default()));
            let there = source.manifest(&self.description.memory);
            (
                here.join().unwrap_or(Err(capsule::Error::Invalid("a thread that looked at it panicked"))),
                there,
            )
        });
        let memory = here?;
        if memory != there? {
            return Err(Error::Different);
        }
        let mut description = self.description.clone();
        description.memory = memory;
        let ram_bytes = self.image.pages().saturating_mul(PAGE_BYTES);
        self.files.iter().try_for_each(|file| memory::seal_filled(file, ram_bytes))?;
        source.is_done();
        Ok((Capsule::from_description(&description, self.files.clone())?, description))
    }
}

fn notify(observer: &dyn MemoryObserver, outcome: &Result<(), String>) {
    match outcome {
        Ok(()) => observer.is_whole(),
        Err(why) => observer.is_lost(why),
    }
}

/// Makes a page of a file be there that is zero, and has not come therefore.
fn make(file: &File, page: u64) -> Result<(), memory::Error> {
    fallocate(file, FallocateFlags::empty(), page * PAGE_BYTES, PAGE_BYTES)
        .map_err(|errno| memory::Error::Faults { operation: "make a page after", source: errno.into() })
}

/// Checks that one page of a memory file can be there, and the next one not.
fn check_single_pages() -> Result<(), Error> {
    static ARE_SINGLE: OnceLock<bool> = OnceLock::new();
    if ARE_SINGLE.get() == Some(&true) {
        return Ok(());
    }
    let file = memory::fillable("vm-probe", 4 << 20)?;
    let write = |source| memory::Error::Faults { operation: "write to memory before", source };
    file.write_all_at(&[0], 0).map_err(write)?;
    let are_single = !memory::has_data(&file, PAGE_BYTES..4 << 20)?;
    if *ARE_SINGLE.get_or_init(|| are_single) { Ok(()) } else { Err(Error::HugePages) }
}

/// The positions of chunks: numbered through all layers.
#[derive(Debug)]
pub(super) struct Positions {
    /// First position of each layer, and the one behind the last.
    first: Vec<u32>,
}

impl Positions {
    pub(super) fn of(memory: &Manifest) -> Self {
        let mut first = vec![0u32];
        for layer in &memory.layers {
            let chunks = u32::try_from(layer.file_pages.div_ceil(CHUNK_PAGES)).unwrap_or(u32::MAX);
            first.push(first.last().copied().unwrap_or(0).saturating_add(chunks));
        }
        Self { first }
    }

    pub(super) fn count(&self) -> u32 {
        self.first.last().copied().unwrap_or(0)
    }

    /// The layer of a chunk, and its number there.
    pub(super) fn find(&self, position: u32) -> Option<(usize, u32)> {
        let layer = self.first.partition_point(|first| *first <= position).checked_sub(1)?;
        (position < self.count()).then(|| (layer, position - self.first[layer]))
    }

    /// The chunk with a page of the guest's memory.
    pub(super) fn of_guest_page(&self, image: &Image, page: u64) -> Option<u32> {
        let (layer, file_page) = image.find(page)?;
        self.of_page(layer, file_page)
    }

    /// The chunk with a page of a layer's file.
    fn of_page(&self, layer: usize, file_page: u64) -> Option<u32> {
        let number = u32::try_from(file_page / CHUNK_PAGES).ok()?;
        self.first.get(layer)?.checked_add(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_numbered_through_all_layers() {
        let layer = |file_pages| LayerManifest { file_pages, runs: Vec::new(), chunks: Vec::new() };
        let positions =
            Positions::of(&Manifest { pages: 1, layers: vec![layer(64), layer(65), layer(0), layer(1)] });
        assert_eq!(positions.count(), 4);
        let found: Vec<_> = (0..5).map(|position| positions.find(position)).collect();
        assert_eq!(found, [Some((0, 0)), Some((1, 0)), Some((1, 1)), Some((3, 0)), None]);
        assert_eq!(positions.of_page(1, 64), Some(2));
    }
}
