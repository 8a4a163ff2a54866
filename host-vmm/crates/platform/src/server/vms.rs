//! What is asked of VMs.

use std::{sync::Arc, time::Duration};

use api::{ForkWish, Forked, LAST_PIECE, NEXT_OFFSET, Vm, Vms};
use axum::{
    Json,
    extract::{Path, Query, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Refusal, check_count, work};
use crate::{Error, Platform, Target};

/// Longest time for which anybody waits for more of a log.
const MAX_WAIT: Duration = Duration::from_secs(60);

pub(super) fn routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default()
        .routes(routes!(vms))
        .routes(routes!(vm, stop_vm))
        .routes(routes!(fork_vm))
        .routes(routes!(vm_log))
}

/// What of a log is wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct Wanted {
    /// Bytes from the log's start; 0 where it is not given.
    #[serde(default)]
    from: u64,
    /// For how many milliseconds to wait for more where there is nothing; at most a minute.
    #[serde(default)]
    wait_ms: u64,
}

/// Lists the VMs.
#[utoipa::path(get, path = "/v1/vms", responses((status = 200, description = "Those that there are, and who they come from", body = Vms)))]
async fn vms(State(platform): State<Arc<Platform>>) -> Result<Json<Vms>, Refusal> {
    // It reads from /proc for each VM.
    work(|| Ok::<_, Error>(Json(platform.vms())))
}

/// Shows one VM, by its name, its ID, or how that begins.
#[utoipa::path(
    get, path = "/v1/vms/{id}", params(("id" = String, Path)),
    responses((status = 200, description = "The VM", body = Vm))
)]
async fn vm(State(platform): State<Arc<Platform>>, Path(id): Path<String>) -> Result<Json<Vm>, Refusal> {
    Ok(Json(work(|| platform.vm(&id))?))
}

/// Stops one VM, by its name, its ID, or how that begins.
///
/// One that has ended already is as it should be, for as long as it is known. Over a network, only operators
/// may do that.
#[utoipa::path(
    delete, path = "/v1/vms/{id}", params(("id" = String, Path)),
    responses((status = 204, description = "It has ended"))
)]
async fn stop_vm(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
) -> Result<StatusCode, Refusal> {
    work(|| platform.stop_vm(&id))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Forks one VM that runs, by its name, its ID, or how that begins, though its guest has not asked for it.
///
/// It has the limits of a fork that its guest asks for. Over a network, only operators may do that.
#[utoipa::path(
    post, path = "/v1/vms/{id}/fork", params(("id" = String, Path)), request_body = ForkWish,
    responses((status = 200, description = "All of the copies run", body = Forked))
)]
async fn fork_vm(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Json(ForkWish { count, location }): Json<ForkWish>,
) -> Result<Json<Forked>, Refusal> {
    fork(platform, id, count, Target::Chosen(location)).await
}

/// Forks a VM, and says which copies run then.
pub(super) async fn fork(
    platform: Arc<Platform>,
    id: String,
    count: u32,
    target: Target,
) -> Result<Json<Forked>, Refusal> {
    check_count(count)?;
    Ok(Json(Forked { vms: work(|| platform.fork_vm(&id, count, target))? }))
}

/// Reads the log of a VM's console, from an offset on: at most 1 MiB at once.
///
/// The VM may have ended. Over a network, only operators may do that.
#[utoipa::path(
    get, path = "/v1/vms/{id}/log", params(("id" = String, Path), Wanted),
    responses((
        status = 200, description = "A piece of the log, as the VM has written it", content_type = "application/octet-stream",
        headers(
            ("host-vmm-next-offset" = u64, description = "Where the next piece begins"),
            ("host-vmm-last-piece" = bool, description = "Whether the VM has ended, and nothing comes after this piece")
        )
    ))
)]
async fn vm_log(
    State(platform): State<Arc<Platform>>,
    Path(id): Path<String>,
    Query(Wanted { from, wait_ms }): Query<Wanted>,
) -> Result<Response, Refusal> {
    let mut follower = (wait_ms > 0).then(|| platform.follow_log());
    platform.await_log(&id, from, Duration::from_millis(wait_ms).min(MAX_WAIT)).await?;
    let piece = work(|| platform.log(&id, from))?;
    if let Some(follower) = &mut follower {
        follower.comes_again = !piece.is_last;
    }
    let head = [(NEXT_OFFSET, piece.next.to_string()), (LAST_PIECE, piece.is_last.to_string())];
    Ok((head, piece.bytes).into_response())
}
