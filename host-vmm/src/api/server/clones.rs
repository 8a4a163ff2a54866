//! What sources ask of their targets.

use std::{io, sync::Arc};

use axum::{
    Json, RequestPartsExt,
    body::{Body, to_bytes},
    extract::{
        ConnectInfo, FromRequestParts, Path, State,
        rejection::{ExtensionRejection, PathRejection},
    },
    http::{StatusCode, request::Parts},
};
use http_body_util::BodyExt;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{Refusal, work};
use crate::{
    capsule::header::{HEADER_BYTES, MAX_DESCRIPTION_BYTES},
    cluster::{
        clone::{Error, Missing, Order, Stage, record::Records},
        peer::{Peer, Role},
    },
    error::chain,
    platform::Platform,
};

pub(super) fn routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default()
        .routes(routes!(order_clone, clone_stage, abort_clone))
        .routes(routes!(describe_clone))
        .routes(routes!(take_chunks))
        .routes(routes!(prepare_clone))
        .routes(routes!(commit_clone))
}

/// A clone that was ordered, for the platform that has ordered it.
struct Ordered {
    platform: Arc<Platform>,
    id: Uuid,
}

impl FromRequestParts<Arc<Platform>> for Ordered {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, platform: &Arc<Platform>) -> Result<Self, Refusal> {
        let Path(id) = parts.extract().await.map_err(|error: PathRejection| refuse(&error))?;
        let ConnectInfo(peer) = parts.extract().await.map_err(|error: ExtensionRejection| refuse(&error))?;
        check_source(&peer, &platform.clone_source(id)?)?;
        Ok(Self { platform: Arc::clone(platform), id })
    }
}

fn refuse(error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, chain(error))
}

/// Checks whether somebody may act for the source of a clone.
fn check_source(peer: &Peer, source: &str) -> Result<(), Refusal> {
    let is_source = match peer {
        Peer::Certified(holder) => holder.role() == Role::Platform && holder.name() == source,
        Peer::Local => true,
    };
    if is_source {
        return Ok(());
    }
    Err(Refusal(StatusCode::FORBIDDEN, format!("{peer} can't send clones in the name of the platform {source}")))
}

/// Has room kept for copies that are to come. Over a network, a platform does that in its own name alone.
#[utoipa::path(put, path = "/v1/clones/{id}", params(("id" = Uuid, Path)), request_body = Order, responses((status = 200, description = "How far it is", body = Stage)))]
async fn order_clone(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    Path(id): Path<Uuid>,
    Json(order): Json<Order>,
) -> Result<Json<Stage>, Refusal> {
    check_source(&peer, &order.source)?;
    Ok(Json(platform.order_clone(id, order)?))
}

/// Tells how far a clone is.
#[utoipa::path(get, path = "/v1/clones/{id}", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn clone_stage(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(platform.clone_stage(id)?))
}

/// Checks whether a clone can run here.
#[utoipa::path(
    put, path = "/v1/clones/{id}/capsule", params(("id" = Uuid, Path)),
    request_body(content_type = "application/octet-stream", description = "Header and description of its capsule"),
    responses((status = 200, description = "The chunks of its memory that are not here yet", body = Missing))
)]
async fn describe_clone(Ordered { platform, id }: Ordered, body: Body) -> Result<Json<Missing>, Refusal> {
    let most = usize::try_from(MAX_DESCRIPTION_BYTES).unwrap_or(usize::MAX).saturating_add(HEADER_BYTES);
    let capsule = to_bytes(body, most).await.map_err(|error| Refusal(StatusCode::BAD_REQUEST, chain(&error)))?;
    Ok(Json(work(move || platform.describe_clone(id, &capsule)).await?))
}

/// Takes chunks of a clone's memory in as they come, on as many connections as the source likes.
#[utoipa::path(
    post, path = "/v1/clones/{id}/chunks", params(("id" = Uuid, Path)),
    request_body(
        content_type = "application/octet-stream",
        description = "For each chunk a record: its number and its length, 32 bits each, little-endian, and then its data"
    ),
    responses((status = 204, description = "All of them are here"))
)]
async fn take_chunks(Ordered { platform, id }: Ordered, mut body: Body) -> Result<StatusCode, Refusal> {
    let intake = platform.clone_memory(id)?;
    let mut records = Records::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Error::Chunks(io::Error::other(error)))?;
        let Some(piece) = frame.data_ref() else { continue };
        records.push(piece, |chunk, data| intake.take(chunk, data)).map_err(Error::Chunks)?;
    }
    records.finish().map_err(Error::Chunks)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Launches the copies, which wait.
#[utoipa::path(post, path = "/v1/clones/{id}/prepare", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn prepare_clone(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(move || platform.prepare_clone(id)).await?))
}

/// Lets the copies run.
#[utoipa::path(post, path = "/v1/clones/{id}/commit", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn commit_clone(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(move || platform.commit_clone(id)).await?))
}

/// Undoes a clone that does not run yet.
#[utoipa::path(delete, path = "/v1/clones/{id}", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn abort_clone(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(move || platform.abort_clone(id)).await?))
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::Order(_) | Error::Capsule(_) | Error::Chunks(_) | Error::Filling(_) => StatusCode::BAD_REQUEST,
            Error::Other(_) | Error::Stage { .. } | Error::CutOff => StatusCode::CONFLICT,
            Error::TooMany => StatusCode::TOO_MANY_REQUESTS,
            Error::Unknown(_) => StatusCode::NOT_FOUND,
            Error::Incompatible(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Error::Platform(error) => return error.into(),
        };
        Self(status, chain(&error))
    }
}
