//! Memory that others have a platform make: it has a budget.

use std::fs::File;

use api::client::{Connection, Content, Endpoint, Error};
use capsule::{Chunk, Description, Header, LayerManifest, file::inspect};
use hyper::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use types::VmShape;
use uuid::Uuid;
use vmfork_tests::{
    cluster::Platforms,
    vmm::{Running, Vmm},
};
use vmm::memory::Run;

use super::{know_each_other, source_with_image, vms};

/// Pages of a memory of 1 GiB.
const PAGES: u64 = 1 << 18;

/// An image of 1 GiB in which a chunk occurs so many times, and nothing else, as it is described.
fn repeated(description: &Description, chunk: Chunk, times: u32) -> Vec<u8> {
    let mut description = description.clone();
    let config = VmShape { ram_bytes: PAGES << 12, ..description.metadata.config };
    (description.metadata.config, description.machine.config) = (config, config);
    let runs = vec![Run { page: 0, pages: PAGES, file_page: 0 }];
    let chunks = (0..times).map(|number| Chunk { number, ..chunk }).collect();
    description.memory.pages = PAGES;
    description.memory.layers = vec![LayerManifest { file_pages: PAGES, runs, chunks }];
    let body = description.to_bytes().expect("a description");
    let header = Header::new(false, description.memory.data_bytes(), &body);
    [header.to_bytes().as_slice(), &body].concat()
}

/// Describes a clone to a platform that has some of it, and calls it off.
fn describe(target: &Running, capsule: Vec<u8>) -> Result<Value, Error> {
    let mut connection = Connection::open(&Endpoint::Socket(target.socket())).expect("a connection");
    let path = format!("/v1/clones/{}", Uuid::new_v4());
    let order = json!({ "source": "a", "slots": [{ "id": Uuid::new_v4(), "index": 1 }], "total": 1 });
    connection.ask(Method::PUT, &path, Content::json(&order).expect("JSON")).expect("an order that is taken");
    let content = Content::Pieces(Box::new(std::iter::once(Ok(capsule.into()))));
    let described = connection.ask_for(Method::PUT, &format!("{path}/capsule"), content);
    connection.ask(Method::DELETE, &path, Content::none()).expect("a clone that can be called off");
    described
}

#[test]
fn nobody_has_a_platform_make_more_memory_than_its_budget_and_what_is_given_back_is_there_again() {
    let platforms = Platforms::new(&["a", "b", "c"]);
    let target = Vmm::serve(&platforms.config("b", "image_memory = \"8M\"")).start().expect("a platform");
    let other = Vmm::serve(&platforms.config("c", "image_memory = \"4K\"")).start().expect("a platform");
    let (source, image, _kernel) = source_with_image(&platforms.config("a", "keep = [\"web\"]"));
    know_each_other(&source, 3);
    source.ask(&["clone", "--image", &image, "--to", "b"]).expect("a clone for which there is room");
    let folder = TempDir::with_prefix("vmfork-test-").expect("a folder");
    let file = folder.path().join("image");
    let path = file.to_str().expect("a path");
    source.ask(&["image", "save", &image, path]).expect("a file");

    // Of a lazy clone it is not known how much there is, and it may be 64 MiB.
    let is_refused = |result: anyhow::Result<String>| {
        let why = result.expect_err("there is no room for that").to_string();
        assert!(
            why.contains("bytes of memory for an image do not fit") && why.contains("image_memory"),
            "{why}"
        );
    };
    is_refused(source.ask(&["clone", "--image", &image, "--to", "b", "--lazy"]));
    is_refused(source.ask(&["clone", "--image", &image, "--to", "c"]));
    is_refused(other.ask(&["image", "load", path]));

    // What the target has already need not be sent, and is there as often as it occurs all the same.
    let (_, description) = inspect(&File::open(&file).expect("a file")).expect("a capsule");
    let chunks = description.memory.chunks().map(|(_, chunk)| *chunk);
    let known = chunks.min_by_key(Chunk::data_bytes).expect("some memory");
    assert!(known.data_bytes() <= 32 << 10, "{known:?}");
    for _ in 0..20 {
        let missing = describe(&target, repeated(&description, known, 128)).expect("there is room for that");
        assert_eq!(missing["chunks"], json!([]));
    }
    let bomb = repeated(&description, known, 4096);
    println!("{} bytes that stand for {}", bomb.len(), 4096 * known.data_bytes());
    match describe(&target, bomb) {
        Err(Error::Refused { status: StatusCode::INSUFFICIENT_STORAGE, .. }) => {}
        other => panic!("{other:?}"),
    }
    source.ask(&["clone", "--image", &image, "--to", "b"]).expect("there is room for another one");
    vms(&target, 2);
    assert!(source.ask(&["ps"]).expect("a list").contains("vm"));
}
