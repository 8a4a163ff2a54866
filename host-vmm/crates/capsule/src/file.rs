//! A capsule at rest: one file.
//!
//! The memory stands in it page by page, aligned to pages, so that it can be mapped as it is; or, where it is
//! to be small, compressed chunk by chunk. The header is written last, so that a file that was not finished
//! is none.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use vmm::memory::Budget;

use super::{
    Assembly, Capsule, Description, Digests, Error, Header,
    header::{DATA_OFFSET, HEADER_BYTES, OLDEST_VERSION},
    parallel, v1,
};

/// How much work is put into making a file small: zstd's default.
const COMPRESSION_LEVEL: i32 = 3;

/// Chunks that are read at once, to be written one behind another.
const BATCH: usize = 256;

/// Writes a capsule to an empty file, and waits until it is on its disk.
///
/// # Errors
/// [`Error`]; the file is not valid then.
pub fn save(capsule: &Capsule, file: &File, compress: bool) -> Result<(), Error> {
    let (mut description, image) = capsule.describe(&Digests::default())?;
    let mut at = DATA_OFFSET;
    let mut stored = Vec::new();
    let chunks: Vec<_> = description.memory.chunks().collect();
    for batch in chunks.chunks(BATCH) {
        let data = parallel::map(batch, |_, (layer, chunk)| {
            let mut data = Vec::new();
            chunk.read(&image.layers()[*layer].file, &mut data)?;
            if compress { compressed(&data) } else { Ok(data) }
        })?;
        for data in data {
            write(file, &data, at)?;
            at += data.len() as u64;
            stored.push(u32::try_from(data.len()).map_err(|_| Error::Invalid("a chunk is too large"))?);
        }
    }
    description.stored = compress.then_some(stored);
    let description = description.to_bytes()?;
    write(file, &description, at)?;
    file.sync_data().map_err(|error| Error::Io("write the capsule", error))?;
    write(file, &Header::new(compress, at - DATA_OFFSET, &description).to_bytes(), 0)?;
    file.sync_all().map_err(|error| Error::Io("write the capsule", error))
}

fn compressed(data: &[u8]) -> Result<Vec<u8>, Error> {
    zstd::bulk::compress(data, COMPRESSION_LEVEL).map_err(|error| Error::Io("compress a chunk", error))
}

fn write(file: &File, bytes: &[u8], at: u64) -> Result<(), Error> {
    file.write_all_at(bytes, at).map_err(|error| Error::Io("write the capsule", error))
}

/// Memory that reading a description takes at most, as a multiple of its length: 2 for the bytes themselves,
/// in a buffer that has grown, 2 for its parts, likewise, and 10 for what is decoded from them. An entry of
/// CPUID that is left out has 8 bytes there, and 40 in memory, in a list that has grown; all else grows by
/// less: short names 9-fold, layers 5-fold, chunks and runs 2-fold.
pub const DESCRIPTION_COPIES: u64 = 14;

/// Reads a capsule. Its layers are memory files that nobody can write to, for which there is room in the
/// budget.
///
/// # Errors
/// [`Error`]: whatever is wrong with the file, or [`Error::NoRoom`].
pub fn load(file: &File, budget: &Budget) -> Result<Capsule, Error> {
    let header = read_header(file)?;
    let _described = budget.reserve(header.description_bytes.saturating_mul(DESCRIPTION_COPIES))?;
    let description = read_description(file, &header)?;
    if header.version == OLDEST_VERSION {
        return v1::load(file, &header, &description, budget);
    }
    let assembly = Assembly::new(Description::from_bytes(&description)?, budget, |_| None)?;
    read_memory(file, &header, &assembly, |number, data| assembly.put(number, data))?;
    Ok(assembly.finish()?.0)
}

/// Reads all of a capsule, and keeps nothing of it.
///
/// # Errors
/// As [`load`]; a capsule of the version before is loaded for that.
pub fn verify(file: &File) -> Result<(), Error> {
    let header = read_header(file)?;
    if header.version == OLDEST_VERSION {
        return load(file, &Budget::of_this_host(None)?).map(drop);
    }
    let description = Description::from_bytes(&read_description(file, &header)?)?;
    let assembly = Assembly::unfilled(description, |_| None)?;
    read_memory(file, &header, &assembly, |number, data| assembly.check(number, data).map(drop))?;
    assembly.close().map(drop)
}

