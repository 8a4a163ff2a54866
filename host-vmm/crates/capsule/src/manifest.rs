//! What a capsule says of its memory: layers, the pages that each holds, and a digest of each chunk of them.
//!
//! A layer's file is cut into chunks of 256 KiB. A chunk of nothing but zero bytes is left out, and so are
//! the zero pages of the others. Equal chunks have equal digests, wherever they come from: who has one
//! already need not be sent it.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex},
};

use base::sync::lock;
use serde::{Deserialize, Serialize};
use types::{MAX_RAM_BYTES, PAGE_BYTES};
use vmm::memory::{self, Image, Layer, MAX_EXTENTS, MAX_LAYERS, Run};

use super::{CHUNK_BYTES, CHUNK_PAGES, Chunk, Error, chunk, parallel};

/// Question whether anybody still wants the manifest that is being made.
pub type IsWanted<'w> = &'w (dyn Fn() -> bool + Sync);

/// One layer of a memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerManifest {
    /// Size of its file in pages.
    pub file_pages: u64,
    /// Which pages of the guest's memory it holds, and where in the file.
    pub runs: Vec<Run>,
    /// What is in the file, in order.
    pub chunks: Vec<Chunk>,
}

impl LayerManifest {
    /// A layer without its chunks: what is in it is not looked at.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sparse(layer: &Layer) -> Result<Self, Error> {
        let bytes = layer.file.metadata().map_err(|error| Error::Io("look at a layer", error))?.len();
        Ok(Self { file_pages: bytes.div_ceil(PAGE_BYTES), runs: layer.runs.clone(), chunks: Vec::new() })
    }

    /// Size of its pages that are not zero in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.chunks.iter().map(Chunk::data_bytes).sum()
    }

    /// Size of the chunk with this number in bytes: the last one may be shorter.
    pub fn chunk_bytes(&self, number: u32) -> u64 {
        CHUNK_BYTES.min((self.file_pages * PAGE_BYTES).saturating_sub(u64::from(number) * CHUNK_BYTES))
    }

    /// Reads the chunk with this number, whatever it holds, from the layer's file, and appends it to `data`:
    /// which pages are not zero (8 bytes, little-endian), and these, one behind another.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_unknown(&self, file: &File, number: u32, data: &mut Vec<u8>) -> Result<(), Error> {
        let start = data.len();
        data.extend_from_slice(&[0; size_of::<u64>()]);
        let offset = u64::from(number) * CHUNK_BYTES;
        // Where nothing is there, it is read at once that there is nothing. To ask for that takes longer:
        // Linux looks for what comes next up to the end of the file, through all pages that are there and
        // were never written to.
        let pages = chunk::read_piece(file, offset, self.chunk_bytes(number), data)?;
        data[start..start + size_of::<u64>()].copy_from_slice(&pages.to_le_bytes());
        Ok(())
    }

    /// Writes what [`LayerManifest::read_unknown`] has read to the layer's file.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is none, or not of this layer; [`Error::Io`].
    pub fn write_unknown(&self, file: &File, number: u32, data: &[u8]) -> Result<(), Error> {
        let (pages, data) = data.split_first_chunk().ok_or(Error::Invalid("a chunk is cut off"))?;
        let offset = u64::from(number) * CHUNK_BYTES;
        chunk::write_piece(file, offset, self.chunk_bytes(number), u64::from_le_bytes(*pages), data)
    }
}

/// A memory: its layers, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Size of the guest's memory in pages.
    pub pages: u64,
    /// The layers.
    pub layers: Vec<LayerManifest>,
}

impl Manifest {
    /// The one of an image. Layers that `digests` knows are not read again.
    ///
    /// # Errors
    /// [`Error::Io`] where a layer can't be read.
    pub fn of(image: &Image, digests: &Digests) -> Result<Self, Error> {
        Self::of_while(image, digests, &|| true)
    }

