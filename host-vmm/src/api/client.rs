//! The operator's side.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::runtime;

use super::{Failure, Image, Place, Spawn, Spawned, Vms, folder};

/// Longest answer in bytes.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// The VMs of a platform: that with this socket, or the only one that this user runs.
///
/// # Errors
/// Where there is none, or it does not answer.
pub fn vms(socket: Option<&Path>) -> anyhow::Result<Vms> {
    decode(&ask(socket, Method::GET, "/v1/vms", &())?)
}

/// Its images.
///
/// # Errors
/// As [`vms`].
pub fn images(socket: Option<&Path>) -> anyhow::Result<Vec<Image>> {
    decode(&ask(socket, Method::GET, "/v1/images", &())?)
}

/// One of them.
///
/// # Errors
/// As [`vms`], or where it has no such image.
pub fn image(socket: Option<&Path>, id: &str) -> anyhow::Result<Image> {
    decode(&ask(socket, Method::GET, &image_path(id)?, &())?)
}

/// Has it let go of one.
///
/// # Errors
/// As [`image`].
pub fn remove_image(socket: Option<&Path>, id: &str) -> anyhow::Result<()> {
    ask(socket, Method::DELETE, &image_path(id)?, &()).map(drop)
}

/// Has it write one to a file.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn save_image(socket: Option<&Path>, id: &str, path: &Path) -> anyhow::Result<()> {
    ask(socket, Method::POST, &format!("{}/save", image_path(id)?), &place(path)?).map(drop)
}

/// Has it keep the one that a file holds.
///
/// # Errors
/// As [`vms`], or where it can't.
pub fn load_image(socket: Option<&Path>, path: &Path) -> anyhow::Result<Image> {
    decode(&ask(socket, Method::POST, "/v1/images", &place(path)?)?)
}

fn place(path: &Path) -> anyhow::Result<Place> {
    Ok(Place { path: std::path::absolute(path)? })
}

/// Has it launch copies of one.
///
/// # Errors
/// As [`image`], or where it can't.
pub fn spawn(socket: Option<&Path>, id: &str, count: u32) -> anyhow::Result<Spawned> {
    decode(&ask(socket, Method::POST, &format!("{}/spawn", image_path(id)?), &Spawn { count })?)
}

fn image_path(id: &str) -> anyhow::Result<String> {
    let is_id = !id.is_empty() && id.chars().all(|character| character.is_ascii_hexdigit() || character == '-');
    ensure!(is_id, "{id:?} is not how an image's ID begins: that has digits, a to f and -");
    Ok(format!("/v1/images/{id}"))
}

fn decode<T: DeserializeOwned>(answer: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(answer).context("can't understand what the platform says")
}

/// Asks a platform, and gives back its answer.
fn ask(socket: Option<&Path>, method: Method, path: &str, body: &impl Serialize) -> anyhow::Result<Bytes> {
    let socket = socket.map_or_else(find_socket, |socket| Ok(socket.to_owned()))?;
    let body = serde_json::to_vec(body)?;
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let answer = runtime.block_on(exchange(&socket, method, path, body));
    let (status, answer) = answer.with_context(|| format!("the platform at {} does not answer", socket.display()))?;
    if !status.is_success() {
        match serde_json::from_slice(&answer) {
            Ok(Failure { error }) => bail!(error),
            Err(_) => bail!("the platform refuses: {status}"),
        }
    }
    Ok(answer)
}

async fn exchange(socket: &Path, method: Method, path: &str, body: Vec<u8>) -> anyhow::Result<(StatusCode, Bytes)> {
    let stream = TokioIo::new(tokio::net::UnixStream::connect(socket).await?);
    let (mut sender, connection) = http1::handshake(stream).await?;
    let request = Request::builder().method(method).uri(path).header(header::HOST, "localhost");
    let request = request.header(header::CONTENT_TYPE, "application/json").body(Full::new(Bytes::from(body)))?;
    // The connection's own end is told by the answer.
    let (answer, _) = tokio::join!(
        async {
            let response = sender.send_request(request).await?;
            drop(sender);
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            Ok((status, body.map_err(|error| anyhow::anyhow!(error))?.to_bytes()))
        },
        connection
    );
    answer
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
