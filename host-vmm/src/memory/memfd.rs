//! Memory files (memfd), and the seals that make them immutable.

use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    os::fd::AsRawFd,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};

use super::Error;

/// F_SEAL_FUTURE_WRITE, since Linux 5.1; the nix crate does not name it.
const FUTURE_WRITE: SealFlag = SealFlag::from_bits_retain(0x0010);

/// Makes an empty memory file of `bytes` bytes that can be written and sealed.
///
/// # Errors
/// [`Error::File`] where the file can't be made or grown.
pub fn unsealed(name: &str, bytes: u64) -> Result<File, Error> {
    let fail = |operation, source| Error::File { operation, name: name.to_owned(), source };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags).map_err(|errno| fail("create", errno.into()))?);
    file.set_len(bytes).map_err(|source| fail("grow", source))?;
    Ok(file)
}

/// Makes a memory file that holds `content` and that nobody can change any more.
///
/// # Errors
/// [`Error::File`] where the file can't be made, written or sealed.
pub fn sealed(name: &str, content: &[u8]) -> Result<File, Error> {
    let mut file = unsealed(name, 0)?;
    file.write_all(content).map_err(|source| Error::File { operation: "write", name: name.to_owned(), source })?;
    seal(name, &file)?;
    Ok(file)
}

/// Makes an empty memory file of `bytes` bytes that can be written, and keeps its size.
///
/// # Errors
/// [`Error::File`] where the file can't be made, grown or sealed.
pub fn unresizable(name: &str, bytes: u64) -> Result<File, Error> {
    let file = unsealed(name, bytes)?;
    add(name, &file, SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL)?;
    Ok(file)
}

/// Makes an empty memory file of `bytes` bytes that keeps its size, and is to be filled while others have it mapped already.
///
/// # Errors
/// [`Error::File`] where the file can't be made, grown or sealed.
pub fn fillable(name: &str, bytes: u64) -> Result<File, Error> {
    let file = unsealed(name, bytes)?;
    add(name, &file, SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK)?;
    Ok(file)
}

/// Seals a file that was filled.
///
/// # Errors
/// [`Error::File`] where it can't be sealed.
pub fn seal_filled(file: &File) -> Result<(), Error> {
    seal_future("that was filled", file)
}

/// Whether something is there within a range of a file, in bytes.
///
/// # Errors
/// [`Error::File`] where it can't be looked at.
pub fn has_data(file: &File, range: Range<u64>) -> Result<bool, Error> {
    match seek(file, SeekFrom::Data(range.start)) {
        Ok(data) => Ok(data < range.end),
        // There is nothing behind that.
        Err(Errno::NXIO) => Ok(false),
        Err(errno) => Err(look_at_failed(errno.into())),
    }
}

/// The same file, for somebody who may not write to it.
///
/// # Errors
/// [`Error::File`] where it can't be opened again.
pub fn read_only(file: &File) -> Result<File, Error> {
    let fail = |source| Error::File { operation: "open again", name: "that is being filled".to_owned(), source };
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(fail)
}

/// Whether a file from elsewhere keeps its size, and can't be written to by whoever has it from there.
///
/// # Errors
/// [`Error::File`] where it is no memory file.
pub fn is_being_filled(file: &File) -> Result<bool, Error> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|errno| look_at_failed(errno.into()))?;
    Ok(flags & libc::O_ACCMODE == libc::O_RDONLY && seals(file)?.contains(SealFlag::F_SEAL_SHRINK))
}

/// Checks that a file from elsewhere has this size, and keeps it: whoever could shrink it could kill those that map it.
///
/// # Errors
/// [`Error::Invalid`] where it is otherwise, [`Error::File`] where it is no memory file.
pub fn check_unresizable(file: &File, bytes: u64) -> Result<(), Error> {
    // In this order: once it is sealed, what is found is what stays.
    if !seals(file)?.contains(SealFlag::F_SEAL_SHRINK) || length(file)? != bytes {
        return Err(Error::Invalid("a shared file has another size, or does not keep it"));
    }
    Ok(())
}

/// Size of a memory file in bytes.
///
/// # Errors
/// [`Error::File`] where it can't be looked at.
pub(super) fn length(file: &File) -> Result<u64, Error> {
    Ok(file.metadata().map_err(look_at_failed)?.len())
}

/// Whether nobody can shrink or newly write the file any more.
///
/// # Errors
/// [`Error::File`] where it is no memory file.
pub fn is_immutable(file: &File) -> Result<bool, Error> {
    let seals = seals(file)?;
    Ok(seals.contains(SealFlag::F_SEAL_SHRINK) && seals.intersects(SealFlag::F_SEAL_WRITE | FUTURE_WRITE))
}

fn seals(file: &File) -> Result<SealFlag, Error> {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_err(|errno| look_at_failed(errno.into()))?;
    Ok(SealFlag::from_bits_retain(seals))
}

fn look_at_failed(source: io::Error) -> Error {
    Error::File { operation: "look at", name: "from another process".to_owned(), source }
}

/// Seals a file that nobody has mapped writable: from here on it is immutable.
///
/// # Errors
/// [`Error::File`] where it can't be sealed.
pub fn seal(name: &str, file: &File) -> Result<(), Error> {
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    add(name, file, seals)
}

/// Forbids every *new* way to write the file: `write`, and writable shared mappings (F_SEAL_FUTURE_WRITE). A mapping that exists stays
/// writable; once that is gone, the file is immutable.
///
/// F_SEAL_WRITE could be added then, and would promise no more. It walks all pages, though (40 ms for 8 GiB), and fails where somebody
/// just looks at one: a KVM that makes a page of the image present in a child (EBUSY; measured).
pub(super) fn seal_future(name: &str, file: &File) -> Result<(), Error> {
    add(name, file, SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | FUTURE_WRITE)
}

fn add(name: &str, file: &File, seals: SealFlag) -> Result<(), Error> {
    fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| Error::File {
        operation: "seal",
        name: name.to_owned(),
        source: io::Error::from(errno),
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_is_filled_by_one_side_and_read_by_the_other() {
        let file = fillable("test", 4096).unwrap();
        let theirs = read_only(&file).unwrap();
        assert!(is_being_filled(&theirs).unwrap() && !is_being_filled(&file).unwrap());
        assert!(!is_immutable(&theirs).unwrap());
        assert!(theirs.write_at(b"x", 0).is_err() && theirs.set_len(0).is_err());
        file.write_all_at(b"content", 0).unwrap();
        seal_filled(&file).unwrap();
        assert!(is_immutable(&theirs).unwrap() && file.write_at(b"x", 0).is_err());
        let mut content = [0; 7];
        theirs.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"content");
    }

    #[test]
    fn what_is_there_is_seen() {
        const PIECE: u64 = 1 << 18;
        let file = fillable("test", 3 * PIECE).unwrap();
        assert!(!has_data(&file, 0..3 * PIECE).unwrap());
        file.write_all_at(&[0], PIECE + 4096).unwrap();
        let found: Vec<_> = (0..3).map(|at| has_data(&file, at * PIECE..(at + 1) * PIECE).unwrap()).collect();
        assert_eq!(found, [false, true, false]);
    }

    #[test]
    fn a_sealed_file_keeps_its_content() {
        assert!(!is_immutable(&unsealed("test", 0).unwrap()).unwrap());
        let file = sealed("test", b"content").unwrap();
        assert!(is_immutable(&file).unwrap());
        assert!(file.write_at(b"x", 0).is_err());
        assert!(file.set_len(0).is_err());
        let mut content = [0; 7];
        file.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"content");
    }
}