    /// The same, for as long as somebody wants it.
    ///
    /// # Errors
    /// As [`Manifest::of`], and [`Error::CalledOff`].
    pub fn of_while(image: &Image, digests: &Digests, is_wanted: IsWanted<'_>) -> Result<Self, Error> {
        let layers = image.layers().iter().map(|layer| {
            let file = digests.of(&layer.file, is_wanted)?;
            Ok(LayerManifest {
                file_pages: file.pages,
                runs: layer.runs.clone(),
                chunks: file.chunks.clone(),
            })
        });
        Ok(Self { pages: image.pages(), layers: layers.collect::<Result<_, Error>>()? })
    }

    /// All chunks, layer by layer, each with the number of its layer.
    pub fn chunks(&self) -> impl Iterator<Item = (usize, &Chunk)> {
        self.layers
            .iter()
            .enumerate()
            .flat_map(|(number, layer)| layer.chunks.iter().map(move |chunk| (number, chunk)))
    }

    /// Size of all pages that are not zero in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.chunks().map(|(_, chunk)| chunk.data_bytes()).sum()
    }

    /// Size of the layers' files in bytes: what is in them at most.
    pub fn file_bytes(&self) -> u64 {
        self.layers
            .iter()
            .fold(0, |sum: u64, layer| sum.saturating_add(layer.file_pages.saturating_mul(PAGE_BYTES)))
    }

    /// Size in bytes, as it travels, of the longest manifest with the same layers, whatever is in these.
    pub fn most_bytes(&self) -> u64 {
        self.layers.iter().fold(HEAD_LENGTH, |sum, layer| {
            let runs = (layer.runs.len() as u64).saturating_mul(RUN_LENGTH);
            let chunks = layer.file_pages.div_ceil(CHUNK_PAGES).saturating_mul(CHUNK_LENGTH);
            sum.saturating_add(LAYER_LENGTH).saturating_add(runs).saturating_add(chunks)
        })
    }

    /// Checks it, since it comes from elsewhere: layers of a possible size, chunks that are sorted, within
    /// them, and not empty. Whether the layers make an image is for [`Image::new`] to say.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn check(&self) -> Result<(), Error> {
        if self.layers.len() > MAX_LAYERS || self.pages > MAX_RAM_BYTES / PAGE_BYTES {
            return Err(Error::Invalid("the memory is too large, or has too many layers"));
        }
        let all_pages = self.layers.iter().try_fold(0u64, |all, layer| all.checked_add(layer.file_pages));
        if all_pages.is_none_or(|pages| pages > MAX_RAM_BYTES / PAGE_BYTES) {
            return Err(Error::Invalid("its layers are too large together"));
        }
        for LayerManifest { file_pages, runs, chunks } in &self.layers {
            if *file_pages > MAX_RAM_BYTES / PAGE_BYTES
                || runs.len() > MAX_EXTENTS
                || runs.len() as u64 > *file_pages
            {
                return Err(Error::Invalid("a layer is too large, or has too many runs"));
            }
            if runs.iter().any(|run| run.pages == 0) {
                return Err(Error::Invalid("a run of a layer is empty"));
            }
            let run_pages = runs.iter().try_fold(0u64, |all, run| all.checked_add(run.pages));
            if run_pages.is_none_or(|pages| pages > self.pages) {
                return Err(Error::Invalid("the runs of a layer are larger than the memory"));
            }
            if !chunks.is_sorted_by(|one, next| one.number < next.number) {
                return Err(Error::Invalid("the chunks of a layer are not sorted"));
            }
            for chunk in chunks {
                let first = u64::from(chunk.number) * CHUNK_PAGES;
                let last = u64::from(chunk.pages.checked_ilog2().ok_or(Error::Invalid("a chunk is empty"))?);
                if first + last >= *file_pages {
                    return Err(Error::Invalid("a chunk reaches out of its layer"));
                }
            }
        }
        Ok(())
    }
}

/// Bytes that a manifest has for each chunk, run and layer, and beside these.
const CHUNK_LENGTH: u64 = 44;
const RUN_LENGTH: u64 = 24;
const LAYER_LENGTH: u64 = 24;
const HEAD_LENGTH: u64 = 16;

