//! What a platform says of itself, and the description of this API: made of what each handler says where it
//! stands.

use std::sync::Arc;

use api::{Failure, VERSION, Version, Versions};
use axum::Json;
use capsule::{
    compat::READABLE_STATE_VERSIONS,
    header::{self, OLDEST_VERSION},
};
use utoipa::{
    OpenApi,
    openapi::{self, ContentBuilder, Ref, ResponseBuilder},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use super::all_routes;
use crate::Platform;

/// How the description begins.
#[derive(Debug, OpenApi)]
#[openapi(
    info(
        title = "host-vmm",
        description = "The API of a platform: HTTP/1.1 on a UNIX socket, and over mutual TLS where the platform serves others.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(Failure))
)]
pub(super) struct Head;

pub(super) fn routes() -> OpenApiRouter<Arc<Platform>> {
    OpenApiRouter::default().routes(routes!(version)).routes(routes!(openapi))
}

/// Tells what the platform understands.
#[utoipa::path(get, path = "/v1/version", responses((status = 200, description = "Its versions", body = Version)))]
async fn version() -> Json<Version> {
    Json(own_version())
}

/// What this program understands.
fn own_version() -> Version {
    let states = READABLE_STATE_VERSIONS;
    Version {
        vmm: env!("CARGO_PKG_VERSION").to_owned(),
        api: VERSION,
        capsules: Versions { oldest: OLDEST_VERSION, newest: header::VERSION },
        states: Versions { oldest: *states.start(), newest: *states.end() },
    }
}

/// Describes this API, in OpenAPI 3.1.
#[utoipa::path(
    get, path = "/v1/openapi.json",
    responses((status = 200, description = "This description", content_type = "application/json"))
)]
async fn openapi() -> Json<openapi::OpenApi> {
    Json(describe())
}

/// The description of all that can be asked. Each question may be answered by a failure.
fn describe() -> openapi::OpenApi {
    let mut description = all_routes().into_openapi();
    let failure = ContentBuilder::new().schema(Some(Ref::from_schema_name("Failure"))).build();
    let failure =
        ResponseBuilder::new().description("Why it is not done").content("application/json", failure).build();
    for item in description.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.put, &mut item.post, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            operation.responses.responses.insert("default".into(), failure.clone().into());
        }
    }
    description
}

#[cfg(test)]
#[path = "description_test.rs"]
mod tests;
