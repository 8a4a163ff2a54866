//! What is asked of images.

use std::{path, sync::Arc};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::StatusCode,
    routing::{get, post},
};
use vmfork_abi::MAX_CHILDREN;

use super::{Refusal, work};
use crate::{
    api::{CloneWish, Copied, Image, Place, Spawn, Spawned, Transfer},
    platform::Platform,
};

/// What anybody may ask who reaches the API.
pub(super) fn routes() -> Router<Arc<Platform>> {
    Router::new()
        .route("/v1/images", get(images))
        .route("/v1/images/{id}", get(image).delete(remove_image))
        .route("/v1/images/{id}/spawn", post(spawn))
        .route("/v1/images/{id}/clone", post(clone_image))
        .route("/v1/transfers", get(transfers))
}

/// What only users of this host may ask: it names files of this host.
pub(super) fn local_routes() -> Router<Arc<Platform>> {
    Router::new().route("/v1/images", post(load_image)).route("/v1/images/{id}/save", post(save_image))
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
    check_count(count)?;
    let copies = work(move || platform.spawn(&id, count)).await?;
    Ok(Json(Spawned { vms: copies.into_iter().map(|vm| Copied { id: vm.id, name: vm.name }).collect() }))
}

async fn clone_image(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Json(CloneWish { to, count, lazy }): Json<CloneWish>,
) -> Result<Json<Spawned>, Refusal> {
    check_count(count)?;
    Ok(Json(Spawned { vms: work(move || platform.clone_image(&id, &to, count, lazy)).await? }))
}

async fn transfers(State(platform): State<Arc<Platform>>) -> Json<Vec<Transfer>> {
    Json(platform.transfers())
}

/// Refuses to make no copies, or more than a fork ever makes.
fn check_count(count: u32) -> Result<(), Refusal> {
    if (1..=MAX_CHILDREN).contains(&count) {
        return Ok(());
    }
    Err(Refusal(StatusCode::BAD_REQUEST, format!("the count must be from 1 to {MAX_CHILDREN}")))
}

async fn save_image(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Json(Place { path, compress }): Json<Place>,
) -> Result<StatusCode, Refusal> {
    check_absolute(&path)?;
    work(move || platform.save_image(&id, &path, compress)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn load_image(
    State(platform): State<Arc<Platform>>,
    Json(Place { path, .. }): Json<Place>,
) -> Result<Json<Image>, Refusal> {
    check_absolute(&path)?;
    Ok(Json(work(move || platform.load_image(&path)).await?))
}

fn check_absolute(path: &path::Path) -> Result<(), Refusal> {
    let refusal = || Refusal(StatusCode::BAD_REQUEST, format!("{} does not start at the root", path.display()));
    if path.is_absolute() { Ok(()) } else { Err(refusal()) }
}
