//! What sources ask of their targets.

use std::{io, sync::Arc};

use axum::{
    Json, RequestPartsExt,
    body::{Body, Bytes},
    extract::{
        ConnectInfo, FromRequestParts, Path, State,
        rejection::{ExtensionRejection, PathRejection},
    },
    http::{StatusCode, request::Parts},
};
use base::text::Reason;
use capsule::{
    self, Header, chunk_stream::ChunkDecoder, file::DESCRIPTION_COPIES, header::MAX_DESCRIPTION_BYTES,
};
use cluster::principal::{ConnectionPeer, Role};
use http_body_util::BodyExt;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{Refusal, work};
use crate::{
    Platform,
    clone::{Error, Missing, Order, Stage, postcopy},
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
        let ConnectInfo(caller) =
            parts.extract().await.map_err(|error: ExtensionRejection| refuse(&error))?;
        check_source(&caller, &platform.clone_source(id)?)?;
        Ok(Self { platform: Arc::clone(platform), id })
    }
}

fn refuse(error: &(dyn std::error::Error + 'static)) -> Refusal {
    Refusal(StatusCode::BAD_REQUEST, Reason::of_error(error))
}

/// Checks whether somebody may act for the source of a clone.
fn check_source(caller: &ConnectionPeer, source: &str) -> Result<(), Refusal> {
    let is_source = match caller {
        ConnectionPeer::Certified(principal) => {
            principal.role() == Role::Platform && principal.name() == source
        }
        ConnectionPeer::Local => true,
    };
    if is_source {
        return Ok(());
    }
    let why = Reason::of(format_args!("{caller} can't send clones in the name of the platform {source}"));
    Err(Refusal(StatusCode::FORBIDDEN, why))
}

/// Has room kept for copies that are to come. Over a network, a platform does that in its own name alone.
#[utoipa::path(put, path = "/v1/clones/{id}", params(("id" = Uuid, Path)), request_body = Order, responses((status = 200, description = "How far it is", body = Stage)))]
async fn order_clone(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(caller): ConnectInfo<ConnectionPeer>,
    Path(id): Path<Uuid>,
    Json(order): Json<Order>,
) -> Result<Json<Stage>, Refusal> {
    check_source(&caller, &order.source)?;
    Ok(Json(work(|| platform.order_clone(id, order))?))
}

/// Tells how far a clone is.
#[utoipa::path(get, path = "/v1/clones/{id}", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn clone_stage(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(|| platform.clone_stage(id))?))
}

/// Checks whether a clone can run here, and takes in what comes of its memory behind that: what it needs
/// before all else.
#[utoipa::path(
    put, path = "/v1/clones/{id}/capsule", params(("id" = Uuid, Path)),
    request_body(
        content_type = "application/octet-stream",
        description = "Header and description of its capsule, and then, of a lazy clone, chunks of its memory as records"
    ),
    responses((status = 200, description = "The chunks of its memory that are to come before it can run", body = Missing))
)]
async fn describe_clone(Ordered { platform, id }: Ordered, mut body: Body) -> Result<Json<Missing>, Refusal> {
    let described = take_capsule(&platform, id, &mut body).await;
    if described.is_err() {
        // Who still sends may not hear of it else.
        let mut most = MAX_DESCRIPTION_BYTES;
        while let Ok(Some(piece)) = next_piece(&mut body).await
            && most > 0
        {
            most = most.saturating_sub(piece.len() as u64);
        }
    }
    described.map(Json)
}

async fn take_capsule(platform: &Platform, id: Uuid, body: &mut Body) -> Result<Missing, Refusal> {
    let mut capsule = Vec::new();
    let mut begun = None;
    let (behind, grant) = loop {
        let piece = next_piece(body).await?.ok_or(Error::Capsule(capsule::Error::NoCapsule))?;
        capsule.extend_from_slice(&piece);
        let Some(length) = Header::length_of_head(&capsule).map_err(Error::Capsule)? else { continue };
        let bytes = DESCRIPTION_COPIES.saturating_mul(length as u64);
        let reserve =
            || platform.image_memory().reserve(bytes).map_err(capsule::Error::from).map_err(Error::Capsule);
        let grant = begun.take().map_or_else(reserve, Ok)?;
        if capsule.len() >= length {
            break (capsule.split_off(length), grant);
        }
        begun = Some(grant);
    };
    let missing = work(|| platform.describe_clone(id, &capsule, grant))?;
    drop(capsule);
    take_records(platform, id, behind.into(), body).await?;
    Ok(missing)
}

/// The next piece of a body, unless that has come to its end.
async fn next_piece(body: &mut Body) -> Result<Option<Bytes>, Error> {
    loop {
        let Some(frame) = body.frame().await else { return Ok(None) };
        let frame = frame.map_err(|error| Error::Chunks(io::Error::other(error)))?;
        if let Ok(data) = frame.into_data() {
            return Ok(Some(data));
        }
    }
}

/// Takes in records: those of a first piece, and of what comes behind it.
async fn take_records(platform: &Platform, id: Uuid, first: Bytes, body: &mut Body) -> Result<(), Error> {
    let intake = platform.clone_memory(id)?;
    let (mut decoder, mut piece) = (ChunkDecoder::default(), Some(first));
    while let Some(data) = piece {
        decoder.push(&data, |chunk, data| intake.take(chunk, data)).map_err(Error::Chunks)?;
        piece = next_piece(body).await?;
    }
    decoder.finish().map_err(Error::Chunks)
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
    take_records(&platform, id, Bytes::new(), &mut body).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Launches the copies, which wait.
#[utoipa::path(post, path = "/v1/clones/{id}/prepare", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn prepare_clone(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(|| platform.prepare_clone(id))?))
}

/// Lets the copies run.
#[utoipa::path(post, path = "/v1/clones/{id}/commit", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn commit_clone(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(|| platform.commit_clone(id))?))
}

/// Undoes a clone that does not run yet.
#[utoipa::path(delete, path = "/v1/clones/{id}", params(("id" = Uuid, Path)), responses((status = 200, description = "How far it is", body = Stage)))]
async fn abort_clone(Ordered { platform, id }: Ordered) -> Result<Json<Stage>, Refusal> {
    Ok(Json(work(|| platform.abort_clone(id))?))
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error {
            Error::Capsule(capsule::Error::NoRoom(_))
            | Error::Postcopy(postcopy::Error::Capsule(capsule::Error::NoRoom(_))) => {
                StatusCode::INSUFFICIENT_STORAGE
            }
            Error::Order(_) | Error::Capsule(_) | Error::Chunks(_) | Error::Postcopy(_) => {
                StatusCode::BAD_REQUEST
            }
            Error::Other(_) | Error::Stage { .. } | Error::CutOff => StatusCode::CONFLICT,
            Error::TooMany | Error::TooManyRemembered => StatusCode::TOO_MANY_REQUESTS,
            Error::Unknown(_) => StatusCode::NOT_FOUND,
            Error::Incompatible(_) => StatusCode::UNPROCESSABLE_ENTITY,
            Error::Platform(error) => return error.into(),
        };
        Self(status, Reason::of_error(&error))
    }
}