/// Checks whether an image's manifest is no longer than `most` bytes, before its memory is read for it: a
/// chunk that is all zero counts where there is memory for it.
///
/// # Errors
/// [`Error::TooLarge`], or [`Error::Io`].
pub(super) fn check_length(image: &Image, most: u64) -> Result<(), Error> {
    let layers = image.layers().iter().map(|layer| match layer.file.metadata() {
        Ok(metadata) => Ok((metadata.len(), layer)),
        Err(error) => Err(Error::Io("look at a layer", error)),
    });
    let layers: Vec<_> = layers.collect::<Result<_, Error>>()?;
    let length = |chunks: u64| {
        let others = layers.iter().map(|(_, layer)| LAYER_LENGTH + layer.runs.len() as u64 * RUN_LENGTH);
        HEAD_LENGTH.saturating_add(others.sum()).saturating_add(chunks.saturating_mul(CHUNK_LENGTH))
    };
    // It takes a while to look for what there is in many GiB.
    if length(layers.iter().map(|(bytes, _)| bytes.div_ceil(CHUNK_BYTES)).sum()) <= most {
        return Ok(());
    }
    let mut chunks = 0;
    for (bytes, layer) in &layers {
        chunks += numbers_of(&layer.file, *bytes)?.len() as u64;
    }
    let found = length(chunks);
    if found > most { Err(Error::TooLarge { found, most }) } else { Ok(()) }
}

/// Digests of what is in layers' files that are sealed: to read one takes a second for some GiB. Of others
/// nothing is remembered, since neither length nor time of change tells of a store by a mapping.
#[derive(Debug, Default)]
pub struct Digests(Mutex<Vec<(FileId, Arc<FileChunks>)>>);

/// Most files of which it is remembered what is in them.
const MAX_KNOWN_FILES: usize = 256;

/// What tells a file from all others that there are or were: device, inode, when that was changed last, size.
type FileId = (u64, u64, i64, i64, u64);

/// What is in a layer's file.
#[derive(Debug)]
struct FileChunks {
    pages: u64,
    chunks: Vec<Chunk>,
}

impl Digests {
    fn enter(&self, id: FileId, chunks: Arc<FileChunks>) {
        let mut known = lock(&self.0);
        if known.iter().all(|(other, _)| *other != id) {
            let surplus = (known.len() + 1).saturating_sub(MAX_KNOWN_FILES);
            known.drain(..surplus);
            known.push((id, chunks));
        }
    }

    fn of(&self, file: &File, is_wanted: IsWanted<'_>) -> Result<Arc<FileChunks>, Error> {
        let metadata = file.metadata().map_err(|error| Error::Io("look at a layer", error))?;
        let id = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.len());
        let found =
            lock(&self.0).iter().find(|(known, _)| *known == id).map(|(_, chunks)| Arc::clone(chunks));
        if let Some(found) = found {
            return Ok(found);
        }
        // Before it is read: a seal that comes meanwhile says nothing of what was read before it.
        let is_sealed = memory::is_sealed(file)?;
        let bytes = metadata.len();
        let chunks = chunks_of(file, bytes, is_wanted)?;
        let made = Arc::new(FileChunks { pages: bytes.div_ceil(PAGE_BYTES), chunks });
        if is_sealed {
            self.enter(id, Arc::clone(&made));
        }
        Ok(made)
    }

    /// Reads these files of which nothing is remembered, so that whoever asks next need not: those that are
    /// sealed.
    ///
    /// # Errors
    /// [`Error::Io`] where one can't be read.
    pub fn learn<'f>(&self, files: impl IntoIterator<Item = &'f Arc<File>>) -> Result<(), Error> {
        files.into_iter().try_for_each(|file| self.of(file, &|| true).map(drop))
    }
}

