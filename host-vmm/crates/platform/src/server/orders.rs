//! Clones that somebody orders: of what this platform has, or, passed on, of what another one has.

use std::sync::Arc;

use api::{CloneWish, Forked, Spawned, client};
use axum::{
    Json,
    extract::{ConnectInfo, Path, State},
    http::StatusCode,
};
use base::text::{Name, Reason};
use cluster::principal::ConnectionPeer;
use serde::de::DeserializeOwned;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Refusal, check_count, is_operator, vms::fork, work};
use crate::{Error, Platform, Target};

/// What operators may ask, and other platforms where this one's configuration says so.
pub(super) fn routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default().routes(routes!(clone_vm)).routes(routes!(clone_image))
}

/// Checks whether somebody may order a clone. Platforms order none from third ones by this one's certificate.
fn check(platform: &Platform, caller: &ConnectionPeer, wish: &CloneWish) -> Result<(), Refusal> {
    check_count(wish.count)?;
    match caller {
        ConnectionPeer::Certified(principal) if !is_operator(caller) => {
            if let Some(from) = &wish.from {
                let why = Reason::of(format_args!(
                    "{caller} is no operator, and must ask the platform {from} itself"
                ));
                return Err(Refusal(StatusCode::FORBIDDEN, why));
            }
            platform.cluster().ok_or(Error::Alone)?.check_order(principal).map_err(Error::Cluster)?;
            tracing::info!(%caller, to = &*Name::from(wish.to.as_str()), count = wish.count, "a clone is ordered by another platform");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Has another platform do what is asked at this path, and gives its answer.
async fn pass_on<T: DeserializeOwned + Send + 'static>(
    platform: Arc<Platform>,
    from: String,
    path: anyhow::Result<String>,
    wish: CloneWish,
) -> Result<Json<T>, Refusal> {
    let path = path.map_err(|error| Refusal(StatusCode::BAD_REQUEST, Reason::of(error)))?;
    Ok(Json(work(|| platform.pass_on(&from, &path, &wish))?))
}

/// Forks one VM that runs, though its guest has not asked for it, into copies on another platform: by its
/// name, its ID, or how that begins.
///
/// It has the limits of a fork that its guest asks for. Over a network, only operators may do that, and
/// platforms that may order clones.
#[utoipa::path(
    post, path = "/v1/vms/{id}/clone", params(("id" = String, Path)), request_body = CloneWish,
    responses((status = 200, description = "All of the copies run there", body = Forked))
)]
async fn clone_vm(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(caller): ConnectInfo<ConnectionPeer>,
    Path(id): Path<String>,
    Json(wish): Json<CloneWish>,
) -> Result<Json<Forked>, Refusal> {
    check(&platform, &caller, &wish)?;
    match wish {
        CloneWish { from: None, to, count, lazy } => {
            fork(platform, id, count, Target::Platform { name: to, lazy }).await
        }
        CloneWish { from: Some(from), to, count, lazy } => {
            pass_on(platform, from, client::vm_clone_path(&id), CloneWish { from: None, to, count, lazy })
                .await
        }
    }
}

/// Launches copies of an image on another platform.
///
/// Over a network, only operators may do that, and platforms that may order clones.
#[utoipa::path(
    post, path = "/v1/images/{id}/clone", params(("id" = String, Path)), request_body = CloneWish,
    responses((status = 200, description = "All of them run there", body = Spawned))
)]
async fn clone_image(
    State(platform): State<Arc<Platform>>,
    ConnectInfo(caller): ConnectInfo<ConnectionPeer>,
    Path(id): Path<String>,
    Json(wish): Json<CloneWish>,
) -> Result<Json<Spawned>, Refusal> {
    check(&platform, &caller, &wish)?;
    match wish {
        CloneWish { from: None, to, count, lazy } => {
            Ok(Json(Spawned { vms: work(|| platform.clone_image(&id, &to, count, lazy))? }))
        }
        CloneWish { from: Some(from), to, count, lazy } => {
            pass_on(platform, from, client::image_clone_path(&id), CloneWish { from: None, to, count, lazy })
                .await
        }
    }
}
