//! A guest with Debian's Python and its standard library.

use std::path::PathBuf;

use super::minimal;
use crate::image::{Error, ImageBuilder};
use crate::packages::{Deb, Packages};

/// base-files has the texts of common licences: a text for applications to read.
const PACKAGES: [&str; 2] = ["base-files", "python3"];

/// Where Debian keeps those texts.
const LICENSES: &str = "usr/share/common-licenses";

/// Files and directories of Python's library that serve development, graphics or the network, which this
/// guest lacks. The codecs are those of East Asian encodings; without OpenSSL, `hashlib` uses Python's own
/// code.
const DROPPED: [&str; 17] = [
    "__pycache__",
    "_codecs_",
    "_hashlib.",
    "_ssl.",
    "config-",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "nis.",
    "pydoc_data",
    "test",
    "tests",
    "tkinter",
    "turtle.py",
    "turtledemo",
    "_dbm.",
];

/// [`minimal`] with `/usr/bin/python3`, and the texts of common licences in `/usr/share/common-licenses`.
///
/// # Errors
///
/// An [`Error`] where a package can't be had or read.
pub fn python(packages: &Packages) -> Result<ImageBuilder, Error> {
    let mut image = minimal(packages)?;
    for deb in packages.closure(&PACKAGES)? {
        image.package(packages, &deb, &keep)?;
    }
    Ok(image)
}

/// The directory on the host with the same texts of licences as in [`python`]'s image.
///
/// # Errors
///
/// An [`Error`] where the package can't be had.
pub fn licenses(packages: &Packages) -> Result<PathBuf, Error> {
    let is_base_files = |deb: &Deb| deb.package == "base-files";
    let deb = packages.closure(&PACKAGES)?.into_iter().find(is_base_files).ok_or(Error::NoLicenses)?;
    Ok(packages.unpack(&deb)?.join(LICENSES))
}

/// Whether a file of a package goes into the image.
fn keep(path: &str) -> bool {
    let Some((dir, file)) = path.rsplit_once('/') else { return false };
    match dir {
        "usr/bin" => file.starts_with("python3"),
        "usr/lib/x86_64-linux-gnu" => file.contains(".so"),
        "usr/lib64" => true,
        _ if dir.starts_with(LICENSES) => true,
        _ => dir.starts_with("usr/lib/python3") && !path.split('/').skip(3).any(is_dropped),
    }
}

/// Whether [`DROPPED`] names a part of a path: whole, or by its beginning where the entry ends in
/// punctuation.
fn is_dropped(part: &str) -> bool {
    DROPPED
        .iter()
        .any(|name| if name.ends_with(['.', '-', '_']) { part.starts_with(name) } else { part == *name })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_runs_is_kept() {
        for path in [
            "usr/bin/python3.11",
            "usr/lib/python3.11/sqlite3/__init__.py",
            "usr/lib/python3.11/unittest/case.py",
            "usr/lib/python3.11/lib-dynload/_sqlite3.cpython-311-x86_64-linux-gnu.so",
            "usr/lib/x86_64-linux-gnu/libsqlite3.so.0",
            "usr/lib64/ld-linux-x86-64.so.2",
            "usr/share/common-licenses/GPL-3",
        ] {
            assert!(keep(path), "{path}");
        }
        for path in [
            "etc/issue",
            "usr/bin/py3compile",
            "usr/lib/python3.11/test/support/__init__.py",
            "usr/lib/python3.11/lib-dynload/_codecs_jp.cpython-311-x86_64-linux-gnu.so",
            "usr/lib/python3.11/config-3.11-x86_64-linux-gnu/Makefile",
            "usr/lib/x86_64-linux-gnu/gconv/UTF-7.so",
            "usr/lib/python3.11/lib-dynload/_hashlib.cpython-311-x86_64-linux-gnu.so",
            "usr/share/doc/python3/copyright",
        ] {
            assert!(!keep(path), "{path}");
        }
    }
}
