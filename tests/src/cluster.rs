//! Several platforms on one host, as `host-vmm` is told of them.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    process::Command,
};

use tempfile::TempDir;

use crate::assets;

/// Platforms that know each other by a list, over loopback addresses, and the folder with their certificates, if they have some.
#[derive(Debug)]
pub struct Platforms(Vec<(&'static str, SocketAddr)>, Option<TempDir>);

impl Platforms {
    /// So called, that know each other by certificates of a CA of their own.
    ///
    /// # Panics
    /// Where there are no ports left, or no certificates can be made.
    pub fn with_certificates(names: &[&'static str]) -> Self {
        let folder = TempDir::with_prefix("vmfork-test-").expect("a folder");
        let cert = |arguments: &[&str]| {
            let mut command = Command::new(assets::path("bin/host-vmm"));
            let done =
                command.arg("cert").args(arguments).arg("--dir").arg(folder.path()).output().expect("host-vmm cert");
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        cert(&["init"]);
        names.iter().for_each(|name| cert(&["issue", name]));
        Self(Self::new(names).0, Some(folder))
    }

    /// So called, without certificates.
    ///
    /// # Panics
    /// Where there are no ports left.
    pub fn new(names: &[&'static str]) -> Self {
        // All at once, so that they get different ones.
        let free: Vec<_> = names.iter().map(|_| TcpListener::bind(("127.0.0.1", 0)).expect("a free port")).collect();
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
        Some(["ca.pem".to_owned(), format!("{name}.pem"), format!("{name}.key")].map(|file| folder.join(file)))
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
        let trust = match self.files(name) {
            Some(files) => {
                let [ca, cert, key] = files.map(|file| file.display().to_string());
                format!("tls = {{ ca = \"{ca}\", cert = \"{cert}\", key = \"{key}\" }}")
            }
            None => "plaintext = true".to_owned(),
        };
        format!("name = \"{name}\"\nlisten = \"{}\"\n{trust}\nready = 2\npeers = [{peers}]\n{more}", self.address(name))
    }
}
