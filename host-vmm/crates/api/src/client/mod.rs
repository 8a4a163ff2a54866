//! The operator's side.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use cluster::{
    member::Member,
    placement::{Explanation, Wish},
};
use hyper::Method;

mod connection;
mod log;
mod pooled;

pub use connection::{Connection, Content, Endpoint, Error, GoesOn};
pub use log::{Log, Piece};
pub use pooled::{Connections, PooledClient};

use super::{CloneWish, ForkWish, Forked, Image, Place, Platforms, Spawn, Spawned, Transfer, Vms, folder};

/// A connection to this platform, or to the only one that this user runs.
///
/// # Errors
/// Where there is none, or it does not answer.
pub fn connect(platform: Option<&Endpoint>) -> anyhow::Result<Connection> {
    let platform = platform
        .map_or_else(|| Ok(Endpoint::Socket(find_socket()?)), |platform| anyhow::Ok(platform.clone()))?;
    Ok(Connection::open(&platform)?)
}

/// The VMs of a platform: of this one, or of the only one that this user runs.
///
/// # Errors
/// Where there is none, or it does not answer.
pub fn vms(platform: Option<&Endpoint>) -> anyhow::Result<Vms> {
    Ok(connect(platform)?.ask_for(Method::GET, "/v1/vms", Content::none())?)
}

/// Has it stop one of them, and waits until that has ended.
///
/// # Errors
/// As [`vms`], or where it has no such VM.
pub fn stop(platform: Option<&Endpoint>, vm: &str) -> anyhow::Result<()> {
    connect(platform)?.ask(Method::DELETE, &vm_path(vm)?, Content::none())?;
    Ok(())
}

/// Has it fork one of them.
///
/// # Errors
/// As [`stop`], or where it can't.
pub fn fork(platform: Option<&Endpoint>, vm: &str, wish: &ForkWish) -> anyhow::Result<Forked> {
    let wish = Content::json(wish)?;
    Ok(connect(platform)?.ask_for(Method::POST, &format!("{}/fork", vm_path(vm)?), wish)?)
}

/// Has it fork one of them into copies on another platform.
///
/// # Errors
/// As [`fork`].
pub fn clone_vm(platform: Option<&Endpoint>, vm: &str, wish: &CloneWish) -> anyhow::Result<Forked> {
    let wish = Content::json(wish)?;
    Ok(connect(platform)?.ask_for(Method::POST, &vm_clone_path(vm)?, wish)?)
}

/// Its images.
///
/// # Errors
/// As [`vms`].
pub fn images(platform: Option<&Endpoint>) -> anyhow::Result<Vec<Image>> {
    Ok(connect(platform)?.ask_for(Method::GET, "/v1/images", Content::none())?)
}

/// One of them.
///
/// # Errors
/// As [`vms`], or where it has no such image.
pub fn image(platform: Option<&Endpoint>, id: &str) -> anyhow::Result<Image> {
    Ok(connect(platform)?.ask_for(Method::GET, &image_path(id)?, Content::none())?)
}

/// Has it let go of one.
///
/// # Errors
/// As [`image`].
pub fn remove_image(platform: Option<&Endpoint>, id: &str) -> anyhow::Result<()> {
    connect(platform)?.ask(Method::DELETE, &image_path(id)?, Content::none())?;
    Ok(())
}

/// Has it write one to a file, which may be a smaller one that takes longer.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn save_image(platform: Option<&Endpoint>, id: &str, path: &Path, compress: bool) -> anyhow::Result<()> {
    let path = Content::json(&place(path, compress)?)?;
    connect(platform)?.ask(Method::POST, &format!("{}/save", image_path(id)?), path)?;
    Ok(())
}

/// Has it keep the one that a file holds.
///
/// # Errors
/// As [`vms`], or where it can't.
pub fn load_image(platform: Option<&Endpoint>, path: &Path) -> anyhow::Result<Image> {
    Ok(connect(platform)?.ask_for(Method::POST, "/v1/images", Content::json(&place(path, false)?)?)?)
}

fn place(path: &Path, compress: bool) -> anyhow::Result<Place> {
    Ok(Place { path: std::path::absolute(path)?, compress })
}