/// Numbers of the chunks of a file of so many bytes for which there is memory.
fn numbers_of(file: &File, bytes: u64) -> Result<Vec<u64>, Error> {
    let mut numbers = Vec::new();
    let mut at = 0;
    let next = |at| next_data(file, at, bytes).map_err(|error| Error::Io("look at a layer", error));
    while let Some((start, end)) = next(at)? {
        for number in start / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
            if numbers.last() != Some(&number) {
                numbers.push(number);
            }
        }
        at = end;
    }
    Ok(numbers)
}

/// What is in a file of so many bytes.
fn chunks_of(file: &File, bytes: u64, is_wanted: IsWanted<'_>) -> Result<Vec<Chunk>, Error> {
    let chunks = parallel::map(&numbers_of(file, bytes)?, |data, &number| {
        if !is_wanted() {
            return Err(Error::CalledOff);
        }
        data.clear();
        let (offset, number) = (
            number * CHUNK_BYTES,
            u32::try_from(number).map_err(|_| Error::Invalid("a layer is too large"))?,
        );
        let bytes = CHUNK_BYTES.min(bytes - offset);
        let pages = chunk::read_piece(file, offset, bytes, data)?;
        if pages == 0 { Ok(None) } else { Chunk::of(number, pages, data, bytes).map(Some) }
    })?;
    Ok(chunks.into_iter().flatten().collect())
}

