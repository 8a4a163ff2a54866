//! What sources ask of their targets.

use std::{io, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{ConnectInfo, Path, State},
    http::StatusCode,
    routing::{post, put},
};
use http_body_util::BodyExt;
use uuid::Uuid;

use super::{Refusal, work};
use crate::{
    capsule::header::{HEADER_BYTES, MAX_DESCRIPTION_BYTES},
    cluster::{
        clone::{Error, Missing, Order, Records, Stage},
        peer::{Peer, Role},
    },
    error::chain,
    platform::Platform,
};

pub(super) fn routes() -> Router<Arc<Platform>> {
    Router::new()
        .route("/v1/clones/{id}", put(order).get(stage).delete(abort))
        .route("/v1/clones/{id}/capsule", put(describe))
        .route("/v1/clones/{id}/chunks", post(chunks))
        .route("/v1/clones/{id}/prepare", post(prepare))
        .route("/v1/clones/{id}/commit", post(commit))
}

async fn order(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(id): Path<Uuid>,
    Json(order): Json<Order>,
) -> Result<Json<Stage>, Refusal> {
    let is_source = match &peer {
        Peer::Certified(holder) => holder.role() == Role::Platform && holder.name() == order.source,
        Peer::Local => true,
    };
    if !is_source {
        let why = format!("{peer} can't send clones in the name of the platform {}", order.source);
        return Err(Refusal(StatusCode::FORBIDDEN, why));
    }
    Ok(Json(platform.order_clone(id, order)?))
}

async fn stage(State(platform): State<Arc<Platform>>, Path(id): Path<Uuid>) -> Result<Json<Stage>, Refusal> {
    Ok(Json(platform.clone_stage(id)?))
}

async fn describe(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<Uuid>,
    body: Body,
) -> Result<Json<Missing>, Refusal> {
    let most = usize::try_from(MAX_DESCRIPTION_BYTES).unwrap_or(usize::MAX).saturating_add(HEADER_BYTES);
    let capsule = to_bytes(body, most).await.map_err(|error| Refusal(StatusCode::BAD_REQUEST, chain(&error)))?;
    Ok(Json(work(move || platform.describe_clone(id, &capsule)).await?))
}

/// Takes chunks in as they come: this runs beside others that do the same for other connections.
async fn chunks(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<Uuid>,
    mut body: Body,
) -> Result<StatusCode, Refusal> {
    let intake = platform.clone_memory(id)?;
    let mut records = Records::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::Chunks(io::Error::other(error)))?;
        let Some(piece) = frame.data_ref() else { continue };
        records.push(piece, |record| intake.take(record)).map_err(Error::Chunks)?;
    }
    records.finish().map_err(Error::Chunks)?;
    Ok(StatusCode::NO_CONTENT)
}

async fn prepare(State(platform): State<Arc<Platform>>, Path(id): Path<Uuid>) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(move || platform.prepare_clone(id)).await?))
}

async fn commit(State(platform): State<Arc<Platform>>, Path(id): Path<Uuid>) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(move || platform.commit_clone(id)).await?))
}

async fn abort(State(platform): State<Arc<Platform>>, Path(id): Path<Uuid>) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(move || platform.abort_clone(id)).await?))
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::Order(_) | Error::Capsule(_) | Error::Chunks(_) | Error::Filling(_) => StatusCode::BAD_REQUEST,
            Error::Other(_) | Error::Stage { .. } => StatusCode::CONFLICT,
            Error::TooMany => StatusCode::TOO_MANY_REQUESTS,
            Error::Unknown(_) => StatusCode::NOT_FOUND,
            Error::Incompatible(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Error::Platform(error) => return error.into(),
        };
        Self(status, chain(&error))
    }
}
