//! What a capsule says of its memory: layers, the pages that each holds, and a digest of each chunk of them.
//!
//! A layer's file is cut into chunks of 256 KiB. A chunk of nothing but zero bytes is left out, and so are the zero pages of the others. Equal
//! chunks have equal digests, wherever they come from: who has one already need not be sent it.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    sync::{Arc, Mutex},
};

use serde::{Deserialize, Serialize};

use super::{Error, assembly, parallel};
use crate::{
    arch::layout::{MAX_RAM_BYTES, PAGE_BYTES},
    memory::{Image, Layer, MAX_EXTENTS, MAX_LAYERS, Run},
    sync::lock,
};

/// Pages of a chunk.
pub const CHUNK_PAGES: u64 = 64;

/// Bytes of a chunk.
pub const CHUNK_BYTES: u64 = CHUNK_PAGES * PAGE_BYTES;

/// A BLAKE3 digest.
pub type Digest = [u8; 32];

/// A chunk of a layer's file that is not all zero bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// Where it is: in units of a chunk, from the start of the file.
    pub number: u32,
    /// Which of its pages are not zero, the first one in the lowest bit.
    pub pages: u64,
    /// Digest of all of its bytes, the zero ones too.
    pub digest: Digest,
}

impl Chunk {
    /// Offset in the layer's file in bytes.
    pub fn offset(&self) -> u64 {
        u64::from(self.number) * CHUNK_BYTES
    }

