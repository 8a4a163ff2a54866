//! The platform's side.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use api::{
    Failure, VERSION, client,
    steady::{LEAST_RATE, Limits, Steady},
};
use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{ConnectInfo, Request},
    http::{
        StatusCode,
        header::{ALLOW, CONTENT_TYPE},
    },
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use base::{text::Reason, threads};
use cluster::{
    principal::{ConnectionPeer, Role},
    tls::{self, Credentials},
};
use tokio::{
    runtime::{self, Runtime},
    sync::watch,
    task::JoinSet,
};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use vmfork_abi::{ErrorCode, MAX_CHILDREN};

mod clones;
mod description;
mod images;
mod orders;
mod platforms;
mod supplies;
mod vms;

use crate::{Error, Platform};

/// How long those who are being answered may take when the platform comes to its end.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Most threads that answer: what comes with clones is looked at by them.
const MAX_THREADS: usize = 4;

/// How slowly what is asked may come. A clone whose source sends nothing for the time of its lease is undone
/// before that.
const ASKED: Limits =
    Limits { between: Duration::from_secs(60), whole: Duration::from_secs(120), rate: Some(LEAST_RATE) };

/// Longest reason of a refusal in bytes.
const MAX_REASON_BYTES: usize = 64 << 10;

/// Where other platforms, and operators elsewhere, reach a platform.
#[derive(Debug, Clone)]
pub enum Network {
    /// Over TLS.
    Tls(SocketAddr, Credentials),
    /// On this host alone, without.
    Plain(SocketAddr),
}

