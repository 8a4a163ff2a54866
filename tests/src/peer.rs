//! A platform that keeps no copies, answers as a test has it, and may keep whoever asks waiting.

use std::{
    future,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::{self, Body, Bytes},
    extract::{DefaultBodyLimit, Request, State},
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use http_body_util::channel::Channel;
use serde_json::{Value, json};
use tokio::runtime::{self, Runtime};

/// Time between two bytes of an answer that drips.
const DRIP: Duration = Duration::from_millis(100);

/// Answer to whoever sends it a clone.
#[derive(Debug, Clone)]
pub enum Answer {
    /// It refuses the order, for this reason.
    Refuses(String),
    /// It takes all, and then says that it has undone it, for this reason.
    Undoes(String),
    /// It says that one copy runs, and that this is its name.
    Runs(String),
    /// It says that the copies run, and names none of them.
    RunsNone,
    /// It says for ever that it launches the copies.
    Prepares,
    /// It gives an answer that never ends, a byte now and then.
    Drips,
    /// It does not answer.
    Silent,
    /// It says that the copies wait, and knows nothing of them when they are to run.
    Forgets,
}

/// The platform, without certificates. Dropping it ends it.
#[derive(Debug)]
pub struct Peer {
    shared: Arc<Shared>,
    _runtime: Runtime,
}

#[derive(Debug)]
struct Shared {
    /// Its description of itself.
    member: Value,
    now: Mutex<Now>,
}

/// What changes from one question to the next.
#[derive(Debug)]
struct Now {
    answer: Answer,
    /// The order for the latest clone.
    order: Value,
    /// Methods and paths of questions.
    asked: Vec<String>,
}

impl Peer {
    /// Starts one at an address, which describes itself as the platform `like` does, but for its name.
    ///
    /// # Panics
    /// Where the address is taken, or there are no threads.
    pub fn start(name: &str, address: SocketAddr, like: &Value) -> Self {
        let mut member = like.clone();
        member["name"] = name.into();
        member["address"] = address.to_string().into();
        let now = Now { answer: Answer::Refuses("no".into()), order: Value::Null, asked: Vec::new() };
        let shared = Arc::new(Shared { member, now: Mutex::new(now) });
        let routes = Router::new()
            .route("/v1/platform", get(async |State(shared): State<Arc<Shared>>| Json(shared.member.clone())))
            .route("/v1/clones/{id}", put(order).get(stage).delete(call_off))
            .route("/v1/clones/{id}/capsule", put(describe))
            .route("/v1/clones/{id}/prepare", post(prepare))
            .route("/v1/clones/{id}/commit", post(commit))
            .layer(DefaultBodyLimit::disable())
            .layer(middleware::from_fn_with_state(Arc::clone(&shared), note))
            .with_state(Arc::clone(&shared));
        let runtime =
            runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).expect("a free address");
        runtime.spawn(async { axum::serve(listener, routes).await });
        Self { shared, _runtime: runtime }
    }

    /// Says how it answers from now on, and forgets what it was asked.
    pub fn answer(&self, answer: Answer) {
        let mut now = self.shared.now();
        (now.answer, now.asked) = (answer, Vec::new());
    }

    /// Number of questions by this method for something whose path ends so.
    pub fn asked(&self, method: &str, end: &str) -> usize {
        let is_it = |asked: &&String| asked.starts_with(method) && asked.ends_with(end);
        self.shared.now().asked.iter().filter(is_it).count()
    }

    /// Methods and paths of all questions about clones.
    pub fn clones(&self) -> Vec<String> {
        self.shared.now().asked.iter().filter(|asked| asked.contains("/v1/clones/")).cloned().collect()
    }
}

impl Shared {
    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self) -> Answer {
        self.now().answer.clone()
    }
}

async fn note(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    shared.now().asked.push(format!("{} {}", request.method(), request.uri().path()));
    next.run(request).await
}

async fn order(State(shared): State<Arc<Shared>>, Json(order): Json<Value>) -> (StatusCode, Json<Value>) {
    shared.now().order = order;
    match shared.answer() {
        Answer::Refuses(error) => (StatusCode::CONFLICT, Json(json!({ "error": error }))),
        _ => (StatusCode::OK, Json(json!({ "stage": "reserved" }))),
    }
}

/// Asks for nothing of any memory.
async fn describe(body: Body) -> Json<Value> {
    drop(body::to_bytes(body, usize::MAX).await);
    Json(json!({ "chunks": [] }))
}

async fn prepare(State(shared): State<Arc<Shared>>) -> Response {
    match shared.answer() {
        Answer::Silent => future::pending().await,
        Answer::Drips => drip(),
        _ => stage(State(shared)).await.into_response(),
    }
}

async fn stage(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(match shared.answer() {
        Answer::Undoes(why) => json!({ "stage": "aborted", "why": why }),
        Answer::Prepares | Answer::Drips | Answer::Silent => json!({ "stage": "preparing" }),
        _ => json!({ "stage": "prepared" }),
    })
}

async fn call_off() -> Json<Value> {
    Json(json!({ "stage": "aborted", "why": "asked for" }))
}

async fn commit(State(shared): State<Arc<Shared>>) -> (StatusCode, Json<Value>) {
    let id = shared.now().order["slots"][0]["id"].clone();
    match shared.answer() {
        Answer::Runs(name) => {
            (StatusCode::OK, Json(json!({ "stage": "committed", "vms": [{ "id": id, "name": name }] })))
        }
        Answer::RunsNone => (StatusCode::OK, Json(json!({ "stage": "committed", "vms": [] }))),
        Answer::Forgets => (StatusCode::NOT_FOUND, Json(json!({ "error": "there is no such clone" }))),
        _ => (StatusCode::OK, Json(json!({ "stage": "aborted", "why": "no" }))),
    }
}

/// An answer whose first byte comes at once, and whose last one never does.
fn drip() -> Response {
    let (mut sender, body) = Channel::<Bytes>::new(1);
    tokio::spawn(async move {
        while sender.send_data(Bytes::from_static(b" ")).await.is_ok() {
            tokio::time::sleep(DRIP).await;
        }
    });
    ([("content-type", "application/json")], Body::new(body)).into_response()
}
