//! The kernel module's sources: as they are in the workspace, and as a kernel builds them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::hash;

/// Name of the module.
pub const NAME: &str = "vmfork";

/// Files of a module's directory that belong to it whatever their ending is.
const NAMED: [&str; 3] = ["Kbuild", "Makefile", "bindings_parameters"];

/// Endings of all others. What an earlier build has left there is not among them.
const ENDINGS: [&str; 4] = [".rs", ".c", ".h", ".S"];

/// Why a module's sources can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A source could not be read.
    #[error("can't read the module's source {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A source could not be copied.
    #[error("can't copy the module's source to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The sources of a module.
#[derive(Debug, Clone)]
pub struct Sources {
    /// By their paths in the directory in which the module is built.
    files: BTreeMap<String, Vec<u8>>,
}

impl Sources {
    /// Reads the module in `dir`, and in `abi` what goes into its subdirectory of that name; nothing where
    /// there is no module.
    ///
    /// # Errors
    ///
    /// [`Error::Read`].
    pub fn read(dir: &Path, abi: &Path) -> Result<Option<Self>, Error> {
        if !dir.join(NAMED[0]).is_file() {
            return Ok(None);
        }
        let mut files = BTreeMap::new();
        read_below(dir, "", &mut files)?;
        files.retain(|path, _| !path.starts_with("abi/"));
        read_below(abi, "abi/", &mut files)?;
        Ok(Some(Self { files }))
    }

    /// Hash of all of them with their paths.
    pub(super) fn hash(&self) -> String {
        let lines = self.files.iter().map(|(path, bytes)| format!("{path:?} {}\n", hash::of_bytes(bytes)));
        hash::of_bytes(lines.collect::<String>().as_bytes())
    }

    /// Writes them all below `dir`.
    pub(super) fn write(&self, dir: &Path) -> Result<(), Error> {
        for (inner, bytes) in &self.files {
            let path = dir.join(inner);
            let written =
                fs::create_dir_all(path.parent().unwrap_or(dir)).and_then(|()| fs::write(&path, bytes));
            written.map_err(|source| Error::Write { path, source })?;
        }
        Ok(())
    }
}

/// Enters what is a source of `dir` and the directories below it; `inner`, which is empty or ends in a slash,
/// is before its path.
fn read_below(dir: &Path, inner: &str, files: &mut BTreeMap<String, Vec<u8>>) -> Result<(), Error> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Read { path, source }
    };
    for entry in fs::read_dir(dir).map_err(failed(dir))? {
        let entry = entry.map_err(failed(dir))?;
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().map_err(failed(&path))?.is_dir() {
            read_below(&path, &format!("{inner}{name}/"), files)?;
        } else if is_source(&name) {
            files.insert(format!("{inner}{name}"), fs::read(&path).map_err(failed(&path))?);
        }
    }
    Ok(())
}

fn is_source(name: &str) -> bool {
    let has_ending = || ENDINGS.iter().any(|ending| name.ends_with(ending));
    let was_made = name.starts_with('.') || name.ends_with(".mod.c") || name.ends_with("_generated.rs");
    NAMED.contains(&name) || has_ending() && !was_made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_with_the_abi_and_without_what_was_built() {
        let root = tempfile::tempdir().unwrap();
        let (module, abi) = (root.path().join("module"), root.path().join("abi"));
        fs::create_dir_all(module.join("abi")).unwrap();
        fs::create_dir(&abi).unwrap();
        assert!(Sources::read(&module, &abi).unwrap().is_none());
        let built =
            ["vmfork.o", "vmfork.mod.c", ".vmfork.o.cmd", ".tmp.c", "abi/old.rs", "bindings_generated.rs"];
        for name in ["Kbuild", "vmfork.rs", "shim.c", "README.md"].into_iter().chain(built) {
            fs::write(module.join(name), name).unwrap();
        }
        fs::write(abi.join("lib.rs"), "abi").unwrap();
        let sources = Sources::read(&module, &abi).unwrap().unwrap();
        assert_eq!(sources.files.keys().collect::<Vec<_>>(), ["Kbuild", "abi/lib.rs", "shim.c", "vmfork.rs"]);

        let copy = root.path().join("copy");
        sources.write(&copy).unwrap();
        assert_eq!(fs::read(copy.join("abi/lib.rs")).unwrap(), b"abi");
        let before = sources.hash();
        fs::write(abi.join("lib.rs"), "another").unwrap();
        assert_ne!(Sources::read(&module, &abi).unwrap().unwrap().hash(), before);
    }
}
