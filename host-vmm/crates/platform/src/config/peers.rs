//! The fields about other platforms.

use std::{collections::BTreeSet, net::SocketAddr, path::PathBuf};

use cluster::{
    membership::check::is_reachable,
    settings::{Etcd, EtcdTls, Login, Peer},
};
use serde::Deserialize;
use vmfork_abi::is_vm_type;

use super::{Checker, Error, MAX_PEERS, NAME_RULE};

/// Name of the cluster of a platform whose file names none.
const DEFAULT_CLUSTER: &str = "default";

/// What a cluster begins with that is kept by etcd.
const ETCD: &str = "etcd://";

/// Most servers of an etcd that a file can name.
const MAX_SERVERS: usize = 8;

/// `etcd` as it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EtcdFields {
    ca: PathBuf,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
}

/// One of `peers` as it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PeerFields {
    name: String,
    address: String,
    cluster: Option<String>,
}

impl Checker<'_> {
    /// The cluster's name, and the etcd that keeps it.
    pub(super) fn cluster(
        self,
        cluster: Option<String>,
        etcd: Option<EtcdFields>,
    ) -> Result<(String, Option<Etcd>), Error> {
        const RIGHT: &str = "a name, or etcd://HOST:PORT,HOST:PORT/NAME";
        let cluster = cluster.unwrap_or_else(|| DEFAULT_CLUSTER.to_owned());
        let wrong = |wrong: String| self.wrong("cluster", wrong, RIGHT);
        let name = |name: &str| {
            let named = is_vm_type(name).then(|| name.to_owned());
            named.ok_or_else(|| self.wrong("cluster", format!("{name:?} is no name"), NAME_RULE))
        };
        let Some(rest) = cluster.strip_prefix(ETCD) else {
            if cluster.contains("://") {
                return Err(wrong(format!("{cluster:?} is of a kind that this program does not know")));
            }
            if etcd.is_some() {
                return Err(self.wrong(
                    "etcd",
                    "the cluster is not kept by an etcd",
                    "etcd://HOST:PORT/NAME as cluster",
                ));
            }
            return Ok((name(&cluster)?, None));
        };
        let split = rest.split_once('/');
        let (servers, of_cluster) = split.ok_or_else(|| wrong(format!("{cluster:?} names no cluster")))?;
        let servers = servers.split(',').map(|server| self.server(server)).collect::<Result<Vec<_>, _>>()?;
        if servers.len() > MAX_SERVERS {
            return Err(wrong(format!("it has {} servers; at most {MAX_SERVERS} are taken", servers.len())));
        }
        Ok((
            name(of_cluster)?,
            Some(Etcd { servers, tls: etcd.map(|fields| self.etcd_tls(fields)).transpose()? }),
        ))
    }

    fn server(self, text: &str) -> Result<SocketAddr, Error> {
        let server = self.address("cluster", text)?;
        if is_reachable(server) {
            Ok(server)
        } else {
            Err(self.wrong("cluster", format!("{server} leads nowhere"), "the address of a server of etcd"))
        }
    }

    fn etcd_tls(self, fields: EtcdFields) -> Result<EtcdTls, Error> {
        let absolute = |path: PathBuf| self.folder.join(path);
        let identity = match (fields.cert, fields.key) {
            (Some(cert), Some(key)) => Some((absolute(cert), absolute(key))),
            (None, None) => None,
            _ => return Err(self.wrong("etcd", "one of cert and key is not given", "both, or neither")),
        };
        let login = match (fields.user, fields.password_file) {
            (Some(user), Some(file)) => Some(Login { user, password_file: absolute(file) }),
            (None, None) => None,
            _ => {
                return Err(self.wrong(
                    "etcd",
                    "one of user and password_file is not given",
                    "both, or neither",
                ));
            }
        };
        Ok(EtcdTls { ca: absolute(fields.ca), identity, login })
    }

    /// Other platforms; those that name no cluster are of this one.
    pub(super) fn peers(self, peers: Vec<PeerFields>, cluster: &str) -> Result<Vec<Peer>, Error> {
        if peers.len() > MAX_PEERS {
            let right = format!("at most {MAX_PEERS}, or a cluster that is kept by an etcd");
            return Err(self.wrong("peers", format!("there are {} of them", peers.len()), right));
        }
        let mut names = BTreeSet::new();
        let check = |(at, fields): (usize, PeerFields)| {
            let peer = self.peer(at, fields, cluster)?;
            if names.insert((peer.cluster.clone(), peer.name.clone())) {
                return Ok(peer);
            }
            let wrong = format!("{} is in the list already, for {}", peer.name, peer.cluster);
            Err(self.wrong(format!("peers[{at}].name"), wrong, "one entry for each platform"))
        };
        peers.into_iter().enumerate().map(check).collect()
    }

    fn peer(self, at: usize, fields: PeerFields, own_cluster: &str) -> Result<Peer, Error> {
        let PeerFields { name, address, cluster } = fields;
        let cluster = cluster.unwrap_or_else(|| own_cluster.to_owned());
        for (field, name) in [("name", &name), ("cluster", &cluster)] {
            if !is_vm_type(name) {
                return Err(self.wrong(
                    format!("peers[{at}].{field}"),
                    format!("{name:?} is no name"),
                    NAME_RULE,
                ));
            }
        }
        let field = format!("peers[{at}].address");
        let address = self.address(field.as_str(), &address)?;
        if !is_reachable(address) {
            return Err(self.wrong(field, format!("{address} leads nowhere"), "where that platform listens"));
        }
        Ok(Peer { name, cluster, address })
    }
}
