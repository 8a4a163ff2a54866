//! An etcd for tests, what an operator or an evil neighbour does to it, and a way to it that can be cut.

use std::{
    env, fs,
    fs::File,
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use base::sync::lock;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use prost::Message;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::super::{
    client::{self, Client},
    messages::{self, PutRequest, RequestOp, TxnRequest, TxnResponse, WatchResponse},
};
use crate::settings::{Etcd, EtcdTls};

/// Longer than anything here takes.
pub(super) const LONG: Duration = Duration::from_secs(30);

/// Waits until something is so.
pub(super) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !is() {
        assert!(Instant::now() < end, "it takes too long until {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// An etcd on ports of its own. Dropping it ends it.
pub(super) struct Server {
    folder: TempDir,
    /// For clients, and for other servers, of which there are none.
    ports: [u16; 2],
    /// For clients.
    tls: Option<EtcdTls>,
    /// Its own certificate, and the key of that.
    identity: Option<(PathBuf, PathBuf)>,
    /// How much it may store, in bytes; 0: as much as it usually may.
    quota: u64,
    process: Option<Child>,
}

impl Server {
    /// Starts one, where there is one: named by `VMFORK_ETCD`, or on the PATH.
    pub(super) fn start() -> Option<Self> {
        Self::start_with(None, None, 0)
    }

    /// Starts one that may store so many bytes.
    pub(super) fn start_with_quota(bytes: u64) -> Option<Self> {
        Self::start_with(None, None, bytes)
    }

    /// Starts one that speaks TLS, and asks for certificates that the same CA vouches for.
    pub(super) fn start_with_tls(tls: EtcdTls, identity: (PathBuf, PathBuf)) -> Option<Self> {
        Self::start_with(Some(tls), Some(identity), 0)
    }

    fn start_with(tls: Option<EtcdTls>, identity: Option<(PathBuf, PathBuf)>, quota: u64) -> Option<Self> {
        // Both are free until they are let go of; nobody else is likely to take them within a moment.
        let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = free.each_ref().map(|listener| listener.local_addr().unwrap().port());
        let folder = tempfile::tempdir().unwrap();
        drop(free);
        let mut server = Self { folder, ports, tls, identity, quota, process: None };
        match server.spawn() {
            Ok(process) => server.process = Some(process),
            Err(error) if error.kind() == io::ErrorKind::NotFound && env::var_os("VMFORK_ETCD").is_none() => {
                eprintln!("SKIPPED: there is no etcd on this machine (Debian's package etcd-server has it)");
                return None;
            }
            Err(error) => panic!("etcd can't be started: {error}"),
        }
        Some(server)
    }

    fn spawn(&self) -> io::Result<Child> {
        let program = env::var_os("VMFORK_ETCD").unwrap_or_else(|| "etcd".into());
        let folder = self.folder.path();
        let log = File::options().create(true).append(true).open(folder.join("log"))?;
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let (clients, servers) = (
            format!("{scheme}://127.0.0.1:{}", self.ports[0]),
            format!("http://127.0.0.1:{}", self.ports[1]),
        );
        let mut command = Command::new(program);
        command.args(["--name", "test", "--data-dir"]).arg(folder.join("data"));
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &servers, "--initial-advertise-peer-urls", &servers]);
        command.args(["--initial-cluster", &format!("test={servers}")]);
        command.args(["--quota-backend-bytes", &self.quota.to_string()]);
        if let (Some(EtcdTls { ca, .. }), Some((cert, key))) = (&self.tls, &self.identity) {
            command.arg("--cert-file").arg(cert).arg("--key-file").arg(key);
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
    }

    /// How clients reach it.
    pub(super) fn etcd(&self) -> Etcd {
        Etcd { servers: vec![self.address()], tls: self.tls.clone() }
    }

    pub(super) fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.ports[0]).into()
    }

    /// Ends it as a loss of power does.
    pub(super) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts it again, with what it has on its disk.
    pub(super) fn restart(&mut self) {
        self.process = Some(self.spawn().unwrap());
    }

    /// Has it stand still, or go on.
    pub(super) fn signal(&self, signal: Signal) {
        let pid = self.process.as_ref().unwrap().id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("{}", fs::read_to_string(self.folder.path().join("log")).unwrap_or_default());
        }
    }
}