/// Why the API can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket can't be there, or there is no thread.
    #[error("can't serve the API on {path}")]
    Local {
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The address can't be listened on.
    #[error("can't serve the API for others")]
    Network(#[from] tls::Error),
    /// Nobody can be told the address.
    #[error("can't find out on which address the API is served for others")]
    Address(#[source] io::Error),
}

/// Where the API is served. Dropping it takes the socket away, once those are answered who have asked.
#[derive(Debug)]
#[must_use]
pub struct Server {
    path: PathBuf,
    /// Where it is served for others.
    address: Option<SocketAddr>,
    /// Dropped to make an end.
    stop: Option<watch::Sender<()>>,
    /// Disconnected when there is an end.
    ended: mpsc::Receiver<()>,
}

/// Serves the API of a platform on a socket of this name, and for others where that is wanted, on threads of
/// its own.
///
/// # Errors
/// [`ServeError`].
pub fn serve(platform: &Arc<Platform>, path: &Path, network: Option<&Network>) -> Result<Server, ServeError> {
    let failed = |source| ServeError::Local { path: path.to_owned(), source };
    let workers = threads::processors().min(MAX_THREADS);
    let runtime =
        runtime::Builder::new_multi_thread().worker_threads(workers).thread_name("api").enable_all().build();
    let runtime = runtime.map_err(failed)?;
    let ((stop, stopped), (end, ended)) = (watch::channel(()), mpsc::channel());
    let mut tasks = JoinSet::new();
    let mut address = None;
    if let Some(network) = network {
        let listener = runtime.block_on(async {
            match network {
                Network::Tls(address, credentials) => tls::Listener::bind(*address, credentials).await,
                Network::Plain(address) => tls::Listener::bind_plain(*address).await,
            }
        })?;
        address = Some(listener.address().map_err(ServeError::Address)?);
        let routes = in_words(shared_routes().into()).with_state(Arc::clone(platform));
        let service = routes.into_make_service_with_connect_info::<ConnectionPeer>();
        let stop = wait(stopped.clone());
        tasks.spawn_on(
            async { axum::serve(listener, service).with_graceful_shutdown(stop).await },
            runtime.handle(),
        );
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    let server = Server { path: path.to_owned(), address, stop: Some(stop), ended };
    listener.set_nonblocking(true).map_err(failed)?;
    let routes = in_words(all_routes().into()).with_state(Arc::clone(platform));
    let service = routes.into_make_service_with_connect_info::<ConnectionPeer>();
    let local = async {
        let listener = tokio::net::UnixListener::from_std(listener)?;
        axum::serve(listener, service).with_graceful_shutdown(wait(stopped)).await
    };
    tasks.spawn_on(local, runtime.handle());
    let platform = Arc::clone(platform);
    let run = move || {
        let _end: mpsc::Sender<()> = end;
        // Until all tasks have let go of it: its connections have runtimes of their own, which can't end
        // within one.
        let _platform = platform;
        run(&runtime, tasks);
    };
    thread::Builder::new().name("api".into()).spawn(run).map_err(failed)?;
    Ok(server)
}

/// Refuses to make no copies, or more than a fork ever makes.
fn check_count(count: u32) -> Result<(), Refusal> {
    if (1..=MAX_CHILDREN).contains(&count) {
        return Ok(());
    }
    Err(Refusal(
        StatusCode::BAD_REQUEST,
        Reason::of(format_args!("the count must be from 1 to {MAX_CHILDREN}")),
    ))
}

fn run(runtime: &Runtime, mut tasks: JoinSet<io::Result<()>>) {
    while let Some(served) = runtime.block_on(tasks.join_next()) {
        match served {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the API is not served any more"),
            Err(error) => tracing::error!(%error, "the API is not served any more"),
        }
    }
}

async fn wait(mut stopped: watch::Receiver<()>) {
    // It never changes, and is gone when there is to be an end.
    while stopped.changed().await.is_ok() {}
}

/// What may be asked over a network too: by other platforms what they need for clones, and by operators all
/// of it.
fn shared_routes() -> OpenApiRouter<Arc<Platform>> {
    let operators =
        OpenApiRouter::default().merge(vms::routes()).merge(images::routes()).merge(platforms::routes());
    OpenApiRouter::with_openapi(description::Head::openapi())
        .merge(operators.route_layer(middleware::from_fn(check_operator)))
        .merge(orders::routes())
        .merge(description::routes())
        .merge(platforms::own_routes())
        .merge(clones::routes())
        .merge(supplies::routes())
}

/// Has what is not understood be refused as all else is: axum does that in plain text, or without a reason.
/// What comes too slowly is refused too.
fn in_words<S: Clone + Send + Sync + 'static>(routes: Router<S>) -> Router<S> {
    routes.layer(middleware::map_response(tell)).layer(middleware::map_request(not_too_slowly))
}

async fn not_too_slowly(request: Request) -> Request {
    request.map(|body| Body::new(Steady::new(body, Some(ASKED))))
}

async fn tell(response: Response) -> Response {
    let status = response.status();
    let is_told = response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
    if is_told || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let (head, body) = response.into_parts();
    let text = to_bytes(body, MAX_REASON_BYTES).await.unwrap_or_default();
    let why = match status {
        StatusCode::NOT_FOUND if text.is_empty() => format!("version {VERSION} of this API has no such path"),
        StatusCode::METHOD_NOT_ALLOWED if text.is_empty() => "nobody can do that at this path".to_owned(),
        _ => String::from_utf8_lossy(&text).into_owned(),
    };
    let mut refusal = Refusal(status, why.into()).into_response();
    refusal.headers_mut().extend(head.headers.get(ALLOW).map(|methods| (ALLOW, methods.clone())));
    refusal
}

/// Refuses other platforms.
async fn check_operator(
    ConnectInfo(caller): ConnectInfo<ConnectionPeer>,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    if is_operator(&caller) {
        return Ok(next.run(request).await);
    }
    let why = Reason::of(format_args!("{caller} is no operator, and only operators may ask that"));
    Err(Refusal(StatusCode::FORBIDDEN, why))
}

/// Whether somebody may do what an operator may: users of this host may do that too.
fn is_operator(caller: &ConnectionPeer) -> bool {
    match caller {
        ConnectionPeer::Certified(principal) => principal.role() == Role::Operator,
        ConnectionPeer::Local => true,
    }
}

/// What users of this host may ask.
fn all_routes() -> OpenApiRouter<Arc<Platform>> {
    shared_routes().merge(images::local_routes())
}

impl Server {
    /// Where others reach it.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }
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

/// Does what takes a while. Another thread answers others meanwhile; to have it done by another one would
/// cost who waits for it two wake-ups.
fn work<T, E: Into<Refusal>>(work: impl FnOnce() -> Result<T, E>) -> Result<T, Refusal> {
    tokio::task::block_in_place(work).map_err(Into::into)
}

/// Why a request is not served.
#[derive(Debug)]
struct Refusal(StatusCode, Reason);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::NoImage(_) | Error::NoVm(_) => StatusCode::NOT_FOUND,
            Error::Lingers(_) => StatusCode::SERVICE_UNAVAILABLE,
            Error::NotForked { code, .. } => not_forked(code),
            Error::NoAnswer(_) => StatusCode::GATEWAY_TIMEOUT,
            Error::Ambiguous(_)
            | Error::AmbiguousVm(_)
            | Error::Full { .. }
            | Error::Stopping
            | Error::Kept(_) => StatusCode::CONFLICT,
            Error::NotSealed { .. } => StatusCode::CONFLICT,
            Error::ImageFile { source: capsule::Error::NoRoom(_), .. } => StatusCode::INSUFFICIENT_STORAGE,
            Error::ImageFile { .. } | Error::Unfit { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Error::Cluster(crate::others::Error::Order { .. }) => StatusCode::FORBIDDEN,
            Error::Alone | Error::Cluster(_) => StatusCode::NOT_FOUND,
            Error::PassedOn { source: client::Error::Refused { status, .. }, .. } => status,
            Error::Send { .. } | Error::PassedOn { .. } => StatusCode::BAD_GATEWAY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, Reason::of_error(&error))
    }
}

/// The status of a fork that was not made.
fn not_forked(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::Rate => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::Timeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::Busy
        | ErrorCode::NotLaunched
        | ErrorCode::Incomplete
        | ErrorCode::Place
        | ErrorCode::Children
        | ErrorCode::Generation
        | ErrorCode::Memory => StatusCode::CONFLICT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(Failure { error: self.1 })).into_response()
    }
}

#[cfg(test)]
#[path = "server_test.rs"]
mod tests;
