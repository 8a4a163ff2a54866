//! Images that are kept: each can be launched at any time, whether its parent is there or not.
//!
//! An image is the files of its memory's layers and a state. The platform looks into neither: both come from
//! a node, and the warm VM that takes them checks them. Layers are shared between images that build on each
//! other, and with the VMs that run from them; the memory is free when the last of these is gone.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    str::FromStr,
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use base::{clock::wall_clock_ns, sync::lock};
use capsule::{
    self, Capsule, ChunkSource, Description, Digests, ImageMetadata, Incompatibility, Incompatible, file,
};
use cluster::member::MAX_IMAGES;
use types::{VmIdentity, VmShape, new_id};
use uuid::Uuid;
use vmfork_abi::is_vm_type;

use super::{
    Error, Platform,
    fork::Fork,
    launcher::{Launch, slots},
    seals::Seal,
    working_sets::WorkingSetHistory,
};

/// Stands for all types in `--keep`.
const ALL_TYPES: &str = "*";

/// Longest wait of an operator for an image that is not sealed yet.
const SEALED_WITHIN: Duration = Duration::from_secs(30);

/// Bytes of a block that `stat` counts.
const BLOCK_BYTES: u64 = 512;

/// Which images to keep, as `--keep` gives it: the latest of a type, or the latest few: `web`, `web:3`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    vm_type: String,
    most: usize,
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (vm_type, most) = text.split_once(':').unwrap_or((text, "1"));
        if vm_type != ALL_TYPES && !is_vm_type(vm_type) {
            return Err(format!("{vm_type:?} is no VM type; * stands for all"));
        }
        let most = most.parse().ok().filter(|most| *most > 0);
        let most = most.ok_or_else(|| format!("{text:?} must be TYPE or TYPE:NUMBER"))?;
        Ok(Self { vm_type: vm_type.to_owned(), most })
    }
}

/// Image of a fork that is to be kept once the fork is certain.
#[derive(Debug)]
pub(super) struct PendingImage {
    vm_type: String,
    original: VmIdentity,
    config: VmShape,
    seq: u64,
    files: Vec<Arc<File>>,
    history: Arc<WorkingSetHistory>,
    has_foreign_cpu: bool,
}

impl PendingImage {
    /// The image of these copies, in `files`.
    pub(super) fn new(launch: Launch<'_>, files: Vec<Arc<File>>) -> Self {
        let Launch { config, original, vm_type, seq, history, has_foreign_cpu, .. } = launch;
        let (vm_type, original, history) = (vm_type.to_owned(), original.clone(), Arc::clone(history));
        Self { vm_type, original, config, seq, files, history, has_foreign_cpu }
    }
}

/// Most images that stay after clones of them have come here.
const MAX_RECEIVED: usize = 4;

/// For how long: the next clone of the lineage is sent what it does not have in common with them.
const RECEIVED_FOR: Duration = Duration::from_secs(600);

/// An image that is kept, or has come here with clones of it.
#[derive(Debug)]
pub(super) struct Image {
    capsule: Capsule,
    /// What is known of its copies.
    history: Arc<WorkingSetHistory>,
    /// Whether they were shown another CPU than this platform's guests are.
    has_foreign_cpu: bool,
    /// Whether its files are sealed: before, nobody gets it.
    seal: Arc<Seal>,
    /// As it is sent to others, once it was.
    chunk_source: OnceLock<Arc<ChunkSource>>,
}

impl Image {
    /// One whose files are sealed.
    fn new(capsule: Capsule, history: Arc<WorkingSetHistory>, has_foreign_cpu: bool) -> Self {
        Self { capsule, history, has_foreign_cpu, seal: Seal::sealed(), chunk_source: OnceLock::new() }
    }

    /// Whether its files are sealed.
    pub(super) fn seal(&self) -> &Seal {
        &self.seal
    }

    /// Whether its copies were shown another CPU than this platform's guests are.
    pub(super) fn has_foreign_cpu(&self) -> bool {
        self.has_foreign_cpu
    }

    /// Its ID.
    pub(super) fn id(&self) -> Uuid {
        self.capsule.metadata.id
    }

    /// What copies need, and what is known of them.
    pub(super) fn parts(&self) -> (&Capsule, &Arc<WorkingSetHistory>) {
        (&self.capsule, &self.history)
    }

