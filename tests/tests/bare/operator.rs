//! What operators do with single VMs, on the host and from elsewhere.

use std::{io::Read, thread};

use api::client::{Connection, Content, Endpoint, Error};
use cluster::tls::{self, Credentials};
use hyper::Method;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vmfork_abi::Role;
use vmfork_tests::{
    bare_guest::{Script, control},
    cluster::Platforms,
    vmm::{Running, Vmm},
};

use super::{INDEX, ROLE, become_equal};

/// A guest that forks into two children, after which nobody does anything any more.
fn stayers() -> tempfile::NamedTempFile {
    let script = Script::new().request(1, "web", 2).ring().print(control(ROLE)).print(control(INDEX));
    script.hang().to_kernel()
}

fn names(vms: &str) -> Vec<String> {
    let vms: Value = serde_json::from_str(vms).expect("JSON");
    let vms = vms["vms"].as_array().expect("an array").iter();
    let mut names: Vec<_> = vms.map(|vm| vm["name"].as_str().expect("a name").to_owned()).collect();
    names.sort();
    names
}

fn id(running: &Running, name: &str) -> String {
    let vms: Value = serde_json::from_str(&running.ask(&["ps", "--json"]).expect("a list")).expect("JSON");
    let vm = vms["vms"].as_array().expect("an array").iter().find(|vm| vm["name"] == name).expect("the VM");
    vm["id"].as_str().expect("an ID").to_owned()
}

#[test]
fn vms_are_stopped_one_by_one_and_their_logs_stay() {
    let kernel = stayers();
    let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.wait_for_lines("0000000", 6).expect("all VMs");
    let child = format!("{:08x}\n{:08x}\n", Role::Child.number(), 1);
    become_equal(|| running.ask(&["logs", "web.1"]).expect("a log"), || child.clone());
    let first = id(&running, "web.1");
    running.ask(&["stop", &first[..13]]).expect("a stopped VM");
    // It is gone when that is said.
    assert_eq!(names(&running.ask(&["ps", "--json"]).expect("a list")), ["vm", "web.2"]);
    running.ask(&["stop", "web.1"]).expect("it has ended already");
    assert_eq!(running.ask(&["logs", &first]).expect("a log"), child);
    assert_eq!(running.log("web.1").expect("a log"), child);
    for unknown in ["web.3", "web", "00000000", "../vm"] {
        assert!(
            running.ask(&["stop", unknown]).is_err() && running.ask(&["logs", unknown]).is_err(),
            "{unknown}"
        );
    }
    running.ask(&["stop", "web.2"]).expect("a stopped VM");
    // With the last VM, the platform comes to its end, and tells those that wait before that.
    let mut follower = running.start(&["logs", "--follow", "vm"]).expect("host-vmm logs");
    let parent = format!("{:08x}\n{:08x}\n", Role::Parent.number(), 0);
    let mut read = vec![0; parent.len()];
    follower.stdout.as_mut().expect("its output").read_exact(&mut read).expect("what there is of the log");
    assert_eq!(String::from_utf8_lossy(&read), parent);
    running.ask(&["stop", "vm"]).expect("a stopped VM");
    let follower = follower.wait_with_output().expect("an end");
    assert!(follower.status.success(), "{}", String::from_utf8_lossy(&follower.stderr));
    assert_eq!(String::from_utf8_lossy(&follower.stdout), "", "nothing more was written");
    let ended = running.end().expect("host-vmm ends");
    for name in ["vm", "web.1", "web.2"] {
        assert_eq!(ended.how(name), Some(&"Stopped".into()), "{name}");
    }
    assert_eq!(ended.code, Some(0));
}

#[test]
fn an_operator_asks_from_elsewhere_and_is_no_platform() {
    let platforms = Platforms::with_certificates(&["a", "b"]);
    let alice = platforms.operator("alice");
    let kernel = stayers();
    let vmm =
        Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", "keep = [\"web\"]"));
    let mut running = vmm.start().expect("host-vmm starts");
    running.wait_for_lines("0000000", 6).expect("all VMs");
    let ask = |command: &[&str]| platforms.ask("a", &alice, command);
    assert_eq!(names(&ask(&["ps", "--json"]).expect("a list")), ["vm", "web.1", "web.2"]);
    assert!(ask(&["tree"]).expect("a tree").contains("web.2"));
    let images: Value =
        serde_json::from_str(&ask(&["image", "ls", "--json"]).expect("images")).expect("JSON");
    let image = images[0]["id"].as_str().expect("an ID");
    assert_eq!(ask(&["spawn", "--image", image]).expect("a copy"), "web.3\n");
    let (log, stopped) = thread::scope(|scope| {
        let follower = scope.spawn(|| ask(&["logs", "--follow", "web.1"]));
        let stopped = ask(&["stop", "web.1", "web.3"]);
        if stopped.is_err() {
            // The follower ends with the platform.
            running.signal(Signal::SIGKILL).expect("a signal");
        }
        (follower.join().expect("no panic"), stopped)
    });
    stopped.expect("stopped VMs");
    assert_eq!(log.expect("all of the log"), running.log("web.1").expect("a log"));
    assert_eq!(names(&ask(&["ps", "--json"]).expect("a list")), ["vm", "web.2"]);
    let refused = |result: anyhow::Result<String>| result.expect_err("a refusal").to_string();
    assert!(refused(ask(&["image", "save", image, "/tmp/image"])).contains("without --at"));
    let folder = alice.parent().expect("a folder");
    assert!(refused(platforms.ask("a", &folder.join("b"), &["stop", "vm"])).contains("is no operator"));
    running.signal(Signal::SIGTERM).expect("a signal");
    assert_eq!(running.end().expect("host-vmm ends").how("web.3"), Some(&"Stopped".into()));
}