/// Where the next piece of a file begins and ends that is not a hole.
fn next_data(file: &File, from: u64, bytes: u64) -> io::Result<Option<(u64, u64)>> {
    use rustix::fs::{SeekFrom, seek};
    if from >= bytes {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = seek(file, SeekFrom::Hole(start))?;
    Ok((start < bytes).then(|| (start, end.min(bytes))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use vmm::memory;

    const PAGE: usize = 4096;

    /// A file of one byte a page.
    fn file(pages: &[u8]) -> File {
        let content: Vec<u8> = pages.iter().flat_map(|&byte| std::iter::repeat_n(byte, PAGE)).collect();
        memory::sealed("test", &content).unwrap()
    }

    fn manifest(pages: &[u8]) -> Manifest {
        let count = pages.len() as u64;
        let image = Image::new(count, vec![Arc::new(Layer::whole(Arc::new(file(pages)), count))]).unwrap();
        Manifest::of(&image, &Digests::default()).unwrap()
    }

    #[test]
    fn what_can_still_be_written_to_is_read_again() {
        use std::os::unix::fs::FileExt;
        let (digests, file) = (Digests::default(), memory::unsealed("test", 4096).unwrap());
        file.write_all_at(&[1], 0).unwrap();
        let of = |file: &File| digests.of(file, &|| true);
        let before = of(&file).unwrap();
        // As by a mapping that tells no time of change.
        file.write_all_at(&[2], 0).unwrap();
        let after = of(&file).unwrap();
        assert_ne!(before.chunks, after.chunks);
        assert!(lock(&digests.0).is_empty());
        assert!(memory::try_seal(&file).unwrap());
        let known = of(&file).unwrap();
        assert_eq!(known.chunks, after.chunks);
        assert!(lock(&digests.0).len() == 1 && Arc::ptr_eq(&of(&file).unwrap(), &known));
    }

    #[test]
    fn what_nobody_wants_any_more_is_not_read_to_its_end() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let (digests, pages) = (Digests::default(), vec![1u8; 32 * 64]);
        let image =
            Image::new(32 * 64, vec![Arc::new(Layer::whole(Arc::new(file(&pages)), 32 * 64))]).unwrap();
        let looks = AtomicUsize::new(0);
        let called_off = Manifest::of_while(&image, &digests, &|| looks.fetch_add(1, Ordering::Relaxed) < 2);
        assert!(matches!(called_off, Err(Error::CalledOff)));
        // Each processor has begun one more at most.
        assert!(looks.into_inner() <= 2 + base::threads::processors());
        assert!(lock(&digests.0).is_empty(), "it is not known what is in it");
        assert_eq!(Manifest::of(&image, &digests).unwrap().layers[0].chunks.len(), 32);
    }

    #[test]
    fn a_memory_of_which_there_is_too_much_to_say_is_told_before_it_is_read() {
        let (all, one) = (file(&[1; 256]), file(&[0, 1, 0]));
        let runs = |start, pages| vec![Run { page: start, file_page: 0, pages }];
        let layers = vec![
            Arc::new(Layer { file: Arc::new(all), runs: runs(0, 256) }),
            Arc::new(Layer { file: Arc::new(one), runs: runs(1, 3) }),
        ];
        let image = Image::new(256, layers).unwrap();
        let manifest = Manifest::of(&image, &Digests::default()).unwrap();
        let bytes = crate::codec::encode(&manifest).unwrap().len() as u64;
        let check = |most| check_length(&image, most);
        let Err(Error::TooLarge { found, most: 0 }) = check(0) else { panic!("it is longer than nothing") };
        assert_eq!(found, bytes);
        assert_eq!(manifest.most_bytes(), bytes, "no chunk is zero");
        assert!(check(found).is_ok() && check(found - 1).is_err());
    }

    #[test]
    fn what_is_not_there_needs_no_words() {
        let file = memory::fillable("test", MAX_RAM_BYTES).unwrap();
        let pages = MAX_RAM_BYTES / PAGE_BYTES;
        let image = Image::new(pages, vec![Arc::new(Layer::whole(Arc::new(file), pages))]).unwrap();
        check_length(&image, 100).unwrap();
    }

    proptest! {
        #[test]
        fn chunks_are_what_is_in_a_file(pages in proptest::collection::vec(0..3u8, 1..300)) {
            let manifest = manifest(&pages);
            manifest.check().unwrap();
            let layer = &manifest.layers[0];
            let chunk_pages = usize::try_from(CHUNK_PAGES).unwrap();
            let mut rest = layer.chunks.iter().peekable();
            for (number, own) in (0..).zip(pages.chunks(chunk_pages)) {
                let chunk = rest.next_if(|chunk| chunk.number == number);
                prop_assert_eq!(chunk.is_some(), own.iter().any(|&byte| byte != 0));
                let Some(chunk) = chunk else { continue };
                let content: Vec<u8> = own.iter().flat_map(|&byte| std::iter::repeat_n(byte, PAGE)).collect();
                prop_assert_eq!(chunk.digest, *blake3::hash(&content).as_bytes());
            }
            prop_assert!(rest.next().is_none());
            let not_zero = pages.iter().filter(|&&byte| byte != 0).count() as u64;
            prop_assert_eq!(manifest.data_bytes(), not_zero * PAGE_BYTES);
        }
    }

    #[test]
    fn forged_manifests_are_refused() {
        let chunk = |number, pages| Chunk { number, pages, digest: [0; 32] };
        let check = |file_pages, chunks| {
            Manifest { pages: 1, layers: vec![LayerManifest { file_pages, runs: Vec::new(), chunks }] }
                .check()
        };
        assert!(check(65, vec![chunk(0, 1 << 63), chunk(1, 1)]).is_ok());
        for (file_pages, chunks) in [
            (65, vec![chunk(1, 2)]),
            (65, vec![chunk(2, 1)]),
            (65, vec![chunk(u32::MAX, u64::MAX)]),
            (65, vec![chunk(0, 0)]),
            (65, vec![chunk(1, 1), chunk(0, 1)]),
            (65, vec![chunk(0, 1), chunk(0, 1)]),
            (0, vec![chunk(0, 1)]),
            (u64::MAX, vec![]),
        ] {
            assert!(check(file_pages, chunks).is_err());
        }
        assert!(Manifest { pages: u64::MAX, layers: Vec::new() }.check().is_err());
        let none = LayerManifest { file_pages: 0, runs: Vec::new(), chunks: Vec::new() };
        assert!(Manifest { pages: 1, layers: vec![none; MAX_LAYERS + 1] }.check().is_err());
    }
}
