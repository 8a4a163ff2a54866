//! Each test has an etcd of its own.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use base::error::chain;
use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

use super::*;
use crate::{
    member::Load,
    membership::{self, Directory, Settings, Source, Status, View, view::Known},
    settings::{Etcd, EtcdTls, Login},
};
use messages::WatchResponse;
use server::{Admin, Proxy, Server, until};

#[path = "server_test.rs"]
mod server;

/// The shortest that etcd grants without a change of its own settings is 2 s.
const LEASE: Duration = Duration::from_secs(3);

/// How long etcd may take to find out that a lease has ended, and a loaded machine to tell it.
const SLACK: Duration = Duration::from_secs(3);

const PREFIX: &str = "/host-vmm/v1/web/platforms/";

#[test]
fn mistakes_that_take_turns_are_told_once_each() {
    let silent = || Error::Silent { address: "192.0.2.1:2379".parse().unwrap(), call: "Connect" };
    let mut told = session::ReportedErrors::default();
    let attempts = [silent(), Error::LeaseLost, silent(), Error::LeaseLost];
    assert_eq!(attempts.map(|error| told.is_first(&error)), [true, true, false, false]);
}

fn member(name: &str, vms: u32) -> Member {
    Member {
        name: name.into(),
        cluster: "web".into(),
        address: "192.0.2.1:7070".parse().unwrap(),
        labels: BTreeMap::from([("zone".into(), "north".into())]),
        cpu_profile: String::new(),
        load: Load { vms, ..Load::default() },
    }
}

/// A platform that does nothing but be there.
struct Platform {
    directory: Directory,
    vms: Arc<AtomicU32>,
}

impl Platform {
    fn join(etcd: Etcd, name: &'static str) -> Result<Self, membership::Error> {
        let vms = Arc::new(AtomicU32::new(0));
        let own: Arc<SelfReport> = {
            let vms = Arc::clone(&vms);
            Arc::new(move || member(name, vms.load(Ordering::SeqCst)))
        };
        let ask: Arc<membership::Ask> = Arc::new(|_| Err("nobody is listed".into()));
        let directory =
            Directory::start(Settings { own, lease: LEASE, etcd: Some(etcd), peers: Vec::new(), ask })?;
        Ok(Self { directory, vms })
    }

    fn new(etcd: Etcd, name: &'static str) -> Self {
        Self::join(etcd, name).unwrap_or_else(|error| panic!("{}", chain(&error)))
    }

    fn until(&self, what: &str, is: impl Fn(&View) -> bool) -> Arc<View> {
        until(what, || is(&self.directory.members()));
        self.directory.members()
    }

    fn until_sees(&self, names: &[&str]) -> Arc<View> {
        self.until(&format!("{names:?} are seen"), |view| seen(view) == names)
    }

    fn until_status(&self, status: Status) {
        until(&format!("the status is {status:?}"), || self.directory.status() == status);
    }
}

fn seen(view: &View) -> Vec<&str> {
    view.members.iter().map(|seen| seen.member.name.as_str()).collect()
}

#[test]
fn platforms_see_each_other_come_and_change_and_go() {
    let Some(server) = Server::start() else { return };
    let admin = Admin::new(&server.etcd());
    let (a, b) = (Platform::new(server.etcd(), "a"), Platform::new(server.etcd(), "b"));
    let view = a.until_sees(&["b"]);
    assert_eq!((&*view.members[0].member, view.members[0].source), (&member("b", 0), Source::Etcd));
    b.until_sees(&["a"]);
    assert_eq!((a.directory.status(), a.directory.is_partitioned()), (Status::Joined, false));

    b.vms.store(7, Ordering::SeqCst);
    a.until("the load is seen", |view| view.members[0].member.load.vms == 7);
    let before = admin.list(PREFIX);
    assert_eq!(
        before.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(),
        [format!("{PREFIX}a"), format!("{PREFIX}b")]
    );
    // For longer than a lease, nothing but the lease keeps it there.
    let view = a.directory.members();
    std::thread::sleep(LEASE + SLACK);
    assert_eq!(admin.list(PREFIX), before);
    let later = a.directory.members();
    assert!(later.members[0].last_seen > view.members[0].last_seen, "etcd has confirmed it");

    let start = Instant::now();
    drop(b);
    a.until_sees(&[]);
    assert!(start.elapsed() < LEASE / 2, "{:?}: nobody waited for the lease", start.elapsed());
}