    /// Size of its pages that are not zero, in bytes.
    pub fn data_bytes(&self) -> u64 {
        u64::from(self.pages.count_ones()) * PAGE_BYTES
    }
}

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
    /// What a layer is, but for what is in it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn outline(layer: &Layer) -> Result<Self, Error> {
        let bytes = layer.file.metadata().map_err(|error| Error::Io("look at a layer", error))?.len();
        Ok(Self { file_pages: bytes.div_ceil(PAGE_BYTES), runs: layer.runs.clone(), chunks: Vec::new() })
    }

    /// Size of one of its chunks in bytes: the last one may be shorter.
    pub fn chunk_bytes(&self, chunk: &Chunk) -> u64 {
        CHUNK_BYTES.min((self.file_pages * PAGE_BYTES).saturating_sub(chunk.offset()))
    }

    /// Reads the chunk with this number, whatever it holds, from the layer's file: which pages are not zero (8 bytes, little-endian), and these,
    /// one behind another.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_all(&self, file: &File, number: u32) -> Result<Vec<u8>, Error> {
        let all = Chunk { number, pages: u64::MAX, digest: [0; 32] };
        let mut content = vec![0; usize::try_from(self.chunk_bytes(&all)).unwrap_or(0)];
        file.read_exact_at(&mut content, all.offset()).map_err(|error| Error::Io("read a layer", error))?;
        let pages = pages_in(&content);
        Ok([pages.to_le_bytes().as_slice(), &squeeze(pages, content)].concat())
    }

    /// Writes what [`LayerManifest::read_all`] has read to the layer's file, and says what it was: nothing where all pages are zero.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is none, or not of this layer; [`Error::Io`].
    pub fn write(&self, file: &File, number: u32, data: &[u8]) -> Result<Option<Chunk>, Error> {
        let (pages, data) = data.split_first_chunk().ok_or(Error::Invalid("a chunk is cut off"))?;
        let pages = u64::from_le_bytes(*pages);
        let Some(last) = pages.checked_ilog2() else { return Ok(None) };
        let chunk = Chunk { number, pages, digest: [0; 32] };
        if u64::from(number) * CHUNK_PAGES + u64::from(last) >= self.file_pages {
            return Err(Error::Invalid("a chunk reaches out of its layer"));
        }
        let content = expand(pages, data, self.chunk_bytes(&chunk))?;
        assembly::write_pages(file, &chunk, &content)?;
        Ok(Some(Chunk { digest: blake3::hash(&content).into(), ..chunk }))
    }

    /// Reads the pages of a chunk that are not zero, one behind another, from the layer's file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, file: &File, chunk: &Chunk) -> Result<Vec<u8>, Error> {
        let mut content = vec![0; usize::try_from(self.chunk_bytes(chunk)).unwrap_or(0)];
        file.read_exact_at(&mut content, chunk.offset()).map_err(|error| Error::Io("read a layer", error))?;
        Ok(squeeze(chunk.pages, content))
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
        let layers = image.layers().iter().map(|layer| {
            let file = digests.of(&layer.file).map_err(|error| Error::Io("read a layer", error))?;
            Ok(LayerManifest { file_pages: file.pages, runs: layer.runs.clone(), chunks: file.chunks.clone() })
        });
        Ok(Self { pages: image.pages(), layers: layers.collect::<Result<_, Error>>()? })
    }

    /// All chunks, layer by layer, each with the number of its layer.
    pub fn chunks(&self) -> impl Iterator<Item = (usize, &Chunk)> {
        self.layers.iter().enumerate().flat_map(|(number, layer)| layer.chunks.iter().map(move |chunk| (number, chunk)))
    }

    /// Size of all pages that are not zero in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.chunks().map(|(_, chunk)| chunk.data_bytes()).sum()
    }

    /// Checks it, since it comes from elsewhere: layers of a possible size, chunks that are sorted, within them, and not empty. Whether the
    /// layers make an image is for [`Image::new`] to say.
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
            if *file_pages > MAX_RAM_BYTES / PAGE_BYTES || runs.len() > MAX_EXTENTS {
                return Err(Error::Invalid("a layer is too large, or has too many runs"));
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

/// What is known of layers' files, which never change: to read one takes a second for some GiB.
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

/// The same knowledge, apart: what is found out with it is not known elsewhere until that [learns](Digests::learn) it.
impl Clone for Digests {
    fn clone(&self) -> Self {
        Self(Mutex::new(lock(&self.0).clone()))
    }
}

impl Digests {
    /// Takes over what was found out of files that are certain not to change any more: that of a booted VM's memory is written to again where
    /// its fork fails.
    pub fn learn(&self, from: &Self) {
        let found = lock(&from.0).clone();
        for (id, chunks) in found {
            self.enter(id, chunks);
        }
    }

    fn enter(&self, id: FileId, chunks: Arc<FileChunks>) {
        let mut known = lock(&self.0);
        if known.iter().all(|(other, _)| *other != id) {
            let surplus = (known.len() + 1).saturating_sub(MAX_KNOWN_FILES);
            known.drain(..surplus);
            known.push((id, chunks));
        }
    }

    fn of(&self, file: &File) -> io::Result<Arc<FileChunks>> {
        let metadata = file.metadata()?;
        let id = (metadata.dev(), metadata.ino(), metadata.ctime(), metadata.ctime_nsec(), metadata.len());
        let found = lock(&self.0).iter().find(|(known, _)| *known == id).map(|(_, chunks)| Arc::clone(chunks));
        if let Some(found) = found {
            return Ok(found);
        }
        let bytes = metadata.len();
        let made = Arc::new(FileChunks { pages: bytes.div_ceil(PAGE_BYTES), chunks: chunks_of(file, bytes)? });
        self.enter(id, Arc::clone(&made));
        Ok(made)
    }
}

/// What is in a file of so many bytes.
fn chunks_of(file: &File, bytes: u64) -> io::Result<Vec<Chunk>> {
    let mut numbers = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = next_data(file, at, bytes)? {
        for number in start / CHUNK_BYTES..end.div_ceil(CHUNK_BYTES) {
            if numbers.last() != Some(&number) {
                numbers.push(number);
            }
        }
        at = end;
    }
    let chunks = parallel::map(&numbers, |&number| -> io::Result<Option<Chunk>> {
        let mut content = vec![0; usize::try_from(CHUNK_BYTES.min(bytes - number * CHUNK_BYTES)).unwrap_or(0)];
        file.read_exact_at(&mut content, number * CHUNK_BYTES)?;
        let pages = pages_in(&content);
        let number = u32::try_from(number).map_err(io::Error::other)?;
        Ok((pages != 0).then(|| Chunk { number, pages, digest: blake3::hash(&content).into() }))
    })?;
    Ok(chunks.into_iter().flatten().collect())
}

/// Which pages of a chunk are not zero.
pub(super) fn pages_in(content: &[u8]) -> u64 {
    let page_bytes = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
    let is_zero = |page: &[u8]| page.iter().all(|&byte| byte == 0);
    (0..).zip(content.chunks(page_bytes)).map(|(bit, page)| u64::from(!is_zero(page)) << bit).sum()
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

/// The pages of a chunk that are not zero, one behind another.
fn squeeze(pages: u64, mut content: Vec<u8>) -> Vec<u8> {
    let page_bytes = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
    let mut kept = 0;
    for page in (0..content.len().div_ceil(page_bytes)).filter(|page| pages >> page & 1 == 1) {
        let (from, end) = (page * page_bytes, content.len().min((page + 1) * page_bytes));
        content.copy_within(from..end, kept);
        kept += end - from;
    }
    content.truncate(kept);
    content
}

/// The chunk of so many bytes whose pages these are.
///
/// # Errors
/// [`Error::Invalid`] where they are too few or too many.
pub(super) fn expand(pages: u64, data: &[u8], bytes: u64) -> Result<Vec<u8>, Error> {
    let page_bytes = usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX);
    let mut content = vec![0; usize::try_from(bytes).unwrap_or(0)];
    let mut rest = data;
    for (_, page) in content.chunks_mut(page_bytes).enumerate().filter(|(bit, _)| pages >> bit & 1 == 1) {
        let (own, behind) = rest.split_at_checked(page.len()).ok_or(Error::Invalid("a chunk has too few pages"))?;
        page.copy_from_slice(own);
        rest = behind;
    }
    if rest.is_empty() { Ok(content) } else { Err(Error::Invalid("a chunk has too many pages")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory;

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
    fn what_is_found_out_apart_is_known_once_it_is_learnt() {
        let (all, file) = (Digests::default(), file(&[1, 0, 2]));
        let apart = all.clone();
        let found = apart.of(&file).unwrap();
        assert!(lock(&all.0).is_empty());
        all.learn(&apart);
        all.learn(&apart);
        assert!(lock(&all.0).len() == 1 && Arc::ptr_eq(&all.of(&file).unwrap(), &found));
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
                let data = squeeze(chunk.pages, content.clone());
                prop_assert_eq!(data.len() as u64, chunk.data_bytes());
                prop_assert_eq!(expand(chunk.pages, &data, layer.chunk_bytes(chunk)).unwrap(), content);
                prop_assert!(expand(chunk.pages, &data[1..], layer.chunk_bytes(chunk)).is_err());
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
            Manifest { pages: 1, layers: vec![LayerManifest { file_pages, runs: Vec::new(), chunks }] }.check()
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
