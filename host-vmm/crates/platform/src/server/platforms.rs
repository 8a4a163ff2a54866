//! What is asked of platforms.

use std::{sync::Arc, time::Instant};

use api::{self, Platforms};
use axum::{Json, extract::State, http::StatusCode};
use base::text::Reason;
use cluster::{
    member::{MAX_IMAGES, Member},
    placement::{Explanation, Wish},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{Refusal, check_count, work};
use crate::{Error, Platform};

pub(super) fn routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default().routes(routes!(platforms)).routes(routes!(place))
}

/// What other platforms ask too.
pub(super) fn own_routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default().routes(routes!(own_platform))
}

/// Shows the platform that is asked, as one of a cluster.
#[utoipa::path(get, path = "/v1/platform", responses((status = 200, description = "The platform", body = Member)))]
async fn own_platform(State(platform): State<Arc<Platform>>) -> Result<Json<Member>, Refusal> {
    // It reads from /proc.
    work(|| Ok::<_, Error>(Json((platform.cluster().ok_or(Error::Alone)?.own)())))
}

/// Lists the platforms that one knows.
#[utoipa::path(get, path = "/v1/platforms", responses((status = 200, description = "The one that is asked comes first", body = Platforms)))]
async fn platforms(State(platform): State<Arc<Platform>>) -> Result<Json<Platforms>, Refusal> {
    let cluster = platform.cluster().ok_or(Error::Alone)?;
    let member = work(|| Ok::<_, Error>((cluster.own)()))?;
    let own = api::Platform { member, age_ms: 0 };
    let (view, now) = (cluster.directory.members(), Instant::now());
    let others = view.members.iter().map(|seen| {
        let age = now.saturating_duration_since(seen.last_seen);
        api::Platform {
            member: Member::clone(&seen.member),
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        }
    });
    let platforms = std::iter::once(own).chain(others).collect();
    Ok(Json(Platforms { platforms, partitioned: cluster.directory.is_partitioned() }))
}

/// Tells where copies of a VM would go, and why.
#[utoipa::path(
    post, path = "/v1/place", request_body = Wish,
    responses((status = 200, description = "What speaks for each platform, and what against it", body = Explanation))
)]
async fn place(
    State(platform): State<Arc<Platform>>,
    Json(wish): Json<Wish>,
) -> Result<Json<Explanation>, Refusal> {
    check_count(wish.count)?;
    if wish.images.len() > MAX_IMAGES {
        return Err(Refusal(
            StatusCode::BAD_REQUEST,
            Reason::of(format_args!("a VM is of at most {MAX_IMAGES} images")),
        ));
    }
    Ok(Json(work(|| platform.explain(&wish))?))
}
