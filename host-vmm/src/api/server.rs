//! The platform's side.

use std::{
    fs, io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use axum::{Json, Router, extract::State, routing::get};
use tokio::runtime;

use super::Vms;
use crate::platform::Platform;

/// A socket on which the API is served. Dropping it takes the socket away.
#[derive(Debug)]
#[must_use]
pub struct Server(PathBuf);

/// Serves the API of a platform on a socket of this name, on a thread of its own.
///
/// # Errors
/// Where there can be no such socket, or a thread not be started.
pub fn serve(platform: &Arc<Platform>, path: &Path) -> io::Result<Server> {
    let listener = UnixListener::bind(path)?;
    let server = Server(path.to_owned());
    listener.set_nonblocking(true)?;
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let routes = Router::new().route("/v1/vms", get(vms)).with_state(Arc::clone(platform));
    thread::Builder::new().name("api".into()).spawn(move || {
        let served = runtime.block_on(async {
            let listener = tokio::net::UnixListener::from_std(listener)?;
            axum::serve(listener, routes).await
        });
        if let Err(error) = served {
            tracing::error!(%error, "the API is not served any more");
        }
    })?;
    Ok(server)
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(%error, socket = %self.0.display(), "the API's socket can't be removed");
        }
    }
}

async fn vms(State(platform): State<Arc<Platform>>) -> Json<Vms> {
    // It reads from /proc for each VM: this thread has nothing else to do.
    Json(platform.vms())
}
