//! What is asked of images.

use std::{path, sync::Arc};

use api::{Copied, Image, Place, Spawn, Spawned, Transfer};
use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use base::text::Reason;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Refusal, check_count, work};
use crate::Platform;

/// What anybody may ask who reaches the API.
pub(super) fn routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default()
        .routes(routes!(images))
        .routes(routes!(image, remove_image))
        .routes(routes!(spawn))
        .routes(routes!(transfers))
}

/// What only users of this host may ask: it names files of this host.
pub(super) fn local_routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default().routes(routes!(load_image)).routes(routes!(save_image))
}

/// Lists the images.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, description = "The oldest one first", body = Vec<Image>)))]
async fn images(State(platform): State<Arc<Platform>>) -> Result<Json<Vec<Image>>, Refusal> {
    Ok(Json(work(|| platform.images())?))
}

/// Shows one image, by its ID, or how that begins.
#[utoipa::path(
    get, path = "/v1/images/{id}", params(("id" = String, Path)),
    responses((status = 200, description = "The image", body = Image))
)]
async fn image(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
) -> Result<Json<Image>, Refusal> {
    Ok(Json(work(|| platform.image(&id))?))
}

/// Lets go of an image. VMs that run from it go on.
#[utoipa::path(
    delete, path = "/v1/images/{id}", params(("id" = String, Path)),
    responses((status = 204, description = "It is not kept any more"))
)]
async fn remove_image(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Refusal> {
    work(|| platform.remove_image(&id))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Launches copies of an image.
#[utoipa::path(
    post, path = "/v1/images/{id}/spawn", params(("id" = String, Path)), request_body = Spawn,
    responses((status = 200, description = "All of them run", body = Spawned))
)]
async fn spawn(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Json(Spawn { count }): Json<Spawn>,
) -> Result<Json<Spawned>, Refusal> {
    check_count(count)?;
    let copies = work(|| platform.spawn(&id, count))?;
    Ok(Json(Spawned {
        vms: copies.into_iter().map(|vm| Copied { id: vm.id, name: vm.name.into() }).collect(),
    }))
}

/// Lists the clones that are being sent.
#[utoipa::path(get, path = "/v1/transfers", responses((status = 200, description = "How far each is", body = Vec<Transfer>)))]
async fn transfers(State(platform): State<Arc<Platform>>) -> Json<Vec<Transfer>> {
    Json(platform.transfers())
}

/// Writes an image to a file of the platform's host. Only users of that host may do that, over its socket.
#[utoipa::path(
    post, path = "/v1/images/{id}/save", params(("id" = String, Path)), request_body = Place,
    responses((status = 204, description = "It is there"))
)]
async fn save_image(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Json(Place { path, compress }): Json<Place>,
) -> Result<StatusCode, Refusal> {
    check_absolute(&path)?;
    work(|| platform.save_image(&id, &path, compress))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Keeps the image that a file of the platform's host holds. Only users of that host may do that, over its
/// socket.
#[utoipa::path(
    post, path = "/v1/images", request_body = Place,
    responses((status = 200, description = "The image", body = Image))
)]
async fn load_image(
    State(platform): State<Arc<Platform>>,
    Json(Place { path, .. }): Json<Place>,
) -> Result<Json<Image>, Refusal> {
    check_absolute(&path)?;
    Ok(Json(work(|| platform.load_image(&path))?))
}

fn check_absolute(path: &path::Path) -> Result<(), Refusal> {
    let refusal = || {
        Refusal(
            StatusCode::BAD_REQUEST,
            Reason::of(format_args!("{} does not start at the root", path.display())),
        )
    };
    if path.is_absolute() { Ok(()) } else { Err(refusal()) }
}
