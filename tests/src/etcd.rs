//! An etcd for tests: the program that `VMFORK_ETCD` names, or else the one on the PATH.

use std::{
    env,
    fs::File,
    io::{self, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::vmm::PATIENCE;

/// One server. Dropping it ends it.
#[derive(Debug)]
pub struct Etcd {
    folder: TempDir,
    clients: SocketAddr,
    /// For other servers, of which there are none.
    servers: SocketAddr,
    process: Option<Child>,
}

impl Etcd {
    /// Starts one, and waits until it takes connections; `None` where there is none on this machine, which is told past what tests capture.
    ///
    /// # Panics
    /// Where it can't be started.
    pub fn start() -> Option<Self> {
        // Both are free until they are let go of; nobody else is likely to take them within a moment.
        let free = [(); 2].map(|()| TcpListener::bind(("127.0.0.1", 0)).expect("a free port"));
        let [clients, servers] = free.each_ref().map(|listener| listener.local_addr().expect("an address"));
        let folder = TempDir::with_prefix("vmfork-test-").expect("a folder");
        drop(free);
        let mut etcd = Self { folder, clients, servers, process: None };
        match etcd.spawn() {
            Ok(process) => etcd.process = Some(process),
            Err(error) if error.kind() == io::ErrorKind::NotFound && env::var_os("VMFORK_ETCD").is_none() => {
                let told = writeln!(io::stderr(), "SKIPPED: there is no etcd on this machine (VMFORK_ETCD names one)");
                told.expect("standard error");
                return None;
            }
            Err(error) => panic!("etcd can't be started: {error}"),
        }
        etcd.wait();
        Some(etcd)
    }

    fn spawn(&self) -> io::Result<Child> {
        let program = env::var_os("VMFORK_ETCD").unwrap_or_else(|| "etcd".into());
        let log = File::options().create(true).append(true).open(self.folder.path().join("log"))?;
        let [clients, servers] = [self.clients, self.servers].map(|address| format!("http://{address}"));
        let mut command = Command::new(program);
        command.args(["--name", "test", "--data-dir"]).arg(self.folder.path().join("data"));
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &servers, "--initial-advertise-peer-urls", &servers]);
        command.args(["--initial-cluster", &format!("test={servers}")]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
    }

    fn wait(&self) {
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(self.clients).is_err() {
            assert!(Instant::now() < deadline, "etcd takes no connections");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where it is asked.
    pub fn address(&self) -> SocketAddr {
        self.clients
    }

    /// Ends it as a loss of power does.
    ///
    /// # Panics
    /// Where it can't be ended.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().and_then(|()| process.wait()).expect("an etcd that can be ended");
        }
    }

    /// Starts it again, with what it has on its disk.
    ///
    /// # Panics
    /// Where it can't be started.
    pub fn restart(&mut self) {
        self.process = Some(self.spawn().expect("an etcd"));
        self.wait();
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}
