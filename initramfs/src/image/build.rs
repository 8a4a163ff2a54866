//! Writing the archive, and not writing it again while its inputs are the same.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, ModeFileType, trailer};
use serde::{Deserialize, Serialize};

use super::{Content, Entry, Error, ImageBuilder};
use crate::packages::Deb;
use crate::{cache, hash};

/// An image that was written, now or earlier.
#[derive(Debug)]
pub struct Image {
    /// The archive.
    pub path: PathBuf,
    /// What it was made from; also in a JSON file beside it.
    pub manifest: Manifest,
    /// It was there already, made from the same inputs.
    pub reused: bool,
}

/// What an image was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Hash of the image.
    pub sha256: String,
    /// Size of the image.
    pub size_bytes: u64,
    /// Hash of all inputs: paths, permissions, contents.
    pub inputs_sha256: String,
    /// The packages that it has files of.
    pub packages: Vec<Deb>,
    /// Hashes of its files that are from no package, by their paths in the image.
    pub files: BTreeMap<String, String>,
}

impl ImageBuilder {
    /// Writes the image `dir/name.cpio` with its manifest `dir/name.json`, if it isn't there from the same
    /// inputs.
    ///
    /// # Errors
    ///
    /// An [`Error`] where an input can't be read or the image can't be written.
    pub fn build(&self, dir: &Path, name: &str) -> Result<Image, Error> {
        let path = dir.join(format!("{name}.cpio"));
        let manifest_name = format!("{name}.json");
        let failed = |source| Error::Write { path: path.clone(), source };
        let files = self.file_hashes()?;
        let inputs_sha256 = hash::of_bytes(self.inputs(&files).as_bytes());
        let size_bytes = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        let known = cache::read_json::<Manifest>(&dir.join(&manifest_name))
            .filter(|known| known.inputs_sha256 == inputs_sha256 && known.size_bytes == size_bytes);
        if let Some(manifest) = known {
            return Ok(Image { path, manifest, reused: true });
        }
        let mut new = cache::new_file(dir).map_err(failed)?;
        self.write(new.as_file_mut())?;
        let manifest = Manifest {
            sha256: hash::of_file(new.path()).map_err(failed)?,
            size_bytes: new.as_file().metadata().map_err(failed)?.len(),
            inputs_sha256,
            packages: self.packages.values().cloned().collect(),
            files,
        };
        new.persist(&path).map_err(|error| failed(error.error))?;
        cache::write_json(dir, &manifest_name, &manifest).map_err(failed)?;
        Ok(Image { path, manifest, reused: false })
    }

    /// Writes the archive to `out`.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] where an input can't be read, [`Error::Archive`] where `out` can't be written.
    pub fn write(&self, out: impl Write) -> Result<(), Error> {
        let mut out = BufWriter::with_capacity(1 << 20, out);
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            entry.write(path, inode, &mut out)?;
        }
        trailer(&mut out)?;
        Ok(out.flush()?)
    }

    /// Hashes of the files that are from no package.
    fn file_hashes(&self) -> Result<BTreeMap<String, String>, Error> {
        let mut hashes = BTreeMap::new();
        for (path, entry) in &self.entries {
            if let Content::File { path: host, origin: None } = &entry.content {
                let hash =
                    hash::of_file(host).map_err(|source| Error::Read { path: host.clone(), source })?;
                hashes.insert(path.clone(), hash);
            }
        }
        Ok(hashes)
    }

    /// All that decides what the archive will be, a line an entry.
    fn inputs(&self, file_hashes: &BTreeMap<String, String>) -> String {
        let line = |(path, entry): (&String, &Entry)| {
            let content = match &entry.content {
                Content::Directory => "directory".into(),
                Content::Bytes(bytes) => format!("bytes {}", hash::of_bytes(bytes)),
                Content::File { origin, .. } => {
                    format!("file {:?}", origin.as_ref().or(file_hashes.get(path)))
                }
                Content::Symlink(target) => format!("symlink {target:?}"),
                Content::CharDevice { major, minor } => format!("device {major}:{minor}"),
            };
            format!("{path:?} {:o} {content}\n", entry.permissions)
        };
        self.entries.iter().map(line).collect()
    }
}