#[test]
fn one_that_is_cut_off_is_gone_after_its_lease_and_knows_it_first() {
    let Some(server) = Server::start() else { return };
    Admin::new(&server.etcd());
    let proxy = Proxy::to(server.address());
    let (a, b) = (Platform::new(server.etcd(), "a"), Platform::new(proxy.etcd(), "b"));
    a.until_sees(&["b"]);
    b.until_sees(&["a"]);

    proxy.cut();
    let start = Instant::now();
    a.until_sees(&[]);
    let took = start.elapsed();
    assert!(b.directory.is_partitioned(), "others take it for gone, and it does not know");
    assert!(took < LEASE + SLACK, "{took:?}");
    let view = b.directory.members();
    assert_eq!(seen(&view), ["a"], "it keeps its view");
    assert!(view.members[0].last_seen.elapsed() >= LEASE, "which ages");

    proxy.mend();
    b.until_status(Status::Joined);
    a.until_sees(&["b"]);
    b.vms.store(3, Ordering::SeqCst);
    a.until("its load is seen again", |view| view.members[0].member.load.vms == 3);
    a.vms.store(4, Ordering::SeqCst);
    b.until("it sees the load of others again", |view| view.members[0].member.load.vms == 4);
}

#[test]
fn one_that_is_killed_is_gone_after_its_lease_and_its_name_is_free() {
    let Some(server) = Server::start() else { return };
    Admin::new(&server.etcd());
    let proxy = Proxy::to(server.address());
    let (a, b) = (Platform::new(server.etcd(), "a"), Platform::new(proxy.etcd(), "b"));
    a.until_sees(&["b"]);
    // It can't say goodbye.
    proxy.cut();
    let start = Instant::now();
    drop(b);
    assert!(start.elapsed() < 2 * LAST_CALLS, "its end is not held up: {:?}", start.elapsed());
    assert_eq!(seen(&a.directory.members()), ["b"]);

    let next = Platform::new(server.etcd(), "b");
    assert!(start.elapsed() < LEASE + SLACK, "{:?}", start.elapsed());
    next.until_sees(&["a"]);
    a.until_sees(&["b"]);
}

#[test]
fn a_name_that_is_taken_is_told() {
    let Some(server) = Server::start() else { return };
    Admin::new(&server.etcd());
    let a = Platform::new(server.etcd(), "a");
    let error = Platform::join(server.etcd(), "a").err().unwrap();
    let told = chain(&error);
    for expected in ["the cluster web", "the name a ", "192.0.2.1:7070", "a name of its own"] {
        assert!(told.contains(expected), "{told:?} should have {expected:?}");
    }
    assert_eq!(a.directory.status(), Status::Joined);

    // One that says something new of itself lives, and nobody waits for its lease.
    let vms = Arc::clone(&a.vms);
    let (ended, end) = mpsc::channel::<()>();
    let work = std::thread::spawn(move || {
        while end.recv_timeout(Duration::from_millis(50)) == Err(mpsc::RecvTimeoutError::Timeout) {
            vms.fetch_add(1, Ordering::SeqCst);
        }
    });
    let start = Instant::now();
    assert!(Platform::join(server.etcd(), "a").is_err());
    assert!(start.elapsed() < LEASE, "{:?}", start.elapsed());
    drop(ended);
    work.join().unwrap();

    drop(a);
    Platform::new(server.etcd(), "a");
}

