//! What targets ask of their sources.

use std::{io, sync::Arc};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{ConnectInfo, Path, State},
    http::StatusCode,
    routing::{delete, get, post},
};
use uuid::Uuid;

use super::{Refusal, work};
use crate::{
    capsule,
    cluster::{
        clone::supply::Supply,
        peer::{Peer, Role},
    },
    error::chain,
    platform::Platform,
};

pub(super) fn routes() -> Router<Arc<Platform>> {
    Router::new()
        .route("/v1/supplies/{id}", delete(done))
        .route("/v1/supplies/{id}/chunks", post(chunks))
        .route("/v1/supplies/{id}/manifest", get(manifest))
}

/// The memory of a clone, for the platform that it is for.
fn find(platform: &Platform, id: Uuid, peer: &Peer) -> Result<Arc<Supply>, Refusal> {
    let supply = platform.supplies().find(id);
    let supply =
        supply.ok_or_else(|| Refusal(StatusCode::NOT_FOUND, format!("there is no memory of the clone {id}")))?;
    let is_target = match peer {
        Peer::Certified(holder) => holder.role() == Role::Platform && holder.name() == supply.target(),
        Peer::Local => true,
    };
    if is_target {
        return Ok(supply);
    }
    Err(Refusal(StatusCode::FORBIDDEN, format!("{peer} is not where the clone {id} runs")))
}

async fn chunks(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(id): Path<Uuid>,
    Json(positions): Json<Vec<u32>>,
) -> Result<Bytes, Refusal> {
    let supply = find(&platform, id, &peer)?;
    work(move || supply.chunks(&positions)).await
}

async fn manifest(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(id): Path<Uuid>,
) -> Result<Bytes, Refusal> {
    let supply = find(&platform, id, &peer)?;
    work(move || platform.manifest(&supply)).await
}

async fn done(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Refusal> {
    find(&platform, id, &peer)?;
    platform.supplies().remove(id);
    Ok(StatusCode::NO_CONTENT)
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self(StatusCode::BAD_REQUEST, chain(&error))
    }
}

impl From<capsule::Error> for Refusal {
    fn from(error: capsule::Error) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, chain(&error))
    }
}