#[test]
fn what_somebody_may_ask_depends_on_who_he_is() {
    let platforms = Platforms::with_certificates(&["a", "b"]);
    let alice = platforms.operator("alice");
    let folder = alice.parent().expect("a folder");
    let kernel = stayers();
    let vmm =
        Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", "keep = [\"web\"]"));
    let mut running = vmm.start().expect("host-vmm starts");
    running.wait_for_lines("0000000", 6).expect("all VMs");
    let image = &running.kept_image().expect("an image");
    let file = |name: String| folder.join(name);
    let open = |platform: &str, by: &str| {
        let [certificate, key] = ["pem", "key"].map(|ending| file(format!("{by}.{ending}")));
        let credentials = Credentials::load(&file("ca.pem".into()), &certificate, &key).expect("credentials");
        let (address, platform) = (platforms.address("a"), platform.to_owned());
        Connection::open(&Endpoint::Network(tls::Endpoint::Tls { address, platform, credentials }))
    };
    assert!(matches!(open("b", "alice"), Err(Error::Tls { .. })), "it is not the platform b");
    let mut connection = open("a", "alice").expect("a connection");
    let mut of_platform = open("a", "b").expect("a connection");
    let refusal = |connection: &mut Connection, method: Method, path: &str, content: &Value| match connection
        .ask(method, path, Content::json(content).expect("JSON"))
    {
        Err(Error::Refused { status, .. }) => status.as_u16(),
        other => panic!("{path}: {other:?}"),
    };
    // What other platforms need they have by clones.
    for (method, path, content) in [
        (Method::GET, "/v1/vms".to_owned(), json!(null)),
        (Method::GET, "/v1/vms/web.2/log".to_owned(), json!(null)),
        (Method::DELETE, "/v1/vms/web.2".to_owned(), json!(null)),
        (Method::POST, "/v1/vms/web.2/fork".to_owned(), json!({ "count": 1 })),
        (Method::POST, "/v1/vms/web.2/clone".to_owned(), json!({ "to": "b", "count": 1 })),
        (Method::GET, "/v1/images".to_owned(), json!(null)),
        (Method::DELETE, format!("/v1/images/{image}"), json!(null)),
        (Method::POST, format!("/v1/images/{image}/spawn"), json!({ "count": 1 })),
        (Method::POST, format!("/v1/images/{image}/clone"), json!({ "to": "b", "count": 1, "lazy": false })),
    ] {
        assert_eq!(refusal(&mut of_platform, method, &path, &content), 403, "{path}");
    }
    // Whoever may ask all of that names no files of the host from elsewhere.
    let place = json!({ "path": "/tmp/image" });
    assert_eq!(refusal(&mut connection, Method::POST, "/v1/images", &place), 405);
    assert_eq!(refusal(&mut connection, Method::POST, &format!("/v1/images/{image}/save"), &place), 404);
    let clone = format!("/v1/clones/{}", uuid::Uuid::from_u128(1));
    let slots = json!([{ "id": uuid::Uuid::from_u128(2), "index": 1 }]);
    for source in ["b", "alice"] {
        let order =
            Content::json(&json!({ "source": source, "slots": slots, "total": 1 })).expect("an order");
        match connection.ask(Method::PUT, &clone, order) {
            Err(Error::Refused { status, .. }) => assert_eq!(status, 403),
            other => panic!("{other:?}"),
        }
    }
    let version: Value = connection.ask_for(Method::GET, "/v1/version", Content::none()).expect("versions");
    assert_eq!((&version["api"], &version["capsules"]["oldest"]), (&1.into(), &1.into()));
    let api: Value =
        connection.ask_for(Method::GET, "/v1/openapi.json", Content::none()).expect("a description");
    assert!(api["paths"]["/v1/vms/{id}"]["delete"].is_object());
    for (path, status) in
        [("/v1/vms/web.9", 404), ("/v1/vms/web.2/log?from=x", 400), ("/v1/vms/web.2/log?to=1", 400)]
    {
        match connection.ask(Method::GET, path, Content::none()) {
            Err(Error::Refused { status: found, .. }) => assert_eq!(found, status, "{path}"),
            other => panic!("{path}: {other:?}"),
        }
    }
    let newer = connection.ask(Method::GET, "/v2/vms", Content::none()).expect_err("a refusal").to_string();
    assert_eq!(newer, "version 1 of this API has no such path");
    running.signal(Signal::SIGTERM).expect("a signal");
    running.end().expect("host-vmm ends");
}