#[test]
fn etcd_may_die_and_come_back() {
    let Some(mut server) = Server::start() else { return };
    Admin::new(&server.etcd());
    let (a, b) = (Platform::new(server.etcd(), "a"), Platform::new(server.etcd(), "b"));
    a.until_sees(&["b"]);
    server.kill();
    let start = Instant::now();
    a.until_status(Status::Partitioned);
    assert!(start.elapsed() < LEASE + SLACK, "{:?}", start.elapsed());
    b.until_status(Status::Partitioned);
    assert_eq!((seen(&a.directory.members()), seen(&b.directory.members())), (vec!["b"], vec!["a"]));

    server.restart();
    a.until_status(Status::Joined);
    b.until_status(Status::Joined);
    b.vms.store(9, Ordering::SeqCst);
    a.until("loads are seen again", |view| view.members.iter().any(|seen| seen.member.load.vms == 9));
}

#[test]
fn an_etcd_that_hangs_is_as_one_that_is_gone() {
    let Some(server) = Server::start() else { return };
    Admin::new(&server.etcd());
    let a = Platform::new(server.etcd(), "a");
    server.signal(Signal::SIGSTOP);
    let start = Instant::now();
    a.until_status(Status::Partitioned);
    assert!(start.elapsed() < LEASE + SLACK, "{:?}", start.elapsed());
    server.signal(Signal::SIGCONT);
    a.until_status(Status::Joined);
}

