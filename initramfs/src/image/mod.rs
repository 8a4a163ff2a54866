//! Guest images: a set of files, and the archive that is written from it.
//!
//! The archive is an uncompressed cpio of the kernel's format (newc): it unpacks fastest, which counts where
//! the guest's CPU is emulated. Entries are sorted; owners, times and inode numbers are fixed. So equal
//! inputs give equal bytes.

mod build;
mod path;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub use self::build::{Image, Manifest};
pub(crate) use self::path::MERGED;
use self::path::normalise;
use crate::kernel::Kernel;
use crate::modules;
use crate::packages::{self, Deb, Packages};

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that goes into the image could not be read.
    #[error("can't read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The image could not be written.
    #[error("can't write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is larger than the archive's format allows.
    #[error("{path} has {bytes} bytes: an initramfs holds files of up to 4 GiB")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        bytes: usize,
    },
    /// The archive could not be written.
    #[error("can't write the archive")]
    Archive(#[from] io::Error),
    /// A package could not be had.
    #[error("a package for the image is missing")]
    Packages(#[from] packages::Error),
    /// base-files is not among the packages that apt resolved.
    #[error("the package base-files, which has the texts of licences, is missing")]
    NoLicenses,
    /// A kernel module could not be had.
    #[error("a kernel module for the image is missing")]
    Modules(#[from] modules::Error),
}

/// The files of an image to be. Adding a path again replaces what was there.
#[derive(Debug, Default)]
pub struct ImageBuilder {
    entries: BTreeMap<String, Entry>,
    packages: BTreeMap<String, Deb>,
}

#[derive(Debug)]
struct Entry {
    permissions: u32,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Directory,
    Bytes(Vec<u8>),
    /// A file of the host. `origin` tells which file of which package it is.
    File {
        path: PathBuf,
        origin: Option<String>,
    },
    Symlink(String),
    CharDevice {
        major: u32,
        minor: u32,
    },
}

impl ImageBuilder {
    /// Adds a directory, and those above it.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.insert(&normalise(path), 0o755, Content::Directory)
    }

    /// Adds a file with these bytes.
    pub fn bytes(&mut self, path: &str, permissions: u32, bytes: impl Into<Vec<u8>>) -> &mut Self {
        self.insert(&normalise(path), permissions, Content::Bytes(bytes.into()))
    }

    /// Adds a file of the host. It is read when the image is written.
    pub fn file(&mut self, path: &str, permissions: u32, host: &Path) -> &mut Self {
        self.insert(&normalise(path), permissions, Content::File { path: host.into(), origin: None })
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.insert(&normalise(path), 0o777, Content::Symlink(target.into()))
    }

    /// Adds the node of a character device.
    pub fn char_device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) -> &mut Self {
        self.insert(&normalise(path), permissions, Content::CharDevice { major, minor })
    }

    /// Adds those files of `deb`, with the directories above them, whose paths in the image (`usr/bin/env`)
    /// `keep` wants.
    ///
    /// # Errors
    ///
    /// [`Error::Packages`] if it can't be unpacked, [`Error::Read`] if its files can't be read.
    pub fn package(
        &mut self,
        packages: &Packages,
        deb: &Deb,
        keep: &impl Fn(&str) -> bool,
    ) -> Result<&mut Self, Error> {
        let root = packages.unpack(deb)?;
        self.packages.insert(deb.package.clone(), deb.clone());
        self.tree(&root, "", &deb.sha256, keep)?;
        Ok(self)
    }

    /// Adds the kernel modules `names` and those that they need, with a `modules.dep` for `modprobe`.
    ///
    /// # Errors
    ///
    /// [`Error::Modules`] if one is missing.
    pub fn modules(&mut self, kernel: &Kernel, names: &[&str]) -> Result<&mut Self, Error> {
        let modules = modules::closure(kernel, names)?;
        let dir = format!("/lib/modules/{}", kernel.release);
        self.bytes(&format!("{dir}/modules.dep"), 0o644, modules::modules_dep(&modules));
        for module in modules {
            self.bytes(&format!("{dir}/{}", module.path), 0o644, module.bytes);
        }
        self.packages.insert(kernel.deb.package.clone(), kernel.deb.clone());
        Ok(self)
    }

    /// Adds what `keep` wants of the files in `inner`, a directory below `root`.
    fn tree(
        &mut self,
        root: &Path,
        inner: &str,
        origin: &str,
        keep: &impl Fn(&str) -> bool,
    ) -> Result<(), Error> {
        let dir = root.join(inner);
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Read { path, source }
        };
        for entry in fs::read_dir(&dir).map_err(failed(&dir))? {
            let entry = entry.map_err(failed(&dir))?;
            let inner = format!("{inner}{}", entry.file_name().to_string_lossy());
            let host = entry.path();
            let metadata = fs::symlink_metadata(&host).map_err(failed(&host))?;
            if metadata.is_dir() {
                self.tree(root, &format!("{inner}/"), origin, keep)?;
                continue;
            }
            let path = normalise(&inner);
            if !keep(&path) {
                continue;
            }
            if metadata.is_symlink() {
                let target = fs::read_link(&host).map_err(failed(&host))?;
                let target = path::link_target(&inner, &target.to_string_lossy());
                self.insert(&path, 0o777, Content::Symlink(target));
            } else {
                let origin = Some(format!("{origin}/{inner}"));
                self.insert(
                    &path,
                    metadata.permissions().mode() & 0o7777,
                    Content::File { path: host, origin },
                );
            }
        }
        Ok(())
    }

    /// Enters `content`, and directories where there are none above it.
    fn insert(&mut self, path: &str, permissions: u32, content: Content) -> &mut Self {
        for (index, _) in path.match_indices('/') {
            let directory = || Entry { permissions: 0o755, content: Content::Directory };
            self.entries.entry(path[..index].to_owned()).or_insert_with(directory);
        }
        self.entries.insert(path.to_owned(), Entry { permissions, content });
        self
    }
}
