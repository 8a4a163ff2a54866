use axum::{extract::DefaultBodyLimit, routing::post};
use hyper::Method;

use super::*;
use crate::api::{
    Spawn,
    client::{Connection, Content, Endpoint, Error as Refused},
};

/// Longest body that is taken in the test.
const MAX_BYTES: usize = 64;

/// What an API of one path answers, that is refused.
fn refused(method: &Method, path: &str, content: &[u8]) -> (u16, String) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let routes = Router::new().route("/v1/thing", post(async |Json(Spawn { count })| Json(Spawn { count })));
    let routes = routes.layer(DefaultBodyLimit::max(MAX_BYTES));
    let listener = runtime.block_on(async { tokio::net::UnixListener::bind(&socket) }).unwrap();
    runtime.spawn(async { axum::serve(listener, in_words(routes)).await });
    let mut connection = Connection::open(&Endpoint::Socket(socket)).unwrap();
    let body = |content: &[u8]| Content::Whole(Some(content.to_vec().into()));
    let answer = connection.ask(Method::POST, "/v1/thing", body(b"{\"count\":7}")).unwrap();
    assert_eq!(answer, "{\"count\":7}");
    match connection.ask(method.clone(), path, body(content)) {
        Err(Refused::Refused { status, why }) => (status.as_u16(), why),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_not_understood_is_refused_as_all_else_is() {
    let long = [b' '; MAX_BYTES + 1];
    for (method, path, content, status, reason) in [
        (Method::POST, "/v2/thing", &b"{}"[..], 404, "version 1 of this API has no such path"),
        (Method::DELETE, "/v1/thing", b"", 405, "nobody can do that at this path"),
        (Method::POST, "/v1/thing", b"{", 400, "Failed to parse the request body as JSON"),
        (Method::POST, "/v1/thing", b"{}", 422, "missing field `count`"),
        (Method::POST, "/v1/thing", &long, 413, "length limit exceeded"),
    ] {
        let (found, why) = refused(&method, path, content);
        assert_eq!(found, status, "{why}");
        assert!(why.contains(reason), "{why}");
        assert!(!why.starts_with("the platform refuses"), "it is told as a failure: {why}");
    }
}