    /// As it is sent to others.
    pub(super) fn chunk_source(&self, digests: &Digests) -> Result<Arc<ChunkSource>, capsule::Error> {
        if let Some(chunk_source) = self.chunk_source.get() {
            return Ok(Arc::clone(chunk_source));
        }
        let chunk_source = Arc::new(ChunkSource::of(&self.capsule, digests)?);
        Ok(Arc::clone(self.chunk_source.get_or_init(|| chunk_source)))
    }
}

/// The images of a platform.
#[derive(Debug)]
pub(super) struct Images {
    /// How many to keep, by type.
    keep: BTreeMap<String, usize>,
    kept: Mutex<KeptImages>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct KeptImages {
    /// Those that the operator wants, oldest first.
    images: Vec<Arc<Image>>,
    /// Those that come to them once they are sealed.
    unsealed: Vec<Arc<Image>>,
    /// Those that have come here with clones, and when they have, oldest first: they stay for a while, or
    /// until others take their place.
    received: Vec<(Instant, Arc<Image>)>,
    /// Whether no more are kept.
    closed: bool,
}

impl Images {
    /// None yet.
    pub(super) fn new(keep: Vec<Keep>) -> Self {
        let keep = keep.into_iter().map(|Keep { vm_type, most }| (vm_type, most)).collect();
        Self { keep, kept: Mutex::default(), changed: Condvar::new() }
    }

    fn most(&self, vm_type: &str) -> usize {
        self.keep.get(vm_type).or_else(|| self.keep.get(ALL_TYPES)).copied().unwrap_or(0)
    }

    /// Whether images of a type are kept.
    pub(super) fn wants(&self, vm_type: &str) -> bool {
        self.most(vm_type) > 0
    }

    /// Adds an image that is kept once it is sealed. Gives back images of the same VM and type that are not
    /// sealed either, and in whose place it would be kept.
    fn add(&self, image: Image) -> Vec<Arc<Image>> {
        let most = self.most(&image.capsule.metadata.vm_type);
        let mut kept = lock(&self.kept);
        if kept.closed {
            return vec![Arc::new(image)];
        }
        let of = |image: &Image| (image.capsule.metadata.original.id, image.capsule.metadata.vm_type.clone());
        let own = of(&image);
        push(&mut kept.unsealed, Arc::new(image), most, |other| of(other) == own)
    }

    /// Keeps the image with this seal, or lets go of it where it can't be sealed. Gives back images that are
    /// not kept any more.
    pub(super) fn decided(&self, seal: &Arc<Seal>, is_sealed: bool) -> Vec<Arc<Image>> {
        let mut kept = lock(&self.kept);
        let decided: Vec<_> = kept.unsealed.extract_if(.., |image| Arc::ptr_eq(&image.seal, seal)).collect();
        let out = if is_sealed {
            let keep = decided.into_iter().map(|image| {
                let (vm_type, most) =
                    (image.capsule.metadata.vm_type.clone(), self.most(&image.capsule.metadata.vm_type));
                push(&mut kept.images, image, most, |other| other.capsule.metadata.vm_type == vm_type)
            });
            keep.flatten().collect()
        } else {
            decided
        };
        drop(kept);
        self.changed.notify_all();
        out
    }

    /// Adds an image that the operator has asked for, and says whether it does: not where it is there
    /// already.
    fn add_loaded(&self, image: Image) -> bool {
        let mut kept = lock(&self.kept);
        let mut others = kept.images.iter().chain(&kept.unsealed);
        let adds = !kept.closed && others.all(|other| other.capsule.metadata.id != image.capsule.metadata.id);
        if adds {
            kept.images.push(Arc::new(image));
        }
        adds
    }

    /// Adds an image that has come with clones, and gives back those that it takes the place of.
    fn add_received(&self, image: &Arc<Image>) -> Vec<Arc<Image>> {
        let mut kept = lock(&self.kept);
        let id = image.capsule.metadata.id;
        if kept.closed {
            return vec![Arc::clone(image)];
        }
        let mut out: Vec<_> =
            kept.received.extract_if(.., |(_, other)| other.capsule.metadata.id == id).collect();
        kept.received.push((Instant::now(), Arc::clone(image)));
        let surplus = kept.received.len().saturating_sub(MAX_RECEIVED);
        out.extend(kept.received.drain(..surplus));
        out.into_iter().map(|(_, image)| image).collect()
    }

