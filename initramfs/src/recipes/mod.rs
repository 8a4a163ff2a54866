//! The images of this project. A caller adds its own files, such as the `vmfork` program, before it builds
//! one.
//!
//! Every guest starts with `init.sh`, which mounts the usual file systems and runs `start.sh`, which runs the
//! program that the kernel's command line names: `vmfork.start=/usr/bin/python3,/root/app.py`; a shell by
//! default.

mod python;

use std::path::Path;
use std::process::Command;

pub use self::python::{licenses, python};
use crate::image::{Error, ImageBuilder};
use crate::packages::Packages;

/// Root, and two users: `guest` may use the kernel module's device, `other` may not.
const USERS: &str = "\
root:x:0:0:root:/root:/bin/sh
guest:x:1000:1000:guest:/tmp:/bin/sh
other:x:1001:1001:other:/tmp:/bin/sh
";

/// Their groups. The device belongs to `vmfork`.
const GROUPS: &str = "\
root:x:0:
vmfork:x:900:guest
guest:x:1000:
other:x:1001:
";

/// A guest with busybox and nothing else. `/init` loads the kernel module where the image has one for the
/// kernel that is booted; the word `vmfork.module=off` on the kernel's command line keeps it from that.
///
/// # Errors
///
/// An [`Error`] where a package can't be had or read.
pub fn minimal(packages: &Packages) -> Result<ImageBuilder, Error> {
    let mut image = base(packages)?;
    image.bytes("/etc/group", 0o644, GROUPS).bytes("/etc/passwd", 0o644, USERS);
    image.bytes("/init", 0o755, include_str!("init.sh")).bytes(
        "/etc/guest/start",
        0o755,
        include_str!("start.sh"),
    );
    Ok(image)
}

/// The directories, device nodes, settings and tools that every image starts from; no `/init`.
///
/// # Errors
///
/// An [`Error`] where a package can't be had or read.
pub fn base(packages: &Packages) -> Result<ImageBuilder, Error> {
    let mut image = ImageBuilder::default();
    for merged in crate::image::MERGED {
        image.directory(&format!("/usr/{merged}")).symlink(merged, &format!("usr/{merged}"));
    }
    for directory in ["/dev", "/etc", "/proc", "/root", "/run", "/sys", "/tmp", "/var"] {
        image.directory(directory);
    }
    image.bytes("/etc/fstab", 0o644, include_str!("fstab"));
    image.bytes("/etc/group", 0o644, "root:x:0:\n");
    image.bytes("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n");
    // The kernel opens /dev/console before /init can mount anything.
    image.char_device("/dev/console", 0o600, 5, 1).char_device("/dev/null", 0o666, 1, 3);
    for deb in packages.closure(&["busybox-static"])? {
        image.package(packages, &deb, &|path| path == "usr/bin/busybox")?;
        let root = packages.unpack(&deb)?;
        let program = ["bin/busybox", "usr/bin/busybox"].map(|path| root.join(path));
        if let Some(program) = program.iter().find(|path| path.is_file()) {
            add_applets(&mut image, program)?;
        }
    }
    Ok(image)
}

/// Adds a link to busybox for each of its applets, as this very busybox lists them.
fn add_applets(image: &mut ImageBuilder, busybox: &Path) -> Result<(), Error> {
    let output = Command::new(busybox).arg("--list-full").output();
    let output = output.map_err(|source| Error::Read { path: busybox.into(), source })?;
    for applet in
        String::from_utf8_lossy(&output.stdout).lines().filter(|applet| !applet.ends_with("/busybox"))
    {
        image.symlink(applet, "/bin/busybox");
    }
    Ok(())
}