/// Has it launch copies of one.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn spawn(platform: Option<&Endpoint>, id: &str, count: u32) -> anyhow::Result<Spawned> {
    let wish = Content::json(&Spawn { count })?;
    Ok(connect(platform)?.ask_for(Method::POST, &format!("{}/spawn", image_path(id)?), wish)?)
}

/// Has it launch copies of one on another platform.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn clone_image(platform: Option<&Endpoint>, id: &str, wish: &CloneWish) -> anyhow::Result<Spawned> {
    let wish = Content::json(wish)?;
    Ok(connect(platform)?.ask_for(Method::POST, &image_clone_path(id)?, wish)?)
}

/// The clones that it sends.
///
/// # Errors
/// As [`vms`].
pub fn transfers(platform: Option<&Endpoint>) -> anyhow::Result<Vec<Transfer>> {
    Ok(connect(platform)?.ask_for(Method::GET, "/v1/transfers", Content::none())?)
}

/// The platforms that it knows.
///
/// # Errors
/// As [`vms`], or where it is not one of several.
pub fn platforms(platform: Option<&Endpoint>) -> anyhow::Result<Platforms> {
    Ok(connect(platform)?.ask_for(Method::GET, "/v1/platforms", Content::none())?)
}

/// Where copies of a VM there would go, and why.
///
/// # Errors
/// As [`platforms`].
pub fn explain(platform: Option<&Endpoint>, wish: Wish) -> anyhow::Result<Explanation> {
    let mut connection = connect(platform)?;
    let own: Member = connection.ask_for(Method::GET, "/v1/platform", Content::none())?;
    let wish = Content::json(&Wish { source: own.name, ..wish })?;
    Ok(connection.ask_for(Method::POST, "/v1/place", wish)?)
}

fn vm_path(vm: &str) -> anyhow::Result<String> {
    let is_name = |character: char| character.is_ascii_alphanumeric() || "-.".contains(character);
    ensure!(!vm.is_empty() && vm.chars().all(is_name), "{vm:?} is no name of a VM, and no ID");
    Ok(format!("/v1/vms/{vm}"))
}

/// Where a platform is asked to clone a VM.
pub fn vm_clone_path(vm: &str) -> anyhow::Result<String> {
    Ok(format!("{}/clone", vm_path(vm)?))
}

/// Where it is asked to clone an image.
pub fn image_clone_path(id: &str) -> anyhow::Result<String> {
    Ok(format!("{}/clone", image_path(id)?))
}

fn image_path(id: &str) -> anyhow::Result<String> {
    let is_id =
        !id.is_empty() && id.chars().all(|character| character.is_ascii_hexdigit() || character == '-');
    ensure!(is_id, "{id:?} is not how an image's ID begins: that has digits, a to f and -");
    Ok(format!("/v1/images/{id}"))
}

/// The socket of the only platform that this user runs.
fn find_socket() -> anyhow::Result<PathBuf> {
    let folder = folder().context("can't look for platforms")?;
    let entries = fs::read_dir(&folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let entries = entries.with_context(|| format!("can't look for platforms in {}", folder.display()))?;
    // One that a killed platform has left behind accepts no connections.
    let mut alive: Vec<PathBuf> =
        entries.iter().map(fs::DirEntry::path).filter(|path| UnixStream::connect(path).is_ok()).collect();
    match (alive.pop(), alive.as_slice()) {
        (Some(socket), []) => Ok(socket),
        (None, _) => bail!(
            "no platform of this user runs (`host-vmm run` starts one); of another user's, name the socket by --api"
        ),
        (Some(last), others) => {
            let names = others.iter().chain([&last]).map(|path| format!("\n  {}", path.display()));
            bail!("several platforms run; name one by --api:{}", names.collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_can_be_nothing_else() {
        assert_eq!(vm_path("web.1").unwrap(), "/v1/vms/web.1");
        assert_eq!(image_path("ab-1").unwrap(), "/v1/images/ab-1");
        for bad in ["", "/", "../images", "a/log", "a b", "a?from=1", "a%2f", "a#", "\n"] {
            assert!(vm_path(bad).is_err() && image_path(bad).is_err(), "{bad:?}");
        }
    }
}
