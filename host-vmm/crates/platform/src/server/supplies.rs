//! What targets ask of their sources.

use std::{io, sync::Arc};

use axum::{
    Json,
    body::{Body, Bytes},
    extract::{ConnectInfo, Path, State},
    http::StatusCode,
};
use base::text::Reason;
use cluster::principal::{ConnectionPeer, Role};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{Refusal, work};
use crate::{
    Platform,
    clone::{Need, page_server::PageServer},
};

pub(super) fn routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default()
        .routes(routes!(end_supply))
        .routes(routes!(supply_chunks))
        .routes(routes!(supply_manifest))
}

/// The memory of a clone, for the platform that it is for.
fn find(platform: &Platform, id: Uuid, caller: &ConnectionPeer) -> Result<Arc<PageServer>, Refusal> {
    let page_server = platform.page_servers().find(id);
    let page_server = page_server.ok_or_else(|| {
        Refusal(StatusCode::NOT_FOUND, Reason::of(format_args!("there is no memory of the clone {id}")))
    })?;
    let is_target = match caller {
        ConnectionPeer::Certified(principal) => {
            principal.role() == Role::Platform && principal.name() == page_server.target()
        }
        ConnectionPeer::Local => true,
    };
    if is_target {
        return Ok(page_server);
    }
    let why = Reason::of(format_args!("{caller} is not where the clone {id} runs"));
    Err(Refusal(StatusCode::FORBIDDEN, why))
}

/// Gives some chunks of the memory of a lazy clone that runs elsewhere.
#[utoipa::path(
    post, path = "/v1/supplies/{id}/chunks", params(("id" = Uuid, Path)), request_body = Need,
    responses((
        status = 200, content_type = "application/octet-stream",
        description = "For each chunk a record: its number and its length, 32 bits each, little-endian, and then its data"
    ))
)]
async fn supply_chunks(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(caller): ConnectInfo<ConnectionPeer>,
    Path(id): Path<Uuid>,
    Json(need): Json<Need>,
) -> Result<Body, Refusal> {
    Ok(Body::new(find(&platform, id, &caller)?.chunks(need)?))
}

/// Tells what all of that memory is.
#[utoipa::path(
    get, path = "/v1/supplies/{id}/manifest", params(("id" = Uuid, Path)),
    responses((
        status = 200, content_type = "application/octet-stream",
        description = "Its layers with a digest of each chunk, in the encoding of capsules"
    ))
)]
async fn supply_manifest(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(caller): ConnectInfo<ConnectionPeer>,
    Path(id): Path<Uuid>,
) -> Result<Bytes, Refusal> {
    let page_server = find(&platform, id, &caller)?;
    work(|| platform.manifest(&page_server))
}

/// Lets go of that memory, since all of it has come.
#[utoipa::path(
    delete, path = "/v1/supplies/{id}", params(("id" = Uuid, Path)),
    responses((status = 204, description = "It is not kept for the clone any more"))
)]
async fn end_supply(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(caller): ConnectInfo<ConnectionPeer>,
    Path(id): Path<Uuid>,
) -> Result<StatusCode, Refusal> {
    find(&platform, id, &caller)?;
    work(|| {
        platform.page_servers().remove(id);
        Ok::<_, Refusal>(StatusCode::NO_CONTENT)
    })
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self(StatusCode::BAD_REQUEST, Reason::of_error(&error))
    }
}

impl From<capsule::Error> for Refusal {
    fn from(error: capsule::Error) -> Self {
        Self(StatusCode::INTERNAL_SERVER_ERROR, Reason::of_error(&error))
    }
}
