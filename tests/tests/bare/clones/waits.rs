//! Platforms that keep their sources waiting, and what they are asked again.

use std::{
    collections::BTreeMap,
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use api::client::{Connection, Connections, Content, Endpoint, Error};
use capsule::{ChunkSource, Digests, file};
use hyper::Method;
use platform::{
    clone::{
        Order, Stage,
        source::{self, RetryPolicy},
    },
    others::{REQUEST_TIMEOUT, SendSettings},
};
use serde_json::{Value, json};
use types::CopySpec;
use uuid::Uuid;
use vmfork_abi::{ErrorCode, Status};
use vmfork_tests::{
    cluster::Platforms,
    peer::{Answer, Peer},
    process,
    vmm::{Running, TIMEOUT as VMM_TIMEOUT},
};
use vmm::memory::Budget;

use super::{
    super::left_behind::become_equal, describes_itself, fork_again, know_each_other, source,
    source_with_image, wait_until,
};

/// A parent that stands still for a second at most, where nobody forgets a platform meanwhile.
const A_SECOND: &str = "max_pause_seconds = 1\nlease_seconds = 60";

const LATE: (u32, u32) = (Status::Failed.number(), ErrorCode::Timeout.number());

/// What forks take of their platform: memory files, and threads that send copies away.
fn taken(running: &Running) -> (BTreeMap<String, usize>, usize) {
    let mut open = process::descriptors(running.pid()).expect("the process's descriptors");
    open.retain(|name, _| name.contains("memfd"));
    let threads = fs::read_dir(format!("/proc/{}/task", running.pid())).expect("threads");
    let names = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    (open, names.filter(|name| name.trim() == "away").count())
}

/// The same, once it does not change any more.
fn taken_at_rest(running: &Running) -> (BTreeMap<String, usize>, usize) {
    let deadline = Instant::now() + VMM_TIMEOUT;
    let mut last = taken(running);
    loop {
        thread::sleep(Duration::from_millis(300));
        let now = taken(running);
        if now == last {
            return now;
        }
        assert!(Instant::now() < deadline, "no rest: {now:?}");
        last = now;
    }
}

#[test]
fn a_parent_goes_on_whatever_a_platform_keeps_it_waiting_with_and_nothing_is_left() {
    let platforms = Platforms::new(&["a", "b"]);
    let (mut source, _kernel) = source(&platforms.config("a", A_SECOND), 3);
    let peer = Peer::start("b", platforms.address("b"), &describes_itself(&source, "a"));
    know_each_other(&source, 2);
    let (mut outcomes, mut orders) = (Vec::new(), 0);
    for answer in [Answer::Prepares, Answer::Drips, Answer::Silent] {
        peer.answer(answer.clone());
        let before = taken_at_rest(&source);
        outcomes.push(LATE);
        assert_eq!(fork_again(&mut source, outcomes.len()), outcomes, "{answer:?}");
        // What the next fork will come with is announced again.
        become_equal(|| taken(&source), || before.clone());
        assert_eq!(wait_until(&source, &["ps", "--json"], |_| true)["vms"].as_array().map(Vec::len), Some(1));
        let told = source
            .ask(&["clone", "--vm", "vm", "--to", "b", "--count", "2"])
            .expect_err("no copies")
            .to_string();
        assert!(told.contains("within 1s") && told.contains("max_pause_seconds"), "{told}");
        become_equal(|| taken(&source), || before.clone());
        // Each was ordered once, unless the parent gave up before that on a busy machine, and each order was
        // called off once; nobody asks for anything any more.
        let ordered = || peer.asked("PUT", "") - peer.asked("PUT", "/capsule");
        become_equal(ordered, || peer.asked("DELETE", ""));
        assert!(ordered() <= 2);
        orders += ordered();
        let all = peer.clones();
        thread::sleep(Duration::from_millis(200));
        assert_eq!(peer.clones(), all);
    }
    assert!(orders > 0);
    for (answer, count, told) in [
        (Answer::Forgets, "1", "of 1 copies 0 run, and of 1 it is not known whether they do"),
        (Answer::RunsNone, "1", "of 1 copies 0 run, and of 1 it is not known whether they do"),
        (Answer::Runs("web.1".into()), "2", "of 2 copies 1 run, and of 1 it is not known whether they do"),
    ] {
        let clone = ["clone", "--vm", "vm", "--to", "b", "--count", count];
        let ask = |_| {
            peer.answer(answer.clone());
            source.ask(&clone).expect_err("nobody knows").to_string()
        };
        // On a busy machine a second may be over before the copies are let run.
        let error = (0..20).map(ask).find(|error| !error.contains("within 1s")).expect("an end in time");
        assert!(error.contains(told), "{answer:?}: {error}");
        assert_eq!(peer.asked("POST", "/commit"), 1);
    }
}

#[test]
fn of_copies_of_an_image_that_a_platform_does_not_name_nobody_says_that_they_run() {
    let platforms = Platforms::new(&["a", "b"]);
    let config = platforms.config("a", "keep = [\"web\"]\nlease_seconds = 60");
    let (source, image, _kernel) = source_with_image(&config);
    let peer = Peer::start("b", platforms.address("b"), &describes_itself(&source, "a"));
    know_each_other(&source, 2);
    for (answer, count) in [(Answer::RunsNone, "1"), (Answer::Runs("web.1".into()), "2")] {
        peer.answer(answer);
        let clone = ["clone", "--image", image.as_str(), "--to", "b", "--count", count];
        let error = source.ask(&clone).expect_err("nobody knows").to_string();
        assert!(error.contains("it is not known whether they do"), "{error}");
    }
    peer.answer(Answer::Runs("web.1".into()));
    source.ask(&["clone", "--image", &image, "--to", "b"]).expect("the one that was ordered");
}

/// What is asked of a target, by somebody on its host.
struct Asker(Connection);

impl Asker {
    fn of(target: &Running) -> Self {
        Self(Connection::open(&Endpoint::Socket(target.socket())).expect("a connection"))
    }

    fn ask(&mut self, method: Method, clone: Uuid, what: &str, content: &Value) -> Result<Stage, Error> {
        self.0.ask_for(method, &format!("/v1/clones/{clone}{what}"), Content::json(content)?)
    }
}

#[test]
fn a_commit_is_answered_again_whatever_others_have_asked_for_meanwhile() {
    let platforms = Platforms::new(&["a", "b"]);
    let (target, image, _kernel) = source_with_image(&platforms.config("a", "keep = [\"web\"]"));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    target.ask(&["image", "save", &image, path.to_str().expect("a path")]).expect("a saved image");
    let budget = Budget::of_this_host(None).expect("memory");
    let capsule = file::load(&fs::File::open(&path).expect("the file"), &budget).expect("an image");
    let chunk_source = Arc::new(ChunkSource::of(&capsule, &Digests::default()).expect("a chunk source"));
    let (id, slots) = (Uuid::new_v4(), vec![CopySpec { id: Uuid::new_v4(), index: 1 }]);
    let order = Order { source: "north".into(), slots, total: 1, lazy: false };
    let client = Connections::default().client(Endpoint::Socket(target.socket()), REQUEST_TIMEOUT);
    let settings = SendSettings { connections: 1, bandwidth: None, lazy: false };
    let retry_policy: source::CurrentRetryPolicy = Arc::new(|| RetryPolicy::Retry);
    let sent = source::send(client, id, &order, &chunk_source, &settings, &Arc::default(), retry_policy)
        .expect("a clone");
    let vms = sent.commit().expect("copies that run");

    let mut asker = Asker::of(&target);
    let others: Vec<Uuid> = (0..4200).map(|_| Uuid::new_v4()).collect();
    for other in &others {
        let slots = json!([{ "id": Uuid::new_v4(), "index": 1 }]);
        let order = json!({ "source": "south", "slots": slots, "total": 1 });
        assert_eq!(asker.ask(Method::PUT, *other, "", &order).expect("an order"), Stage::Reserved);
        let aborted = asker.ask(Method::DELETE, *other, "", &json!(null)).expect("an answer");
        assert!(matches!(aborted, Stage::Aborted { .. }), "{aborted:?}");
    }
    // All that may be forgotten is.
    become_equal(|| asker_forgets(&target, others[0]), || true);
    assert_eq!(
        asker.ask(Method::POST, id, "/commit", &json!(null)).expect("the same"),
        Stage::Committed { vms }
    );
}

/// Whether a target does not know a clone any more.
fn asker_forgets(target: &Running, clone: Uuid) -> bool {
    let asked = Asker::of(target).ask(Method::GET, clone, "", &json!(null));
    matches!(asked, Err(Error::Refused { status, .. }) if status == 404)
}