/// Somebody with access to an etcd.
pub(super) struct Admin {
    runtime: Runtime,
    client: Client,
}

/// Any request of one or two texts.
#[derive(Clone, PartialEq, Message)]
struct Texts {
    #[prost(string, tag = "1")]
    first: String,
    #[prost(string, tag = "2")]
    second: String,
}

/// A request about alarms: what is to be done, whose, and which.
#[derive(Clone, PartialEq, Message)]
struct AlarmRequest {
    #[prost(int32, tag = "1")]
    action: i32,
    #[prost(uint64, tag = "2")]
    member: u64,
    #[prost(int32, tag = "3")]
    alarm: i32,
}

/// Alarms, as members and what each is about.
#[derive(Clone, PartialEq, Message)]
struct Alarms {
    #[prost(message, repeated, tag = "2")]
    alarms: Vec<Alarm>,
}

#[derive(Clone, PartialEq, Message)]
struct Alarm {
    #[prost(uint64, tag = "1")]
    member: u64,
    #[prost(int32, tag = "2")]
    alarm: i32,
}

/// What a compaction goes up to, and whether to wait until the room is free.
#[derive(Clone, PartialEq, Message)]
struct CompactRequest {
    #[prost(int64, tag = "1")]
    revision: i64,
    #[prost(bool, tag = "2")]
    physical: bool,
}

/// A request of one number.
#[derive(Clone, PartialEq, Message)]
struct Number {
    #[prost(int64, tag = "1")]
    number: i64,
}

/// Any answer.
#[derive(Clone, PartialEq, Message)]
struct Done {}