/// Bytes of memory that loading a capsule takes at most, beside what it says of itself.
///
/// # Errors
/// As [`inspect`].
pub fn memory_bytes(file: &File) -> Result<u64, Error> {
    let header = read_header(file)?;
    if !header.is_compressed {
        return Ok(header.data_bytes);
    }
    Ok(Description::from_bytes(&read_description(file, &header)?)?.memory.data_bytes())
}

/// What a capsule says of itself, without its memory's content.
///
/// # Errors
/// As [`load`]; a capsule of the version before is read as a whole.
pub fn inspect(file: &File) -> Result<(Header, Description), Error> {
    let header = read_header(file)?;
    let description = if header.version == OLDEST_VERSION {
        load(file, &Budget::of_this_host(None)?)?.describe(&Digests::default())?.0
    } else {
        Description::from_bytes(&read_description(file, &header)?)?
    };
    Ok((header, description))
}

fn read_header(file: &File) -> Result<Header, Error> {
    let read = |error| Error::Io("read the capsule", error);
    let found = file.metadata().map_err(read)?.len();
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::NoCapsule,
        _ => read(error),
    })?;
    let header = Header::from_bytes(&header)?;
    match header.file_bytes() {
        Some(expected) if expected == found => Ok(header),
        expected => Err(Error::Length { found, expected: expected.unwrap_or(u64::MAX) }),
    }
}

fn read_description(file: &File, header: &Header) -> Result<Vec<u8>, Error> {
    let mut description = vec![0; usize::try_from(header.description_bytes).unwrap_or(0)];
    let read = file.read_exact_at(&mut description, DATA_OFFSET + header.data_bytes);
    read.map_err(|error| Error::Io("read the capsule", error))?;
    header.check_description(&description)?;
    Ok(description)
}

/// Reads each chunk of the memory, and hands its number and its pages that are not zero to `take`.
fn read_memory(
    file: &File,
    header: &Header,
    assembly: &Assembly,
    take: impl Fn(usize, &[u8]) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let chunks = || assembly.chunks().iter().map(|(_, chunk)| chunk);
    let sizes: Vec<u64> = match &assembly.description().stored {
        Some(stored) if header.is_compressed && stored.len() == assembly.chunks().len() => {
            stored.iter().copied().map(u64::from).collect()
        }
        None if !header.is_compressed => chunks().map(|chunk| chunk.data_bytes()).collect(),
        _ => return Err(Error::Invalid("it does not say how its memory is stored")),
    };
    if sizes.iter().try_fold(0, |sum: u64, bytes| sum.checked_add(*bytes)) != Some(header.data_bytes) {
        return Err(Error::Invalid("it has more or less memory than its layers"));
    }
    let most = |bytes: u64| zstd::zstd_safe::compress_bound(usize::try_from(bytes).unwrap_or(0)) as u64;
    if sizes.iter().zip(chunks()).any(|(stored, chunk)| *stored > most(chunk.data_bytes())) {
        return Err(Error::Invalid("a chunk is stored in more bytes than it can need"));
    }
    let mut end = DATA_OFFSET;
    let places = sizes.iter().map(|bytes| {
        end += bytes;
        (end - bytes, *bytes)
    });
    let places: Vec<_> = assembly.chunks().iter().enumerate().zip(places).collect();
    parallel::map(&places, |data, ((number, (_, chunk)), (at, bytes))| {
        data.resize(usize::try_from(*bytes).unwrap_or(0), 0);
        file.read_exact_at(data, *at).map_err(|error| Error::Io("read the capsule", error))?;
        if !header.is_compressed {
            return take(*number, data);
        }
        let most = usize::try_from(chunk.data_bytes()).unwrap_or(0);
        take(*number, &zstd::bulk::decompress(data, most).map_err(|_| Error::Digest("the memory"))?)
    })?;
    Ok(())
}

/// Writes a capsule to a new file of this name, all of it or none.
///
/// # Errors
/// [`Error`]; there is no new file then, and one that was there stays.
pub fn save_as(capsule: &Capsule, path: &Path, compress: bool) -> Result<(), Error> {
    let io = |error| Error::Io("make the file", error);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".image-").tempfile_in(folder).map_err(io)?;
    save(capsule, file.as_file(), compress)?;
    file.flush().map_err(io)?;
    file.persist(path).map_err(|error| Error::Io("give the file its name", error.error))?;
    Ok(())
}

#[cfg(test)]
#[path = "file_test.rs"]
pub(crate) mod tests;
