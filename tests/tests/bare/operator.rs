//! What operators do with single VMs, on the host and from elsewhere.

use std::thread;

use host_vmm::{
    api::client::{Connection, Content, Endpoint, Error},
    cluster::tls::{self, Credentials},
};
use hyper::Method;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vmfork_abi::Role;
use vmfork_tests::{
    bare::{Script, control},
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
        assert!(running.ask(&["stop", unknown]).is_err() && running.ask(&["logs", unknown]).is_err(), "{unknown}");
    }
    running.ask(&["stop", "web.2"]).expect("a stopped VM");
    // With the last VM, the platform comes to its end, and tells those that wait before that.
    let follower = running.start(&["logs", "--follow", "vm"]).expect("host-vmm logs");
    running.ask(&["stop", "vm"]).expect("a stopped VM");
    let follower = follower.wait_with_output().expect("an end");
    assert!(follower.status.success(), "{}", String::from_utf8_lossy(&follower.stderr));
    assert_eq!(String::from_utf8_lossy(&follower.stdout), format!("{:08x}\n{:08x}\n", Role::Parent.number(), 0));
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
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", "keep = [\"web\"]"));
    let mut running = vmm.start().expect("host-vmm starts");
    running.wait_for_lines("0000000", 6).expect("all VMs");
    let ask = |command: &[&str]| platforms.ask("a", &alice, command);
    assert_eq!(names(&ask(&["ps", "--json"]).expect("a list")), ["vm", "web.1", "web.2"]);
    assert!(ask(&["tree"]).expect("a tree").contains("web.2"));
    let images: Value = serde_json::from_str(&ask(&["image", "ls", "--json"]).expect("images")).expect("JSON");
    let image = images[0]["id"].as_str().expect("an ID");
    assert_eq!(ask(&["spawn", "--image", image]).expect("a copy"), "web.3\n");
    let log = thread::scope(|scope| {
        let follower = scope.spawn(|| ask(&["logs", "--follow", "web.1"]));
        ask(&["stop", "web.1", "web.3"]).expect("stopped VMs");
        follower.join().expect("no panic").expect("all of the log")
    });
    assert_eq!(log, running.log("web.1").expect("a log"));
    assert_eq!(names(&ask(&["ps", "--json"]).expect("a list")), ["vm", "web.2"]);
    let refused = |result: anyhow::Result<String>| result.expect_err("a refusal").to_string();
    assert!(refused(ask(&["image", "save", image, "/tmp/image"])).contains("without --at"));
    let folder = alice.parent().expect("a folder");
    assert!(refused(platforms.ask("a", &folder.join("b"), &["stop", "vm"])).contains("is no operator"));

    let file = |name: &str| folder.join(name);
    let credentials = Credentials::load(&file("ca.pem"), &file("alice.pem"), &file("alice.key")).expect("credentials");
    let open = |name: &str| {
        let (platform, credentials) = (name.to_owned(), credentials.clone());
        let endpoint = tls::Endpoint::Tls { address: platforms.address("a"), platform, credentials };
        Connection::open(&Endpoint::Network(endpoint))
    };
    assert!(matches!(open("b"), Err(Error::Tls { .. })), "it is not the platform b");
    let mut connection = open("a").expect("a connection");
    let clone = format!("/v1/clones/{}", uuid::Uuid::from_u128(1));
    let slots = json!([{ "id": uuid::Uuid::from_u128(2), "index": 1 }]);
    for source in ["b", "alice"] {
        let order = Content::json(&json!({ "source": source, "slots": slots, "total": 1 })).expect("an order");
        match connection.ask(Method::PUT, &clone, order) {
            Err(Error::Refused { status, .. }) => assert_eq!(status, 403),
            other => panic!("{other:?}"),
        }
    }
    let version: Value = connection.ask_for(Method::GET, "/v1/version", Content::none()).expect("versions");
    assert_eq!((&version["api"], &version["capsules"]["oldest"]), (&1.into(), &1.into()));
    let api: Value = connection.ask_for(Method::GET, "/v1/openapi.json", Content::none()).expect("a description");
    assert!(api["paths"]["/v1/vms/{id}"]["delete"].is_object());
    for (path, status) in [("/v1/vms/web.9", 404), ("/v1/vms/web.2/log?from=x", 400), ("/v1/vms/web.2/log?to=1", 400)] {
        match connection.ask(Method::GET, path, Content::none()) {
            Err(Error::Refused { status: found, .. }) => assert_eq!(found, status, "{path}"),
            other => panic!("{path}: {other:?}"),
        }
    }
    running.signal(Signal::SIGTERM).expect("a signal");
    assert_eq!(running.end().expect("host-vmm ends").how("web.3"), Some(&"Stopped".into()));
}