    /// Gives back those that have come with clones so long ago that they are not kept for others to come.
    fn evict_received(&self, now: Instant) -> Vec<Arc<Image>> {
        let is_old = |(since, _): &mut (Instant, _)| now.saturating_duration_since(*since) >= RECEIVED_FOR;
        lock(&self.kept).received.extract_if(.., is_old).map(|(_, image)| image).collect()
    }

    /// Gives back the one of those that has come first.
    fn evict_oldest_received(&self) -> Option<Arc<Image>> {
        let received = &mut lock(&self.kept).received;
        (!received.is_empty()).then(|| received.remove(0).1)
    }

    /// All images, the oldest first.
    fn all(&self) -> Vec<Arc<Image>> {
        let KeptImages { images, unsealed, received, .. } = &*lock(&self.kept);
        let is_kept = |id| images.iter().any(|image| image.capsule.metadata.id == id);
        let others =
            received.iter().map(|(_, image)| image).filter(|image| !is_kept(image.capsule.metadata.id));
        let mut all: Vec<_> = images.iter().chain(unsealed).chain(others).cloned().collect();
        all.sort_by_key(|image| image.capsule.metadata.created_ns);
        all
    }

    /// The IDs of the latest ones, as many as others are told of.
    pub(super) fn ids(&self) -> Vec<Uuid> {
        let all = self.all();
        all.iter()
            .rev()
            .filter(|image| image.seal.is_sealed())
            .map(|image| image.id())
            .take(MAX_IMAGES)
            .collect()
    }

    /// As they are sent to others, those of which that is known.
    pub(super) fn chunk_sources(&self) -> Vec<Arc<ChunkSource>> {
        self.all().iter().filter_map(|image| image.chunk_source.get().cloned()).collect()
    }

    /// The image whose ID begins like this.
    pub(super) fn find(&self, id: &str) -> Result<Arc<Image>, Error> {
        let all = self.all();
        let mut found = all
            .iter()
            .filter(|image| !id.is_empty() && image.capsule.metadata.id.to_string().starts_with(id));
        match (found.next(), found.next()) {
            (Some(image), None) => Ok(Arc::clone(image)),
            (None, _) => Err(Error::NoImage(id.to_owned())),
            (Some(_), Some(_)) => Err(Error::Ambiguous(id.to_owned())),
        }
    }

    fn remove(&self, id: Uuid) -> Vec<Arc<Image>> {
        let KeptImages { images, unsealed, received, .. } = &mut *lock(&self.kept);
        let is_it = |image: &Arc<Image>| image.capsule.metadata.id == id;
        let received = received.extract_if(.., |(_, image)| is_it(image)).map(|(_, image)| image);
        let unsealed = unsealed.extract_if(.., |image| is_it(image));
        let out = images.extract_if(.., |image| is_it(image)).chain(unsealed).chain(received).collect();
        self.changed.notify_all();
        out
    }

    /// Lets go of all, and keeps none from now on.
    pub(super) fn close(&self) {
        let mut kept = lock(&self.kept);
        kept.images.clear();
        kept.unsealed.clear();
        kept.received.clear();
        kept.closed = true;
        self.changed.notify_all();
    }

