//! How the other platforms are found: plain values, which a configuration gives.

use std::{net::SocketAddr, path::PathBuf};

/// How to reach an etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Etcd {
    /// Its servers, at least one.
    pub servers: Vec<SocketAddr>,
    /// The certificates; `None`: plaintext.
    pub tls: Option<EtcdTls>,
}

/// Files by which a platform and an etcd know each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// Certificates of those who vouch for the servers, in PEM.
    pub ca: PathBuf,
    /// The platform's certificate and its key, in PEM, where the servers ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Who the platform is to etcd, where that asks for it.
    pub login: Option<Login>,
}

/// A user of an etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// Name.
    pub user: String,
    /// File with the password; a newline at its end is not part of it.
    pub password_file: PathBuf,
}

/// Another platform that is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Name of its cluster.
    pub cluster: String,
    /// Where it serves the API for other platforms.
    pub address: SocketAddr,
}
