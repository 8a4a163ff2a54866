//! What is asked of platforms.

use std::{sync::Arc, time::Instant};

use axum::{
    Json, Router,
    extract::State,
    routing::{get, post},
};

use super::Refusal;
use crate::{
    api::{self, Platforms},
    cluster::{
        member::Member,
        placement::{Explanation, Wish},
    },
    platform::{Error, Platform},
};

pub(super) fn routes() -> Router<Arc<Platform>> {
    Router::new().route("/v1/platform", get(own)).route("/v1/platforms", get(platforms)).route("/v1/place", post(place))
}

async fn own(State(platform): State<Arc<Platform>>) -> Result<Json<Member>, Refusal> {
    Ok(Json((platform.cluster().ok_or(Error::Alone)?.own)()))
}

async fn platforms(State(platform): State<Arc<Platform>>) -> Result<Json<Platforms>, Refusal> {
    let cluster = platform.cluster().ok_or(Error::Alone)?;
    let own = api::Platform { member: (cluster.own)(), age_ms: 0 };
    let (view, now) = (cluster.directory.members(), Instant::now());
    let others = view.members.iter().map(|seen| {
        let age = now.saturating_duration_since(seen.heard);
        api::Platform {
            member: Member::clone(&seen.member),
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        }
    });
    let platforms = std::iter::once(own).chain(others).collect();
    Ok(Json(Platforms { platforms, partitioned: cluster.directory.is_partitioned() }))
}

async fn place(State(platform): State<Arc<Platform>>, Json(wish): Json<Wish>) -> Result<Json<Explanation>, Refusal> {
    Ok(Json(platform.explain(&wish)?))
}