    /// Waits until none is kept, or about to be.
    pub(super) fn wait_empty(&self) {
        let is_any = |kept: &mut KeptImages| !kept.images.is_empty() || !kept.unsealed.is_empty();
        let kept = self.changed.wait_while(lock(&self.kept), is_any);
        drop(kept.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Adds an image to others, of whose kind there are to be `most`, and takes the oldest ones of these out.
fn push(
    images: &mut Vec<Arc<Image>>,
    image: Arc<Image>,
    most: usize,
    is_of_its_kind: impl Fn(&Image) -> bool,
) -> Vec<Arc<Image>> {
    let of_its_kind = images.iter().filter(|other| is_of_its_kind(other)).count();
    let mut surplus = (of_its_kind + 1).saturating_sub(most);
    let out = images.extract_if(.., |other| {
        let out = surplus > 0 && is_of_its_kind(other);
        surplus -= usize::from(out);
        out
    });
    let out = out.collect();
    images.push(image);
    out
}

impl Platform {
    /// The image whose ID begins so, once it is sealed.
    ///
    /// # Errors
    /// [`Error::NoImage`] or [`Error::Ambiguous`]; [`Error::NotSealed`] where it is not sealed within 30 s.
    pub(super) fn sealed_image(&self, id: &str) -> Result<Arc<Image>, Error> {
        let image = self.images.find(id)?;
        match image.seal().wait(SEALED_WITHIN) {
            Ok(()) => Ok(image),
            Err(why) => Err(Error::NotSealed { image: image.id(), why }),
        }
    }

    /// Keeps the image of a fork that is certain, once it is sealed: `state` is what its copies have, taken
    /// before they ran.
    pub(super) fn keep(
        &self,
        pending_image: PendingImage,
        state: Vec<u8>,
        seal: &Arc<Seal>,
    ) -> Result<(), Error> {
        let PendingImage { vm_type, original, config, seq, files, history, has_foreign_cpu } = pending_image;
        let (id, created_ns) = (new_id().map_err(Error::Id)?, wall_clock_ns());
        // For as long as there are copies to come, warm VMs of its shape stand ready.
        self.pool.add_user(config);
        let metadata = ImageMetadata { id, created_ns, vm_type, original, config, seq };
        let image = Image::new(Capsule { metadata, state, files }, history, has_foreign_cpu);
        self.release(self.images.add(Image { seal: Arc::clone(seal), ..image }));
        Ok(())
    }

    /// Takes in an image that has come with clones. It stays for a while, or until others have come.
    pub(super) fn receive(&self, capsule: Capsule, chunk_source: ChunkSource) -> Arc<Image> {
        self.pool.add_user(capsule.metadata.config);
        let has_foreign_cpu = self.has_foreign_cpu(chunk_source.description());
        let image = Image {
            chunk_source: Arc::new(chunk_source).into(),
            ..Image::new(capsule, Arc::default(), has_foreign_cpu)
        };
        let image = Arc::new(image);
        self.release(self.images.add_received(&image));
        image
    }

    /// Lets go of images that have come with clones a while ago. To be called now and then.
    pub(super) fn tend_images(&self) {
        self.release(self.images.evict_received(Instant::now()));
    }

    /// Lets go of images that have come with clones, the oldest first, until so many bytes fit into the
    /// budget, and says whether they do: such images only spare later clones from being sent what they have.
    pub(super) fn make_room(&self, bytes: u64) -> bool {
        if bytes > self.image_memory.limit() {
            return false;
        }
        while self.image_memory.reserve(bytes).is_err() {
            let Some(image) = self.images.evict_oldest_received() else { return false };
            self.release(vec![image]);
        }
        true
    }

    pub(super) fn release(&self, images: Vec<Arc<Image>>) {
        for image in images {
            self.pool.remove_user(image.capsule.metadata.config);
        }
    }

    /// The images, oldest first.
    ///
    /// # Errors
    /// [`Error::Layer`] where a file can't be looked at.
    pub fn images(&self) -> Result<Vec<api::Image>, Error> {
        let kept = self.images.all();
        let mut holders: HashMap<u64, usize> = HashMap::new();
        for image in &kept {
            for (inode, _) in layers(image)? {
                *holders.entry(inode).or_default() += 1;
            }
        }
        kept.iter().map(|image| describe(image, &holders)).collect()
    }

    /// The image whose ID begins like this.
    ///
    /// # Errors
    /// [`Error::NoImage`] or [`Error::Ambiguous`]; [`Error::Layer`] where a file can't be looked at.
    pub fn image(&self, id: &str) -> Result<api::Image, Error> {
        let id = self.images.find(id)?.id();
        let image = self.images()?.into_iter().find(|image| image.id == id);
        image.ok_or_else(|| Error::NoImage(id.to_string()))
    }

    /// Lets go of an image. VMs that run from it go on.
    ///
    /// # Errors
    /// [`Error::NoImage`] or [`Error::Ambiguous`].
    pub fn remove_image(&self, id: &str) -> Result<(), Error> {
        let image = self.images.find(id)?;
        self.release(self.images.remove(image.capsule.metadata.id));
        Ok(())
    }

    /// Writes an image to a file, which may be a smaller one that takes longer.
    ///
    /// # Errors
    /// [`Error::NoImage`], [`Error::Ambiguous`], [`Error::NotSealed`] or [`Error::ImageFile`].
    pub fn save_image(&self, id: &str, path: &Path, compress: bool) -> Result<(), Error> {
        let image = self.sealed_image(id)?;
        file::save_as(&image.capsule, path, compress)
            .map_err(|source| Error::ImageFile { path: path.to_owned(), source })
    }

    /// Keeps the image that a file holds.
    ///
    /// # Errors
    /// [`Error::ImageFile`], or [`Error::Kept`] where it is kept already.
    pub fn load_image(&self, path: &Path) -> Result<api::Image, Error> {
        let failed = |source| Error::ImageFile { path: path.to_owned(), source };
        let file = File::open(path).map_err(|error| failed(capsule::Error::Io("open the file", error)));
        let file = file?;
        self.make_room(file::memory_bytes(&file).map_err(failed)?);
        let capsule = file::load(&file, &self.image_memory).map_err(failed)?;
        let (id, config) = (capsule.metadata.id, capsule.metadata.config);
        let description = capsule.describe_sparse().map_err(failed)?.0;
        self.check_loaded(path, &description)?;
        let has_foreign_cpu = self.has_foreign_cpu(&description);
        // As for one of a fork.
        self.pool.add_user(config);
        if !self.images.add_loaded(Image::new(capsule, Arc::default(), has_foreign_cpu)) {
            self.pool.remove_user(config);
            return Err(Error::Kept(id));
        }
        self.image(&id.to_string())
    }

    /// Checks whether copies of a loaded image can run here. What an older format does not tell is taken for
    /// right: whoever loads a file knows where it comes from.
    fn check_loaded(&self, path: &Path, description: &Description) -> Result<(), Error> {
        let Err(Incompatible(mut differences)) = self.check_compatible(&description.requirements)? else {
            return Ok(());
        };
        differences.retain(|difference| !matches!(difference, Incompatibility::Tsc { needed: None, .. }));
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Unfit { path: path.to_owned(), source: Incompatible(differences) })
    }

    /// Launches copies of an image.
    ///
    /// # Errors
    /// [`Error`]: there is none of them then.
    pub fn spawn(self: &Arc<Self>, id: &str, count: u32) -> Result<Vec<VmIdentity>, Error> {
        let image = self.sealed_image(id)?;
        let (capsule, history) = image.parts();
        let slots = slots(count)?;
        let launch = Launch {
            has_foreign_cpu: image.has_foreign_cpu,
            ..Launch::of_image(&capsule.metadata, history, &slots, count)
        };
        let room = self.reserve(slots.len())?;
        Fork::of_image(self, launch, &capsule.state, &capsule.files, room)?.commit()
    }
}

/// Number and allocated bytes of each file.
fn layers(image: &Image) -> Result<Vec<(u64, u64)>, Error> {
    let look = |file: &Arc<File>| -> io::Result<(u64, u64)> {
        let metadata = file.metadata()?;
        Ok((metadata.ino(), metadata.blocks() * BLOCK_BYTES))
    };
    image.capsule.files.iter().map(look).collect::<io::Result<_>>().map_err(Error::Layer)
}

fn describe(image: &Image, holders: &HashMap<u64, usize>) -> Result<api::Image, Error> {
    let Capsule { metadata: ImageMetadata { id, created_ns, vm_type, original, config, .. }, state, .. } =
        &image.capsule;
    let layers = layers(image)?;
    let bytes = |shared: bool| {
        let held =
            layers.iter().filter(|(inode, _)| (holders.get(inode).copied().unwrap_or(0) > 1) == shared);
        held.map(|(_, bytes)| bytes).sum()
    };
    Ok(api::Image {
        id: *id,
        vm_type: vm_type.clone(),
        original: original.id,
        original_name: original.name.clone(),
        generation: original.generation.saturating_add(1),
        vcpus: config.vcpus,
        ram_bytes: config.ram_bytes,
        created_ms: created_ns / 1_000_000,
        layers: layers.len(),
        sealed: image.seal.is_sealed(),
        state_bytes: state.len() as u64,
        private_bytes: bytes(false),
        shared_bytes: bytes(true),
    })
}

#[cfg(test)]
#[path = "images_test.rs"]
mod tests;