impl Admin {
    /// Waits until an etcd serves.
    pub(super) fn new(etcd: &Etcd) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server = client::servers(etcd, LONG).unwrap().remove(0);
        let end = Instant::now() + LONG;
        let client = loop {
            let client = runtime.block_on(async {
                let client = Client::connect(&server).await?;
                client.list("/", 1, |_| {}).await?;
                Ok::<_, super::Error>(client)
            });
            match client {
                Ok(client) => break client,
                Err(error) => {
                    assert!(Instant::now() < end, "etcd does not serve: {}", base::error::chain(&error))
                }
            }
            thread::sleep(Duration::from_millis(50));
        };
        Self { runtime, client }
    }

    fn call<Q: Message + 'static, A: Message + Default + 'static>(
        &self,
        path: &'static str,
        question: Q,
    ) -> A {
        self.runtime.block_on(self.client.call(path, question)).unwrap()
    }

    pub(super) fn put(&self, key: &str, value: impl Into<Vec<u8>>) {
        let put = PutRequest { key: key.into(), value: value.into(), lease: 0 };
        let write = RequestOp { put: Some(put), range: None };
        let question = TxnRequest { success: vec![write], ..TxnRequest::default() };
        assert!(self.call::<_, TxnResponse>(messages::TXN, question).succeeded);
    }

    pub(super) fn delete(&self, key: &str) {
        let question = Texts { first: key.into(), second: String::new() };
        let Done {} = self.call("/etcdserverpb.KV/DeleteRange", question);
    }

    /// The keys that begin so, with their values.
    pub(super) fn list(&self, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let mut found = Vec::new();
        let list =
            self.client.list(prefix, 10_000, |kv| found.push((String::from_utf8(kv.key).unwrap(), kv.value)));
        self.runtime.block_on(list).unwrap();
        found
    }

    /// The first answer of this kind to a watch from a revision on.
    pub(super) fn first_of_watch(
        &self,
        prefix: &str,
        revision: i64,
        is: impl Fn(&WatchResponse) -> bool,
    ) -> WatchResponse {
        self.runtime.block_on(async {
            let mut watch = self.client.watch(prefix, revision).await.unwrap();
            loop {
                let answer = watch.message().await.unwrap().unwrap();
                if is(&answer) {
                    return answer;
                }
            }
        })
    }

    /// Has etcd forget all that is not present.
    pub(super) fn compact(&self) {
        let revision = self.runtime.block_on(self.client.list("/", 1, |_| {})).unwrap();
        let Done {} = self.call("/etcdserverpb.KV/Compact", Number { number: revision });
    }

    /// Writes until etcd takes no more.
    pub(super) fn fill(&self) {
        let put = PutRequest { key: "/fill".into(), value: vec![0; 1 << 18], lease: 0 };
        let write = RequestOp { put: Some(put), range: None };
        let question = TxnRequest { success: vec![write], ..TxnRequest::default() };
        loop {
            match self.runtime.block_on(self.client.call::<_, TxnResponse>(messages::TXN, question.clone())) {
                Ok(_) => {}
                Err(error) => return assert!(error.is_full(), "{}", base::error::chain(&error)),
            }
        }
    }

    /// Makes room in a full etcd, as its operator does.
    pub(super) fn make_room(&self) {
        let revision = self.runtime.block_on(self.client.list("/", 1, |_| {})).unwrap();
        let Done {} = self.call("/etcdserverpb.KV/Compact", CompactRequest { revision, physical: true });
        let Done {} = self.call("/etcdserverpb.Maintenance/Defragment", Done {});
        let ask = |action, member, alarm| -> Alarms {
            self.call("/etcdserverpb.Maintenance/Alarm", AlarmRequest { action, member, alarm })
        };
        for Alarm { member, alarm } in ask(0, 0, 0).alarms {
            ask(2, member, alarm);
        }
    }

    /// From now on, only the user `root` may do anything.
    pub(super) fn ask_for_password(&self, password: &str) {
        let texts = |first: &str, second: &str| Texts { first: first.into(), second: second.into() };
        let Done {} = self.call("/etcdserverpb.Auth/UserAdd", texts("root", password));
        let Done {} = self.call("/etcdserverpb.Auth/RoleAdd", texts("root", ""));
        let Done {} = self.call("/etcdserverpb.Auth/UserGrantRole", texts("root", "root"));
        let Done {} = self.call("/etcdserverpb.Auth/AuthEnable", texts("", ""));
    }
}

/// A way to a server that can be cut.
pub(super) struct Proxy {
    address: SocketAddr,
    is_open: Arc<AtomicBool>,
    connections: Arc<Mutex<Vec<TcpStream>>>,
}

impl Proxy {
    pub(super) fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (is_open, connections) = (Arc::new(AtomicBool::new(true)), Arc::new(Mutex::new(Vec::new())));
        let proxy = Self { address, is_open: Arc::clone(&is_open), connections: Arc::clone(&connections) };
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(server) else { continue };
                // Under the lock, so that none is opened behind the back of whoever cuts them.
                let mut connections = lock(&connections);
                if is_open.load(Ordering::SeqCst) {
                    pump(&near, &far);
                    pump(&far, &near);
                    connections.extend([near, far]);
                }
            }
        });
        proxy
    }

    pub(super) fn etcd(&self) -> Etcd {
        Etcd { servers: vec![self.address], tls: None }
    }

    pub(super) fn cut(&self) {
        let mut connections = lock(&self.connections);
        self.is_open.store(false, Ordering::SeqCst);
        for connection in connections.drain(..) {
            // It may have come to its end by itself.
            connection.shutdown(Shutdown::Both).ok();
        }
    }

    pub(super) fn mend(&self) {
        self.is_open.store(true, Ordering::SeqCst);
    }
}

/// Copies what comes from one side to the other.
fn pump(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    thread::spawn(move || {
        io::copy(&mut from, &mut to).ok();
        to.shutdown(Shutdown::Both).ok();
    });
}