#[test]
fn platforms_of_an_etcd_that_is_full_are_members_for_as_long_as_their_leases_live() {
    let Some(server) = Server::start_with_quota(2 << 20) else { return };
    let admin = Admin::new(&server.etcd());
    let proxy = Proxy::to(server.address());
    let (a, b) = (Platform::new(server.etcd(), "a"), Platform::new(proxy.etcd(), "b"));
    a.until_sees(&["b"]);
    b.until_sees(&["a"]);
    admin.fill();
    // They have something to say, and can't.
    a.vms.store(5, Ordering::SeqCst);
    b.vms.store(6, Ordering::SeqCst);
    // One has to begin anew meanwhile.
    proxy.cut();
    proxy.mend();
    let start = Instant::now();
    while start.elapsed() < 2 * LEASE {
        for (platform, other) in [(&a, "b"), (&b, "a")] {
            assert_eq!(platform.directory.status(), Status::Joined, "{:?}", start.elapsed());
            assert_eq!(seen(&platform.directory.members()), [other]);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let view = a.directory.members();
    assert!(view.members[0].last_seen.elapsed() < LEASE, "it is certain that it is there");
    assert_eq!(view.members[0].member.load.vms, 0, "what it has to do is not known");
    // A new one can't come in.
    assert_eq!(Platform::new(server.etcd(), "c").directory.status(), Status::Partitioned);
    admin.make_room();
    a.until("the load is seen again", |view| view.members.iter().any(|seen| seen.member.load.vms == 6));
    b.until("the load is seen again", |view| view.members.iter().any(|seen| seen.member.load.vms == 5));
}

#[test]
fn an_etcd_that_comes_late_is_joined_then() {
    let Some(mut server) = Server::start() else { return };
    Admin::new(&server.etcd());
    server.kill();
    let start = Instant::now();
    let a = Platform::new(server.etcd(), "a");
    assert!(start.elapsed() < LEASE, "{:?}: nobody waits for it", start.elapsed());
    assert!(a.directory.is_partitioned());
    server.restart();
    a.until_status(Status::Joined);
}

#[test]
fn any_server_will_do() {
    let Some(server) = Server::start() else { return };
    Admin::new(&server.etcd());
    let listen = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (gone, silent) = (listen().local_addr().unwrap(), listen());
    let etcd = Etcd { servers: vec![gone, silent.local_addr().unwrap(), server.address()], tls: None };
    let start = Instant::now();
    let a = Platform::new(etcd, "a");
    assert_eq!(a.directory.status(), Status::Joined);
    assert!(start.elapsed() < LEASE, "{:?}: the silent one is given up early", start.elapsed());
}

#[test]
fn a_watch_that_etcd_ends_is_not_taken_for_one_without_news() {
    let Some(server) = Server::start() else { return };
    let admin = Admin::new(&server.etcd());
    ["1", "2", "3"].into_iter().for_each(|value| admin.put("/key", value));
    admin.compact();
    let ended = admin.first_of_watch(PREFIX, 1, |answer| answer.canceled || !answer.events.is_empty());
    let (answer, _answered) = mpsc::channel();
    let own = member("a", 0);
    let mut registrar = session::Registrar::new(session::Settings {
        servers: Vec::new(),
        own: Arc::new(|| member("a", 0)),
        instance: Uuid::nil(),
        name: own.name.clone(),
        cluster: own.cluster.clone(),
        lease: LEASE,
        shared: Arc::new(Shared::new(Known::new(&own, LEASE, true))),
        answer,
    });
    assert!(matches!(registrar.apply(ended), Err(Error::WatchEnded(_))));
    registrar.apply(WatchResponse::default()).unwrap();
}

#[test]
fn an_entry_that_somebody_removes_is_made_again() {
    let Some(server) = Server::start() else { return };
    let admin = Admin::new(&server.etcd());
    let a = Platform::new(server.etcd(), "a");
    let key = format!("{PREFIX}a");
    let before = admin.list(&key);
    admin.delete(&key);
    until("it is there again", || admin.list(&key) == before);
    assert_eq!(a.directory.status(), Status::Joined);
}

#[test]
fn an_entry_that_somebody_takes_over_is_theirs_until_they_go() {
    let Some(server) = Server::start() else { return };
    let admin = Admin::new(&server.etcd());
    let (a, b) = (Platform::new(server.etcd(), "a"), Platform::new(server.etcd(), "b"));
    let key = format!("{PREFIX}a");
    let other = serde_json::to_vec(&Entry { instance: Uuid::from_u128(1), member: member("a", 77) }).unwrap();
    admin.put(&key, other.clone());
    a.until_status(Status::NameTaken);
    assert!(a.directory.is_partitioned());
    b.until("the other one is seen", |view| view.members.iter().any(|seen| seen.member.load.vms == 77));
    std::thread::sleep(LEASE);
    assert_eq!(admin.list(&key), [(key.clone(), other)], "it is not written over");
    admin.delete(&key);
    a.until_status(Status::Joined);
}

#[test]
fn entries_that_are_not_valid_are_left_out() {
    let Some(server) = Server::start() else { return };
    let admin = Admin::new(&server.etcd());
    let entry = |member: Member| serde_json::to_vec(&Entry { instance: Uuid::nil(), member }).unwrap();
    let key = |name: &str| format!("{PREFIX}{name}");
    let bad = |say: &dyn Fn(&str, Vec<u8>)| {
        say("no-json", b"{".to_vec());
        say("no-member", br#"{"instance":"00000000-0000-0000-0000-000000000000"}"#.to_vec());
        say("not-utf8", vec![0xff; 100]);
        say("another", entry(member("good", 1)));
        say("elsewhere", entry(Member { cluster: "db".into(), ..member("elsewhere", 1) }));
        say("nowhere", entry(Member { address: "0.0.0.0:1".parse().unwrap(), ..member("nowhere", 1) }));
        say("Large", entry(member("Large", 1)));
        say("sub/key", entry(member("sub", 1)));
        say("deep", "[".repeat(60_000).into_bytes());
        let mut long = entry(member("long", 1));
        long.resize(1 << 20, b' ');
        say("long", long);
    };
    bad(&|name, value| admin.put(&key(name), value));
    admin.put(&key("good"), entry(member("good", 1)));
    // Of a cluster whose name begins alike.
    admin.put("/host-vmm/v1/web-2/platforms/b", entry(member("b", 1)));

    let a = Platform::new(server.etcd(), "a");
    a.until_sees(&["good"]);
    // The same again, when it is watched; the last one shows that all have been looked at.
    bad(&|name, value| admin.put(&key(name), [value.as_slice(), b" "].concat()));
    admin.put(&key("good"), b"not any more".to_vec());
    admin.put(&key("last"), entry(member("last", 1)));
    a.until_sees(&["last"]);
    assert_eq!(a.directory.status(), Status::Joined);
}

#[test]
fn many_platforms_are_seen_even_where_their_past_is_forgotten() {
    let Some(server) = Server::start() else { return };
    let admin = Admin::new(&server.etcd());
    let proxy = Proxy::to(server.address());
    let a = Platform::new(proxy.etcd(), "a");
    proxy.cut();
    let names = (0..100).map(|number| format!("p{number:03}")).collect::<Vec<_>>();
    for name in &names {
        let entry = Entry { instance: Uuid::nil(), member: member(name, 1) };
        admin.put(&format!("{PREFIX}{name}"), serde_json::to_vec(&entry).unwrap());
    }
    admin.compact();
    proxy.mend();
    a.until_sees(&names.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Makes a key, and a certificate by `issuer` for whoever is at 127.0.0.1, and writes both to files.
fn certify(folder: &Path, name: &str, issuer: &CertifiedIssuer<'_, KeyPair>) -> (PathBuf, PathBuf) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    let cert = params.signed_by(&key, issuer).unwrap();
    let paths = (folder.join(format!("{name}.pem")), folder.join(format!("{name}.key")));
    fs::write(&paths.0, cert.pem()).unwrap();
    fs::write(&paths.1, key.serialize_pem()).unwrap();
    paths
}

/// Makes somebody who vouches for others.
fn authority(path: &Path) -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(path, issuer.pem()).unwrap();
    issuer
}

#[test]
fn by_tls_both_sides_know_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (ca, other_ca) = (folder.join("ca.pem"), folder.join("other.pem"));
    let (issuer, other) = (authority(&ca), authority(&other_ca));
    let identity = Some(certify(folder, "platform", &issuer));
    let tls = EtcdTls { ca, identity, login: None };
    let Some(server) = Server::start_with_tls(tls.clone(), certify(folder, "server", &issuer)) else {
        return;
    };
    let admin = Admin::new(&server.etcd());
    let with = |tls| Etcd { tls: Some(tls), ..server.etcd() };
    assert_eq!(Platform::new(server.etcd(), "a").directory.status(), Status::Joined);
    for strangers in [
        EtcdTls { ca: other_ca, ..tls.clone() },
        EtcdTls { identity: Some(certify(folder, "stranger", &other)), ..tls.clone() },
        EtcdTls { identity: None, ..tls.clone() },
    ] {
        assert_eq!(Platform::new(with(strangers), "b").directory.status(), Status::Partitioned);
    }
    let missing = EtcdTls { ca: folder.join("missing.pem"), ..tls.clone() };
    let told = chain(&Platform::join(with(missing), "b").err().unwrap());
    assert!(told.contains("can't read") && told.contains("missing.pem"), "{told}");

    admin.ask_for_password("secret");
    let password_file = folder.join("password");
    let login = |password: &str| {
        fs::write(&password_file, password).unwrap();
        let login = Some(Login { user: "root".into(), password_file: password_file.clone() });
        with(EtcdTls { login, ..tls.clone() })
    };
    assert_eq!(Platform::new(login("secret\n"), "a").directory.status(), Status::Joined);
    let told = chain(&Platform::join(login("wrong"), "a").err().unwrap());
    assert!(told.contains("does not let the user root in") && !told.contains("wrong"), "{told}");
}