impl Entry {
    fn write(&self, path: &str, inode: u32, out: &mut impl Write) -> Result<(), Error> {
        let header = Builder::new(path).ino(inode).mode(self.permissions);
        let bytes = match &self.content {
            Content::File { path, .. } => {
                &fs::read(path).map_err(|source| Error::Read { path: path.clone(), source })?
            }
            Content::Bytes(bytes) => bytes.as_slice(),
            Content::Symlink(target) => target.as_bytes(),
            Content::Directory | Content::CharDevice { .. } => &[],
        };
        let header = match self.content {
            Content::File { .. } | Content::Bytes(_) => header.set_mode_file_type(ModeFileType::Regular),
            Content::Symlink(_) => header.set_mode_file_type(ModeFileType::Symlink),
            Content::Directory => header.set_mode_file_type(ModeFileType::Directory),
            Content::CharDevice { major, minor } => {
                header.set_mode_file_type(ModeFileType::Char).rdev_major(major).rdev_minor(minor)
            }
        };
        let size = u32::try_from(bytes.len())
            .map_err(|_| Error::TooLarge { path: path.into(), bytes: bytes.len() })?;
        let mut writer = header.write(out, size);
        writer.write_all(bytes)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::{Duration, SystemTime};

    use cpio::newc::Reader;

    use super::*;

    fn sample() -> ImageBuilder {
        let mut image = ImageBuilder::default();
        image
            .bytes("/init", 0o755, "#!/bin/sh\n")
            .bytes("/bin/tool", 0o4755, "tool")
            .symlink("/bin", "usr/bin")
            .char_device("/dev/console", 0o600, 5, 1)
            .directory("/proc");
        image
    }

    fn archive(image: &ImageBuilder) -> Vec<u8> {
        let mut bytes = Vec::new();
        image.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn archive_holds_sorted_entries_with_their_directories() {
        let bytes = archive(&sample());
        let mut rest = bytes.as_slice();
        let mut listing = Vec::new();
        loop {
            let mut reader = Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let mut content = String::new();
            reader.read_to_string(&mut content).unwrap();
            let entry = reader.entry();
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            listing.push(format!(
                "{} {} {:o} {}",
                entry.ino(),
                entry.name(),
                entry.mode(),
                content.trim_end()
            ));
            rest = reader.finish().unwrap();
        }
        assert_eq!(
            listing,
            [
                "1 bin 120777 usr/bin",
                "2 dev 40755 ",
                "3 dev/console 20600 ",
                "4 init 100755 #!/bin/sh",
                "5 proc 40755 ",
                "6 usr 40755 ",
                "7 usr/bin 40755 ",
                "8 usr/bin/tool 104755 tool",
            ]
        );
    }

    #[test]
    fn equal_inputs_give_equal_bytes_in_any_order() {
        let mut other = ImageBuilder::default();
        other
            .directory("/proc")
            .char_device("/dev/console", 0o600, 5, 1)
            .bytes("/usr/bin/tool", 0o4755, "tool")
            .symlink("/bin", "usr/bin")
            .bytes("/init", 0o755, "#!/bin/sh\n");
        assert_eq!(archive(&sample()), archive(&other));
    }

    #[test]
    fn place_and_age_of_the_inputs_do_not_matter() {
        let archives = [1, 1_000_000_000].map(|age| {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir_all(root.path().join("lib/x86_64-linux-gnu")).unwrap();
            std::os::unix::fs::symlink("libz.so.1.2", root.path().join("lib/x86_64-linux-gnu/libz.so.1"))
                .unwrap();
            let file = fs::File::create(root.path().join("lib/x86_64-linux-gnu/libz.so.1.2")).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(age)).unwrap();
            fs::write(root.path().join("lib/dropped"), "").unwrap();
            let mut image = ImageBuilder::default();
            image.tree(root.path(), "", "package", &|path| path.contains(".so")).unwrap();
            assert_eq!(image.entries.len(), 5, "{:?}", image.entries.keys());
            let first = image.build(root.path(), "image").unwrap();
            (fs::read(first.path).unwrap(), first.manifest)
        });
        assert_eq!(archives[0], archives[1]);
    }

    #[test]
    fn image_is_built_again_when_an_input_changed() {
        let dir = tempfile::tempdir().unwrap();
        let first = sample().build(dir.path(), "image").unwrap();
        assert!(!first.reused);
        assert_eq!(fs::read(&first.path).unwrap(), archive(&sample()));

        let second = sample().build(dir.path(), "image").unwrap();
        assert!(second.reused);
        assert_eq!(second.manifest, first.manifest);

        let added = dir.path().join("added");
        let mut changed = sample();
        for content in ["one", "two"] {
            fs::write(&added, content).unwrap();
            let third = changed.file("/etc/added", 0o644, &added).build(dir.path(), "image").unwrap();
            assert!(!third.reused);
            assert_ne!(third.manifest.sha256, first.manifest.sha256);
            assert_eq!(third.manifest.files.keys().collect::<Vec<_>>(), ["etc/added"]);
        }
    }
}
