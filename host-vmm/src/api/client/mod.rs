//! The operator's side.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use hyper::Method;

mod connection;

pub use connection::{Connection, Content, Endpoint, Error};

use super::{CloneWish, Image, Place, Platforms, Spawn, Spawned, Transfer, Vms, folder};
use crate::cluster::{
    member::Member,
    placement::{Explanation, Wish},
};

/// A connection to the platform with this socket, or to the only one that this user runs.
///
/// # Errors
/// Where there is none, or it does not answer.
pub fn connect(socket: Option<&Path>) -> anyhow::Result<Connection> {
    let socket = socket.map_or_else(find_socket, |socket| Ok(socket.to_owned()))?;
    Ok(Connection::open(&Endpoint::Socket(socket))?)
}

/// The VMs of a platform: that with this socket, or the only one that this user runs.
///
/// # Errors
/// Where there is none, or it does not answer.
pub fn vms(socket: Option<&Path>) -> anyhow::Result<Vms> {
    Ok(connect(socket)?.ask_for(Method::GET, "/v1/vms", Content::none())?)
}

/// Its images.
///
/// # Errors
/// As [`vms`].
pub fn images(socket: Option<&Path>) -> anyhow::Result<Vec<Image>> {
    Ok(connect(socket)?.ask_for(Method::GET, "/v1/images", Content::none())?)
}

/// One of them.
///
/// # Errors
/// As [`vms`], or where it has no such image.
pub fn image(socket: Option<&Path>, id: &str) -> anyhow::Result<Image> {
    Ok(connect(socket)?.ask_for(Method::GET, &image_path(id)?, Content::none())?)
}

/// Has it let go of one.
///
/// # Errors
/// As [`image`].
pub fn remove_image(socket: Option<&Path>, id: &str) -> anyhow::Result<()> {
    connect(socket)?.ask(Method::DELETE, &image_path(id)?, Content::none())?;
    Ok(())
}

/// Has it write one to a file, which may be a smaller one that takes longer.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn save_image(socket: Option<&Path>, id: &str, path: &Path, compress: bool) -> anyhow::Result<()> {
    let path = Content::json(&place(path, compress)?)?;
    connect(socket)?.ask(Method::POST, &format!("{}/save", image_path(id)?), path)?;
    Ok(())
}

/// Has it keep the one that a file holds.
///
/// # Errors
/// As [`vms`], or where it can't.
pub fn load_image(socket: Option<&Path>, path: &Path) -> anyhow::Result<Image> {
    Ok(connect(socket)?.ask_for(Method::POST, "/v1/images", Content::json(&place(path, false)?)?)?)
}

fn place(path: &Path, compress: bool) -> anyhow::Result<Place> {
    Ok(Place { path: std::path::absolute(path)?, compress })
}

/// Has it launch copies of one.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn spawn(socket: Option<&Path>, id: &str, count: u32) -> anyhow::Result<Spawned> {
    let wish = Content::json(&Spawn { count })?;
    Ok(connect(socket)?.ask_for(Method::POST, &format!("{}/spawn", image_path(id)?), wish)?)
}

/// Has it launch copies of one on another platform.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn clone_image(socket: Option<&Path>, id: &str, wish: &CloneWish) -> anyhow::Result<Spawned> {
    let wish = Content::json(wish)?;
    Ok(connect(socket)?.ask_for(Method::POST, &format!("{}/clone", image_path(id)?), wish)?)
}

/// The clones that it sends.
///
/// # Errors
/// As [`vms`].
pub fn transfers(socket: Option<&Path>) -> anyhow::Result<Vec<Transfer>> {
    Ok(connect(socket)?.ask_for(Method::GET, "/v1/transfers", Content::none())?)
}

/// The platforms that it knows.
///
/// # Errors
/// As [`vms`], or where it is not one of several.
pub fn platforms(socket: Option<&Path>) -> anyhow::Result<Platforms> {
    Ok(connect(socket)?.ask_for(Method::GET, "/v1/platforms", Content::none())?)
}

/// Where copies of a VM there would go, and why.
///
/// # Errors
/// As [`platforms`].
pub fn explain(socket: Option<&Path>, wish: Wish) -> anyhow::Result<Explanation> {
    let mut connection = connect(socket)?;
    let own: Member = connection.ask_for(Method::GET, "/v1/platform", Content::none())?;
    let wish = Content::json(&Wish { source: own.name, ..wish })?;
    Ok(connection.ask_for(Method::POST, "/v1/place", wish)?)
}

fn image_path(id: &str) -> anyhow::Result<String> {
    let is_id = !id.is_empty() && id.chars().all(|character| character.is_ascii_hexdigit() || character == '-');
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
