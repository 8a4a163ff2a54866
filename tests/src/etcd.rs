//! An etcd for tests: the program that `VMFORK_ETCD` names, or else the one on the PATH.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    network::{self, Host},
    vmm::TIMEOUT,
};

/// Where a server listens that has a host of its own: for clients, and for the others.
const PORTS: [u16; 2] = [2379, 2380];

/// What it writes into its log once it takes connections.
const READY: &str = "ready to serve client requests";

/// One or several servers. Dropping it ends them.
#[derive(Debug)]
pub struct Etcd {
    program: PathBuf,
    folder: TempDir,
    servers: Vec<Server>,
}

#[derive(Debug)]
struct Server {
    /// Where it runs; `None` for this machine itself.
    host: Option<Host>,
    clients: SocketAddr,
    others: SocketAddr,
    process: Option<Child>,
}

impl Etcd {
    /// Starts one on this machine itself, and waits until it takes connections; `None` where there is no such
    /// program, which is told past what tests capture.
    ///
    /// # Panics
    /// Where it can't be started.
    pub fn start() -> Option<Self> {
        // Both are free until they are let go of; nobody else is likely to take them within a moment.
        let free = [(); 2].map(|()| TcpListener::bind(("127.0.0.1", 0)).expect("a free port"));
        let [clients, others] = free.each_ref().map(|listener| listener.local_addr().expect("an address"));
        drop(free);
        Self::start_all(vec![Server { host: None, clients, others, process: None }])
    }

    /// The same on hosts of their own, each with one of its servers.
    ///
    /// # Panics
    /// As [`Etcd::start`].
    pub fn start_on<'h>(hosts: impl IntoIterator<Item = &'h Host>) -> Option<Self> {
        let server = |host: &Host| {
            let [clients, others] = PORTS.map(|port| (host.address(), port).into());
            Server { host: Some(host.clone()), clients, others, process: None }
        };
        Self::start_all(hosts.into_iter().map(server).collect())
    }

    fn start_all(servers: Vec<Server>) -> Option<Self> {
        let Some(program) = program() else {
            let told =
                writeln!(io::stderr(), "SKIPPED: there is no etcd on this machine (VMFORK_ETCD names one)");
            told.expect("standard error");
            return None;
        };
        let folder = TempDir::with_prefix("vmfork-test-").expect("a folder");
        let mut etcd = Self { program, folder, servers };
        etcd.restart();
        Some(etcd)
    }

    /// Where its first server is asked.
    pub fn address(&self) -> SocketAddr {
        self.servers[0].clients
    }

    /// Where all of its servers are asked, as platforms are told.
    pub fn addresses(&self) -> String {
        self.servers.iter().map(|server| server.clients.to_string()).collect::<Vec<_>>().join(",")
    }

    /// Ends it as a loss of power does.
    ///
    /// # Panics
    /// Where it can't be ended.
    pub fn kill(&mut self) {
        for mut process in self.servers.iter_mut().filter_map(|server| server.process.take()) {
            process.kill().and_then(|()| process.wait()).expect("an etcd that can be ended");
        }
    }

    /// Starts it again, with what it has on its disk.
    ///
    /// # Panics
    /// Where it can't be started.
    pub fn restart(&mut self) {
        for at in 0..self.servers.len() {
            self.servers[at].process = Some(self.spawn(at).expect("an etcd that can be started"));
        }
        (0..self.servers.len()).for_each(|at| self.wait(at));
    }

    /// Starts a server.
    fn spawn(&self, at: usize) -> io::Result<Child> {
        let Server { host, clients, others, .. } = &self.servers[at];
        let [clients, others] = [clients, others].map(|address| format!("http://{address}"));
        let all =
            self.servers.iter().enumerate().map(|(at, server)| format!("{at}=http://{}", server.others));
        let log = File::create(self.log(at))?;
        let mut command = network::command(host.as_ref(), &self.program);
        command
            .args(["--name", &at.to_string(), "--data-dir"])
            .arg(self.folder.path().join(format!("{at}.data")));
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &others, "--initial-advertise-peer-urls", &others]);
        command.args(["--initial-cluster", &all.collect::<Vec<_>>().join(",")]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
    }

    fn wait(&self, at: usize) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let log = fs::read_to_string(self.log(at)).unwrap_or_default();
            if log.contains(READY) {
                return;
            }
            assert!(Instant::now() < deadline, "etcd takes no connections: {log}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What a server says, since its last start.
    fn log(&self, at: usize) -> PathBuf {
        self.folder.path().join(format!("{at}.log"))
    }
}

/// The program, if there is one.
fn program() -> Option<PathBuf> {
    let on_path = || {
        let path = env::var_os("PATH")?;
        env::split_paths(&path).map(|folder| folder.join("etcd")).find(|program| program.is_file())
    };
    env::var_os("VMFORK_ETCD").map(PathBuf::from).or_else(on_path)
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
