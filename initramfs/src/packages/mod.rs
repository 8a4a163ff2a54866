//! Debian packages: resolved, downloaded, checked and unpacked into a cache.
//!
//! What was once resolved stays as it is: a cached run needs neither network nor apt. Removing the cache
//! directory is how to get newer packages.

mod apt;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use self::apt::Apt;
pub use self::apt::{AptError, Record};
use crate::{cache, hash};

/// Why packages could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cache directory could not be read or written.
    #[error("can't use {} as package cache", path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// apt could not resolve or download something.
    #[error("can't get packages from the host's Debian mirror")]
    Apt(#[from] AptError),
    /// apt's package lists don't know a version that apt has chosen.
    #[error("apt chose {package} {version}, but its package lists don't describe that version")]
    Unlisted {
        /// The package.
        package: String,
        /// The version.
        version: String,
    },
    /// There is no such package.
    #[error("the host's Debian mirror has no package {0}")]
    Unknown(String),
    /// A package file is not what it should be.
    #[error(
        "{} has the SHA-256 {found}, but should have {expected}: remove it and try again",
        path.display()
    )]
    Hash {
        /// The package file.
        path: PathBuf,
        /// Its hash.
        found: String,
        /// The hash that it should have.
        expected: String,
    },
    /// A package file could not be unpacked.
    #[error("dpkg-deb can't unpack {}: {output}", path.display())]
    Unpack {
        /// The package file.
        path: PathBuf,
        /// What dpkg-deb said.
        output: String,
    },
}

/// A downloaded package file whose hash was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deb {
    /// Name of the package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// Hash of the package file.
    pub sha256: String,
    /// Name of the package file, in [`Packages`]' directory of package files.
    pub file: String,
}

/// The package cache. One process at a time uses it.
#[derive(Debug)]
pub struct Packages {
    dir: PathBuf,
    apt: Apt,
    _lock: Flock<fs::File>,
}

impl Packages {
    /// Opens the cache in `dir`, creating it if needed; waits while another process uses it.
    ///
    /// # Errors
    ///
    /// [`Error::Cache`] if the directory can't be created or locked.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let lock = cache::lock(dir).map_err(|source| Error::Cache { path: dir.into(), source })?;
        // apt wants absolute paths.
        let dir = fs::canonicalize(dir).map_err(|source| Error::Cache { path: dir.into(), source })?;
        Ok(Self { apt: Apt::new(dir.join("apt"), dir.join("debs")), dir, _lock: lock })
    }

    /// Where the file of `deb` is.
    pub fn path(&self, deb: &Deb) -> PathBuf {
        self.dir.join("debs").join(&deb.file)
    }

    /// The packages `names` and all that they depend on, downloaded.
    ///
    /// # Errors
    ///
    /// An [`Error`] where apt can't resolve or download them, or the cache can't be written.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Deb>, Error> {
        self.remembered(&names.join("+"), || {
            let chosen = self.apt.install(names)?;
            chosen.iter().map(|(package, version)| self.check(&self.listed(package, version)?)).collect()
        })
    }

    /// The best version of the package `name`, downloaded, without what it depends on.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`], or another where apt can't download it, or the cache can't be written.
    pub fn alone(&self, name: &str) -> Result<Deb, Error> {
        let unknown = || Error::Unknown(name.into());
        let found = self.remembered(&format!("{name}-alone"), || {
            let best = || self.records(name)?.into_iter().next().ok_or_else(unknown);
            match self.download(&best()?) {
                // By now the package lists are new: the mirror may have dropped what the old ones named.
                Err(Error::Apt(_)) => Ok::<_, Error>(vec![self.download(&best()?)?]),
                result => Ok(vec![result?]),
            }
        })?;
        found.into_iter().next().ok_or_else(unknown)
    }

    /// Unpacks `deb`, once, and returns the directory that holds its files.
    ///
    /// # Errors
    ///
    /// [`Error::Unpack`] if dpkg-deb fails, [`Error::Cache`] if the cache can't be written.
    pub fn unpack(&self, deb: &Deb) -> Result<PathBuf, Error> {
        let name = format!("{}-{}", deb.file.trim_end_matches(".deb"), &deb.sha256[..16]);
        let parent = self.dir.join("unpacked");
        let dir = parent.join(name);
        if dir.is_dir() {
            return Ok(dir);
        }
        let failed = |source| Error::Cache { path: dir.clone(), source };
        fs::create_dir_all(&parent).map_err(failed)?;
        let new = tempfile::tempdir_in(&parent).map_err(failed)?;
        let path = self.path(deb);
        let root = new.path().join("root");
        let output = Command::new("dpkg-deb").arg("-x").args([&path, &root]).output().map_err(failed)?;
        if !output.status.success() {
            let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(Error::Unpack { path, output });
        }
        fs::rename(&root, &dir).map_err(failed)?;
        Ok(dir)
    }

    /// All versions of `package` that the mirror offers, the best first.
    pub(crate) fn records(&self, package: &str) -> Result<Vec<Record>, Error> {
        Ok(self.apt.records(package)?)
    }

    /// Downloads the package that `record` describes, without what it depends on.
    pub(crate) fn download(&self, record: &Record) -> Result<Deb, Error> {
        self.apt.download(&record.package, &record.version)?;
        self.check(record)
    }

    /// What `find` found earlier under the same `key`, if all of it is still in the cache; otherwise what it
    /// finds now.
    pub(crate) fn remembered<E: From<Error>>(
        &self,
        key: &str,
        find: impl FnOnce() -> Result<Vec<Deb>, E>,
    ) -> Result<Vec<Deb>, E> {
        let dir = self.dir.join("resolved");
        let name = format!("{key}.json");
        let known: Option<Vec<Deb>> = cache::read_json(&dir.join(&name));
        if let Some(debs) = known.filter(|debs| debs.iter().all(|deb| self.path(deb).is_file())) {
            return Ok(debs);
        }
        let debs = find()?;
        cache::write_json(&dir, &name, &debs).map_err(|source| Error::Cache { path: dir, source })?;
        Ok(debs)
    }

    fn listed(&self, package: &str, version: &str) -> Result<Record, Error> {
        let mut records = self.records(package)?.into_iter();
        records
            .find(|record| record.version == version)
            .ok_or_else(|| Error::Unlisted { package: package.into(), version: version.into() })
    }

    /// Makes sure that the downloaded file is the one that `record` describes.
    fn check(&self, record: &Record) -> Result<Deb, Error> {
        let deb = Deb {
            package: record.package.clone(),
            version: record.version.clone(),
            sha256: record.sha256.clone(),
            file: record.file_name(),
        };
        let path = self.path(&deb);
        match hash::of_file(&path) {
            Err(source) => Err(Error::Cache { path, source }),
            Ok(found) if found != deb.sha256 => Err(Error::Hash { path, found, expected: deb.sha256 }),
            Ok(_) => Ok(deb),
        }
    }
}
