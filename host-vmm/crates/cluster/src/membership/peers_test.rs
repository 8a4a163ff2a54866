use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use base::sync::lock;

use super::*;
use crate::{
    member::Load,
    membership::{Directory, Settings, Source, Status, View},
};

const LEASE: Duration = Duration::from_secs(3);

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);

fn member(name: &str) -> Member {
    Member {
        name: name.into(),
        cluster: "web".into(),
        address: "192.0.2.9:1".parse().unwrap(),
        labels: BTreeMap::new(),
        cpu_profile: String::new(),
        load: Load::default(),
    }
}

fn peer(name: &str, port: u16) -> Peer {
    Peer { name: name.into(), cluster: "web".into(), address: ([192, 0, 2, 1], port).into() }
}

fn directory(peers: Vec<Peer>, ask: Arc<Ask>) -> Directory {
    Directory::start(Settings { own: Arc::new(|| member("own")), lease: LEASE, etcd: None, peers, ask })
        .unwrap()
}

/// The first view of this kind.
fn wait(directory: &Directory, is: impl Fn(&View) -> bool) -> Arc<View> {
    let end = Instant::now() + LONG;
    let mut view = directory.members();
    while !is(&view) {
        assert!(Instant::now() < end, "{view:?}");
        view = directory.newer(view.version, LONG);
    }
    view
}

fn names(view: &View) -> Vec<&str> {
    view.members.iter().map(|seen| seen.member.name.as_str()).collect()
}

#[test]
fn one_that_hangs_hides_no_other() {
    let (_never, forever) = mpsc::channel::<()>();
    let (forever, asked) = (Mutex::new(forever), Arc::new(Mutex::new(BTreeSet::new())));
    let ask: Arc<Ask> = {
        let asked = Arc::clone(&asked);
        Arc::new(move |peer| {
            lock(&asked).insert(peer.name.clone());
            match peer.name.as_str() {
                "hangs" => Err(Box::new(lock(&forever).recv().unwrap_err())),
                name => Ok(member(name)),
            }
        })
    };
    let directory = directory(vec![peer("hangs", 1), peer("a", 2), peer("b", 3), peer("own", 4)], ask);
    let view = wait(&directory, |view| view.members.len() == 2);
    assert_eq!(names(&view), ["a", "b"]);
    let a = view.find("web", "a").unwrap();
    assert_eq!((a.source, a.member.address), (Source::Asked, peer("a", 2).address), "where the list has it");
    assert_eq!(directory.status(), Status::Listed);
    assert!(!directory.is_partitioned());
    assert!(!lock(&asked).contains("own"), "a platform does not ask itself");
}

#[test]
fn one_that_stops_to_answer_is_gone_after_the_lease_time_and_may_come_back() {
    let silent = Arc::new(Mutex::new(BTreeSet::new()));
    let ask: Arc<Ask> = {
        let silent = Arc::clone(&silent);
        Arc::new(move |peer| {
            if lock(&silent).contains(&peer.name) { Err("no answer".into()) } else { Ok(member(&peer.name)) }
        })
    };
    let directory = directory(vec![peer("a", 1), peer("b", 2)], ask);
    wait(&directory, |view| names(view) == ["a", "b"]);
    lock(&silent).insert("a".to_owned());
    let stopped = Instant::now();
    wait(&directory, |view| names(view) == ["b"]);
    let took = stopped.elapsed();
    assert!((LEASE - 2 * INTERVAL..LEASE + 2 * INTERVAL).contains(&took), "{took:?}");
    lock(&silent).clear();
    wait(&directory, |view| names(view) == ["a", "b"]);
}

#[test]
fn one_that_is_another_is_left_out() {
    let ask: Arc<Ask> = Arc::new(|peer| {
        let mut found = member(&peer.name);
        match peer.name.as_str() {
            "name" => found.name = "other".into(),
            "cluster" => found.cluster = "db".into(),
            "load" => found.load.cpu_pressure_permille = 1001,
            _ => {}
        }
        Ok(found)
    });
    let listed = ["name", "cluster", "load", "good"].map(|name| peer(name, 1));
    for (peer, is_taken) in listed.iter().zip([false, false, false, true]) {
        let found = accept(peer, ask(peer).unwrap());
        assert_eq!(found.is_ok(), is_taken, "{found:?}");
    }
    let view = wait(&directory(listed.into(), ask), |view| !view.members.is_empty());
    assert_eq!(names(&view), ["good"]);
}

#[test]
fn nobody_waits_for_longer_than_said() {
    let directory = directory(Vec::new(), Arc::new(|_| panic!("there is nobody to ask")));
    let view = directory.newer(directory.members().version, Duration::from_millis(10));
    assert!(view.members.is_empty());
}
