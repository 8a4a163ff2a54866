//! Guest kernels: Debian's own, pinned here and nowhere else, and [`lean`], one that is built from Debian's
//! sources.

mod config;
pub mod lean;
mod make;
pub mod module;
pub mod tools;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};

use crate::packages::{self, Deb, Packages, Record};

/// The kernel that guests and the lab boot.
pub const PIN: Pin = Pin {
    package: "linux-image-6.1.0-56-cloud-amd64",
    version: "6.1.192-2",
    sha256: "e7d02b943971edcb8790e256c02cfab3bca6c3d37c1bf25392a57c71300615ee",
};

/// The package that depends on the current kernel of the same kind: asked where [`PIN`] can't be had.
const CURRENT: &str = "linux-image-cloud-amd64";

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The package could not be had.
    #[error("can't get the guest kernel")]
    Packages(#[from] packages::Error),
    /// The mirror knows neither the pinned kernel nor a current one.
    #[error("the mirror has neither {} {} nor what {CURRENT} depends on", PIN.package, PIN.version)]
    NotOffered,
    /// The package is not built as Debian's kernel packages are.
    #[error("{} holds no boot/vmlinuz-RELEASE with its modules in lib/modules/RELEASE", dir.display())]
    Layout {
        /// The unpacked package.
        dir: PathBuf,
    },
}

/// One exact version of a kernel package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin {
    /// Name of the package.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Hash of the package file.
    pub sha256: &'static str,
}

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The package it is from.
    pub deb: Deb,
    /// The kernel's own name for its version, as `uname -r` gives it.
    pub release: String,
    /// The bootable image.
    pub vmlinuz: PathBuf,
    /// The directory of its modules, `…/lib/modules/RELEASE`.
    pub modules: PathBuf,
}

impl Kernel {
    /// Downloads and unpacks the pinned kernel, or the current one where the mirror has dropped the pinned
    /// one.
    ///
    /// # Errors
    ///
    /// An [`Error`] where no kernel can be had.
    pub fn fetch(packages: &Packages) -> Result<Self, Error> {
        let key = format!("kernel_{}_{}", PIN.package, PIN.version);
        let find = || -> Result<Deb, Error> {
            let choice = || choose(&PIN, |package| packages.records(package))?.ok_or(Error::NotOffered);
            match packages.download(&choice()?) {
                // By now the package lists are new: the mirror may have dropped what the old ones named.
                Err(packages::Error::Apt(_)) => Ok(packages.download(&choice()?)?),
                result => Ok(result?),
            }
        };
        let found = packages.remembered(&key, || Ok::<_, Error>(vec![find()?]))?;
        let deb = found.into_iter().next().ok_or(Error::NotOffered)?;
        let dir = packages.unpack(&deb)?;
        in_package(&dir, deb).ok_or(Error::Layout { dir })
    }

    /// What to tell the user if this is not the pinned kernel.
    pub fn notice(&self) -> Option<String> {
        let pinned = self.deb.package == PIN.package && self.deb.version == PIN.version;
        (!pinned).then(|| {
            format!(
                "the mirror does not have the pinned kernel {} {}: using its current one, {} {}",
                PIN.package, PIN.version, self.deb.package, self.deb.version
            )
        })
    }
}

/// Decides which kernel package to take; `offered` gives the versions of a package that the mirror has, the
/// best first.
///
/// The pinned one keeps the pinned hash; for any other, the hash is the one that the archive signed.
fn choose<E>(pin: &Pin, offered: impl Fn(&str) -> Result<Vec<Record>, E>) -> Result<Option<Record>, E> {
    if let Some(record) = offered(pin.package)?.into_iter().find(|record| record.version == pin.version) {
        return Ok(Some(Record { sha256: pin.sha256.into(), ..record }));
    }
    let current = offered(CURRENT)?.into_iter().next();
    let Some(package) = current.as_ref().and_then(|record| kernel_package(&record.depends)) else {
        return Ok(None);
    };
    Ok(offered(package)?.into_iter().next())
}

/// The kernel package in the dependencies of [`CURRENT`].
fn kernel_package(depends: &str) -> Option<&str> {
    depends
        .split(',')
        .filter_map(|item| item.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-"))
}

/// Finds kernel and modules in an unpacked package.
fn in_package(dir: &Path, deb: Deb) -> Option<Kernel> {
    ["lib/modules", "usr/lib/modules"].into_iter().find_map(|modules| {
        let modules = fs::read_dir(dir.join(modules)).ok()?.next()?.ok()?.path();
        let release = modules.file_name()?.to_str()?.to_owned();
        let vmlinuz = dir.join(format!("boot/vmlinuz-{release}"));
        vmlinuz.is_file().then(|| Kernel { deb: deb.clone(), release, vmlinuz, modules })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mirror with these packages: name, version, dependencies.
    fn choose_from(mirror: &[(&str, &str, &str)]) -> Option<Record> {
        let offered = |package: &str| {
            let known = mirror.iter().filter(|(name, ..)| *name == package);
            let records = known.map(|(name, version, depends)| Record {
                package: (*name).into(),
                version: (*version).into(),
                architecture: "amd64".into(),
                depends: (*depends).into(),
                sha256: "the archive's".into(),
            });
            Ok::<_, std::convert::Infallible>(records.collect())
        };
        choose(&PIN, offered).unwrap()
    }

    #[test]
    fn pinned_version_is_taken_though_a_newer_one_is_offered() {
        let newer = "linux-image-6.1.0-99-cloud-amd64 (= 6.1.999-1)";
        let record = choose_from(&[
            (CURRENT, "6.1.999-1", newer),
            ("linux-image-6.1.0-99-cloud-amd64", "6.1.999-1", ""),
            (PIN.package, PIN.version, "kmod"),
        ])
        .unwrap();
        assert_eq!((record.package.as_str(), record.version.as_str()), (PIN.package, PIN.version));
        assert_eq!(record.sha256, PIN.sha256);
    }

    #[test]
    fn current_kernel_is_taken_where_the_pinned_one_is_gone() {
        let record = choose_from(&[
            (CURRENT, "6.12.57-1", "linux-base, linux-image-6.12.57+deb13-cloud-amd64 (= 6.12.57-1)"),
            ("linux-image-6.12.57+deb13-cloud-amd64", "6.12.57-1", "kmod"),
        ])
        .unwrap();
        assert_eq!(record.package, "linux-image-6.12.57+deb13-cloud-amd64");
        assert_eq!(record.sha256, "the archive's");
    }

    #[test]
    fn current_kernel_is_taken_where_the_pinned_package_has_another_version() {
        let record = choose_from(&[
            (PIN.package, "6.1.192-3", "kmod"),
            (CURRENT, "6.1.192-3", &format!("{} (= 6.1.192-3)", PIN.package)),
        ])
        .unwrap();
        assert_eq!((record.package.as_str(), record.version.as_str()), (PIN.package, "6.1.192-3"));
        assert_eq!(record.sha256, "the archive's");
    }

    #[test]
    fn nothing_is_taken_from_a_mirror_without_kernels() {
        assert_eq!(choose_from(&[("busybox-static", "1", "")]), None);
    }
}
