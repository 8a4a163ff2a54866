//! The operator's side.

use std::{
    fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail, ensure};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::runtime;

use super::{Vms, folder};

/// Longest answer in bytes.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Asks a platform for its VMs: that with this socket, or the only one that this user runs.
///
/// # Errors
/// Where there is none, or it does not answer.
pub fn vms(socket: Option<&Path>) -> anyhow::Result<Vms> {
    get(socket, "/v1/vms")
}

fn get<T: DeserializeOwned>(socket: Option<&Path>, path: &str) -> anyhow::Result<T> {
    let socket = socket.map_or_else(find_socket, |socket| Ok(socket.to_owned()))?;
    let answer = runtime::Builder::new_current_thread().enable_io().build()?.block_on(ask(&socket, path));
    let answer = answer.with_context(|| format!("the platform at {} does not answer", socket.display()))?;
    serde_json::from_slice(&answer).with_context(|| format!("can't understand what {} says", socket.display()))
}

async fn ask(socket: &Path, path: &str) -> anyhow::Result<Bytes> {
    let stream = TokioIo::new(tokio::net::UnixStream::connect(socket).await?);
    let (mut sender, connection) = http1::handshake(stream).await?;
    let request = Request::get(path).header(header::HOST, "localhost").body(Empty::<Bytes>::new())?;
    // The connection's own end is told by the answer.
    let (answer, _) = tokio::join!(
        async {
            let response = sender.send_request(request).await?;
            drop(sender);
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
            ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
            Ok(body)
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
