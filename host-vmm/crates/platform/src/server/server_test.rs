use api::{
    Spawn,
    client::{Connection, Content, Endpoint, Error as Refused},
};
use axum::{extract::DefaultBodyLimit, routing::post};
use hyper::{Method, body::Bytes};
use proptest::prelude::*;

use super::*;

/// Longest body that is taken in the test.
const MAX_BYTES: usize = 64;

/// A connection to an API of some paths, for as long as the runtime is there.
fn serve(routes: Router) -> (Connection, Runtime, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = runtime.block_on(async { tokio::net::UnixListener::bind(&socket) }).unwrap();
    runtime.spawn(async { axum::serve(listener, in_words(routes)).await });
    (Connection::open(&Endpoint::Socket(socket)).unwrap(), runtime, folder)
}

/// Why something is not done.
fn refusal(connection: &mut Connection, method: &Method, path: &str, content: &[u8]) -> (u16, Reason) {
    match connection.ask(method.clone(), path, Content::Whole(Some(content.to_vec().into()))) {
        Err(Refused::Refused { status, why }) => (status.as_u16(), why),
        other => panic!("{other:?}"),
    }
}

/// What an API of one path answers, that is refused.
fn refused(method: &Method, path: &str, content: &[u8]) -> (u16, Reason) {
    let routes = Router::new().route("/v1/thing", post(async |Json(Spawn { count })| Json(Spawn { count })));
    let (mut connection, _runtime, _folder) = serve(routes.layer(DefaultBodyLimit::max(MAX_BYTES)));
    let content_of = |content: &[u8]| Content::Whole(Some(content.to_vec().into()));
    let answer = connection.ask(Method::POST, "/v1/thing", content_of(b"{\"count\":7}")).unwrap();
    assert_eq!(answer, "{\"count\":7}");
    refusal(&mut connection, method, path, content)
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_reason_is_short_and_printable_whoever_gives_it(piece in "\\p{Any}{1,10}", times in 0..30_000_usize) {
        // One is this program, the other says what it likes in JSON, and the third in something else.
        let routes = Router::new()
            .route("/v1/polite", post(async |text: String| Refusal(StatusCode::CONFLICT, text.into())))
            .route("/v1/rude", post(async |text: String| {
                (StatusCode::CONFLICT, Json(serde_json::json!({ "error": text })))
            }))
            .route("/v1/mad", post(async |text: Bytes| {
                (StatusCode::CONFLICT, [(CONTENT_TYPE, "application/json")], text)
            }));
        let text = piece.repeat(times);
        let (mut connection, _runtime, _folder) = serve(routes);
        let mut ask = |path| refusal(&mut connection, &Method::POST, path, text.as_bytes());
        let told = (409, Reason::from(text.as_str()));
        prop_assert_eq!(&ask("/v1/polite"), &told);
        prop_assert_eq!(&ask("/v1/rude"), &told);
        let (status, why) = ask("/v1/mad");
        prop_assert!(status == 409 && why.starts_with("the platform refuses: 409"), "{}", why);
    }
}
