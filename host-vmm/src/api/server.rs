//! The platform's side.

use std::{
    fs, io,
    os::unix::net::UnixListener,
    path,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use tokio::{runtime, sync::oneshot};
use vmfork_abi::MAX_CHILDREN;

use super::{Copied, Failure, Image, Place, Spawn, Spawned, Vms};
use crate::{
    error::chain,
    platform::{Error, Platform},
};

/// How long those who are being answered may take when the platform comes to its end.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// A socket on which the API is served. Dropping it takes the socket away, once those are answered who have asked.
#[derive(Debug)]
#[must_use]
pub struct Server {
    path: path::PathBuf,
    /// Dropped to make an end.
    stop: Option<oneshot::Sender<()>>,
    /// Disconnected when there is an end.
    ended: mpsc::Receiver<()>,
}

/// Serves the API of a platform on a socket of this name, on a thread of its own.
///
/// # Errors
/// Where there can be no such socket, or a thread not be started.
pub fn serve(platform: &Arc<Platform>, path: &path::Path) -> io::Result<Server> {
    let listener = UnixListener::bind(path)?;
    let ((stop, stopped), (end, ended)) = (oneshot::channel::<()>(), mpsc::channel());
    let server = Server { path: path.to_owned(), stop: Some(stop), ended };
    listener.set_nonblocking(true)?;
    let runtime = runtime::Builder::new_current_thread().enable_io().build()?;
    let routes = Router::new()
        .route("/v1/vms", get(vms))
        .route("/v1/images", get(images).post(load_image))
        .route("/v1/images/{id}", get(image).delete(remove_image))
        .route("/v1/images/{id}/save", post(save_image))
        .route("/v1/images/{id}/spawn", post(spawn))
        .with_state(Arc::clone(platform));
    thread::Builder::new().name("api".into()).spawn(move || {
        let _end: mpsc::Sender<()> = end;
        let served = runtime.block_on(async {
            let listener = tokio::net::UnixListener::from_std(listener)?;
            let stop = async { stopped.await.unwrap_or_default() };
            axum::serve(listener, routes).with_graceful_shutdown(stop).await
        });
        if let Err(error) = served {
            tracing::error!(%error, "the API is not served any more");
        }
    })?;
    Ok(server)
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.ended.recv_timeout(LAST_ANSWERS) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("somebody asks without listening to the answer");
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(%error, socket = %self.path.display(), "the API's socket can't be removed");
        }
    }
}

async fn vms(State(platform): State<Arc<Platform>>) -> Json<Vms> {
    // It reads from /proc for each VM: this thread has nothing else to do.
    Json(platform.vms())
}

async fn images(State(platform): State<Arc<Platform>>) -> Result<Json<Vec<Image>>, Refusal> {
    Ok(Json(platform.images()?))
}

async fn image(State(platform): State<Arc<Platform>>, Path(id): Path<String>) -> Result<Json<Image>, Refusal> {
    Ok(Json(platform.image(&id)?))
}

async fn remove_image(State(platform): State<Arc<Platform>>, Path(id): Path<String>) -> Result<StatusCode, Refusal> {
    platform.remove_image(&id)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn spawn(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Json(Spawn { count }): Json<Spawn>,
) -> Result<Json<Spawned>, Refusal> {
    if !(1..=MAX_CHILDREN).contains(&count) {
        return Err(Refusal(StatusCode::BAD_REQUEST, format!("the count must be from 1 to {MAX_CHILDREN}")));
    }
    let copies = work(move || platform.spawn(&id, count)).await?;
    Ok(Json(Spawned { vms: copies.into_iter().map(|vm| Copied { id: vm.id, name: vm.name }).collect() }))
}

async fn save_image(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Json(Place { path }): Json<Place>,
) -> Result<StatusCode, Refusal> {
    check_absolute(&path)?;
    work(move || platform.save_image(&id, &path)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn load_image(
    State(platform): State<Arc<Platform>>,
    Json(Place { path }): Json<Place>,
) -> Result<Json<Image>, Refusal> {
    check_absolute(&path)?;
    Ok(Json(work(move || platform.load_image(&path)).await?))
}

fn check_absolute(path: &path::Path) -> Result<(), Refusal> {
    let refusal = || Refusal(StatusCode::BAD_REQUEST, format!("{} does not start at the root", path.display()));
    if path.is_absolute() { Ok(()) } else { Err(refusal()) }
}

/// Does what takes a while: not on the thread that answers others.
async fn work<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))??)
}

/// Why a request is not served.
#[derive(Debug)]
struct Refusal(StatusCode, String);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::NoImage(_) => StatusCode::NOT_FOUND,
            Error::Ambiguous(_) | Error::Full { .. } | Error::Stopping | Error::Kept(_) => StatusCode::CONFLICT,
            Error::ImageFile { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, chain(&error))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(Failure { error: self.1 })).into_response()
    }
}
