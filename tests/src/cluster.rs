//! Several platforms, as `host-vmm` is told of them.

use std::{
    fmt::Display,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::{assets, network::Network};

/// Where a platform listens that has a host of its own.
const PORT: u16 = 7070;

/// How long a VM may stand still for a fork, where a test does not say it.
const MAX_PAUSE: &str = "max_pause_seconds = 120\n";

/// Platforms, where each of them listens, and the folder with their certificates, if they have some.
#[derive(Debug)]
pub struct Platforms(Vec<(&'static str, SocketAddr)>, Option<TempDir>);

impl Platforms {
    /// So called, over loopback addresses, that know each other by certificates of a CA of their own.
    ///
    /// # Panics
    /// Where there are no ports left, or no certificates can be made.
    pub fn with_certificates(names: &[&'static str]) -> Self {
        Self::new(names).with_own_ca()
    }

    /// Those of a network, each on its own host, that know each other by certificates of a CA of their own.
    ///
    /// # Panics
    /// Where there are no such hosts, or no certificates can be made.
    pub fn on(network: &Network, names: &[&'static str]) -> Self {
        let address = |name| SocketAddr::from((network.host(name).address(), PORT));
        Self(names.iter().map(|name| (*name, address(name))).collect(), None).with_own_ca()
    }

    /// The same, at the same addresses, with certificates of another CA.
    ///
    /// # Panics
    /// Where no certificates can be made.
    #[must_use]
    pub fn with_own_ca(&self) -> Self {
        let folder = TempDir::with_prefix("vmfork-test-").expect("a folder");
        cert(&folder, &["init"]);
        self.0.iter().for_each(|(name, _)| cert(&folder, &["issue", name]));
        Self(self.0.clone(), Some(folder))
    }

    /// Issues an operator's certificate, and gives its file without the ending, as `--as` takes it.
    ///
    /// # Panics
    /// Where none can be made, or there are no certificates here.
    pub fn operator(&self, name: &str) -> PathBuf {
        let folder = self.1.as_ref().expect("platforms with certificates");
        cert(folder, &["issue", name, "--operator"]);
        folder.path().join(name)
    }

    /// What a command of `host-vmm` prints that asks one of them over the network, by this certificate.
    ///
    /// # Errors
    /// Where it fails.
    pub fn ask(&self, name: &str, certificate: &Path, command: &[&str]) -> anyhow::Result<String> {
        let at = format!("{name}@{}", self.address(name));
        let mut program = Command::new(assets::path("bin/host-vmm"));
        let output = program.args(command).args(["--at", &at]).arg("--as").arg(certificate).output()?;
        anyhow::ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// So called, over loopback addresses, without certificates.
    ///
    /// # Panics
    /// Where there are no ports left.
    pub fn new(names: &[&'static str]) -> Self {
        // All at once, so that they get different ones.
        let free: Vec<_> =
            names.iter().map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a free port")).collect();
        let addresses = free.iter().map(|listener| listener.local_addr().expect("a listener has an address"));
        Self(names.iter().copied().zip(addresses).collect(), None)
    }

    /// The address of one.
    ///
    /// # Panics
    /// Where there is none of that name.
    pub fn address(&self, name: &str) -> SocketAddr {
        self.0.iter().find(|(known, _)| *known == name).expect("a platform").1
    }

    /// The files of the CA's certificate, and of a platform's certificate and key, where it has them.
    pub fn files(&self, name: &str) -> Option<[PathBuf; 3]> {
        let folder = self.1.as_ref()?.path();
        Some(
            ["ca.pem".to_owned(), format!("{name}.pem"), format!("{name}.key")].map(|file| folder.join(file)),
        )
    }

    /// The configuration of one, and more that is to stand in it.
    pub fn config(&self, name: &str, more: &str) -> String {
        self.config_by_way(name, None, more)
    }

    /// The same, where one of the others is to be reached by another way.
    pub fn config_by_way(&self, name: &str, way: Option<(&str, SocketAddr)>, more: &str) -> String {
        let peers = self.0.iter().map(|(peer, address)| {
            let address = way.filter(|(to, _)| to == peer).map_or(*address, |(_, way)| way);
            format!("{{ name = \"{peer}\", address = \"{address}\" }}")
        });
        let peers = peers.collect::<Vec<_>>().join(", ");
        self.of(name, &format!("peers = [{peers}]\n{more}"))
    }

    /// That of one which knows the others by an etcd at this address, or these, with commas between them.
    pub fn config_by_etcd(&self, name: &str, etcd: impl Display, more: &str) -> String {
        self.of(name, &format!("cluster = \"etcd://{etcd}/test\"\nlease_seconds = 3\n{more}"))
    }

    fn of(&self, name: &str, more: &str) -> String {
        let trust = match self.files(name) {
            Some(files) => {
                let [ca, cert, key] = files.map(|file| file.display().to_string());
                format!("tls = {{ ca = \"{ca}\", cert = \"{cert}\", key = \"{key}\" }}")
            }
            None => "plaintext = true".to_owned(),
        };
        // Few are ready, for several platforms share this host; tests that count processes want none.
        let ready = if more.contains("ready = ") { "" } else { "ready = 2\n" };
        // On a busy machine, what is right may take long.
        let pause = if more.contains("max_pause_seconds = ") { "" } else { MAX_PAUSE };
        format!("name = \"{name}\"\nlisten = \"{}\"\n{trust}\n{ready}{pause}{more}", self.address(name))
    }
}

fn cert(folder: &TempDir, arguments: &[&str]) {
    let mut command = Command::new(assets::path("bin/host-vmm"));
    let done =
        command.arg("cert").args(arguments).arg("--dir").arg(folder.path()).output().expect("host-vmm cert");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}
