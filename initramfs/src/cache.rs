//! Small steps that the cache is made of: whatever is in it is there completely, or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

/// Creates `dir`, and waits until no other process works in it.
pub(crate) fn lock(dir: &Path) -> io::Result<Flock<File>> {
    fs::create_dir_all(dir)?;
    let file = File::create(dir.join("lock"))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

/// A file that is to take its place in `dir` when it is complete.
pub(crate) fn new_file(dir: &Path) -> io::Result<NamedTempFile> {
    fs::create_dir_all(dir)?;
    tempfile::Builder::new().permissions(Permissions::from_mode(0o644)).tempfile_in(dir)
}

/// Writes `value` to `dir/name`, for [`read_json`].
pub(crate) fn write_json(dir: &Path, name: &str, value: &impl Serialize) -> io::Result<()> {
    let mut file = new_file(dir)?;
    serde_json::to_writer_pretty(&mut file, value)?;
    file.write_all(b"\n")?;
    file.persist(dir.join(name))?;
    Ok(())
}

/// What [`write_json`] wrote, or nothing where it is missing or of another version's form.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}
