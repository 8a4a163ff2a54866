//! How a platform of a cluster is set up: a file in TOML.
//!
//! `host-vmm/platform.example.toml` has every field. Paths in the file are relative to its folder. Whoever
//! writes it is trusted, but makes mistakes: each is told with the file's name, the field, what is wrong, and
//! what would be right.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use base::units;
use cluster::{
    membership::check,
    settings::{Etcd, Peer},
};
use serde::Deserialize;
use vmfork_abi::is_vm_type;

use crate::{Keep, Limit, others::Orders};

mod peers;

/// Most other platforms that a file can list.
pub const MAX_PEERS: usize = 256;

/// How long a platform may be silent before others take it for gone, in seconds.
const LEASE_SECONDS: u64 = 10;

/// The least that it can be, and the most. etcd keeps nothing for less than 2 s; beyond a minute, others
/// would go on sending VMs to a platform that is gone.
const LEASE_RANGE: std::ops::RangeInclusive<u64> = 3..=60;

/// Most VMs at a time, where the file does not say it; the same as of `host-vmm run`, as is what follows.
const MAX_VMS: usize = 1100;

/// Longest pause of a VM for a fork, in seconds.
const MAX_PAUSE_SECONDS: u64 = 10;

/// The least that it can be, and the most.
const MAX_PAUSE_RANGE: std::ops::RangeInclusive<u64> = 1..=600;

/// Warm VMs.
const READY: usize = 4;

/// Connections for the memory of one clone.
const CONNECTIONS: usize = 2;

/// The most that they can be.
const MAX_CONNECTIONS: usize = 64;

/// The least bandwidth of a clone in bytes a second: beneath it, a target would take a source that keeps to
/// it for gone.
const MIN_BANDWIDTH: u64 = 1 << 20;

/// Folder for the consoles' logs, in the working folder.
const LOG_DIR: &str = "host-vmm.logs";

/// What makes a name.
const NAME_RULE: &str = "1 to 32 characters of a-z, 0-9 and -, and no - at its ends";

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't be read.
    #[error("can't read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is no TOML, has a field that there is not, or one of another kind.
    #[error("{path} is not valid")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where, and why.
        source: Box<toml::de::Error>,
    },
    /// A field has a value that it can't have.
    #[error("{path}: {field}: {wrong}; {right}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong.
        wrong: String,
        /// What would be right.
        right: String,
    },
}

/// How a platform is set up.
#[derive(Debug, Clone, PartialEq)]
pub struct PlatformConfig {
    /// Its name, unique in its cluster.
    pub name: String,
    /// Where it serves the API for other platforms; `None`: for this host's users alone. Port 0 stands for
    /// any that is free.
    pub listen: Option<SocketAddr>,
    /// The certificates by which platforms know each other; `None`: plaintext, or no other platforms.
    pub tls: Option<Tls>,
    /// The socket for this host's users; `None`: [`api::default_socket`].
    pub api: Option<PathBuf>,
    /// Name of its cluster.
    pub cluster: String,
    /// The etcd by which the platforms of its cluster know each other.
    pub etcd: Option<Etcd>,
    /// Other platforms that are listed, of its cluster or another. This one may be among them.
    pub peers: Vec<Peer>,
    /// What the operator says of it.
    pub labels: BTreeMap<String, String>,
    /// Name of the CPU profile that its guests are shown; `None`: what its host has.
    pub cpu_profile: Option<String>,
    /// The file that holds it, where it is none of those that have a name everywhere.
    pub cpu_profile_file: Option<PathBuf>,
    /// How long it may be silent before others take it for gone.
    pub lease: Duration,
    /// Folder for the consoles' logs.
    pub log_dir: PathBuf,
    /// Where events are written, as JSON lines.
    pub events: Option<PathBuf>,
    /// Most VMs at a time.
    pub max_vms: usize,
    /// Longest pause of a VM for a fork.
    pub max_pause: Duration,
    /// How many warm VMs of each shape to keep ready.
    pub ready: usize,
    /// Whether copies make pages ready that others before them have written to.
    pub prefetch: bool,
    /// What VMs may do.
    pub limits: Vec<Limit>,
    /// Which images to keep.
    pub keep: Vec<Keep>,
    /// Most memory that images from elsewhere take, in bytes; `None`: half of its host's.
    pub image_memory: Option<u64>,
    /// How clones are sent, and who may order them.
    pub sending: Sending,
    /// Where copies go, as it stands in the file.
    pub placement: toml::Table,
}

/// How clones are sent to other platforms, and who may order them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sending {
    /// Whether copies of guests' forks run before all of their memory has come. They depend on this platform
    /// until it has.
    pub lazy: bool,
    /// Connections for the memory of one clone that is not lazy.
    pub connections: usize,
    /// Most bytes of memory that are sent within a second for one clone; 0: as many as possible.
    pub bandwidth: u64,
    /// Who may order them over the network.
    pub orders: Orders,
}

impl Default for Sending {
    fn default() -> Self {
        Self { lazy: false, connections: CONNECTIONS, bandwidth: 0, orders: Orders::default() }
    }
}

/// Files with certificates, in PEM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Certificates of those who vouch for platforms.
    pub ca: PathBuf,
    /// The platform's own certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// The fields as they stand in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Fields {
    name: Option<String>,
    listen: Option<String>,
    plaintext: bool,
    tls: Option<Tls>,
    api: Option<PathBuf>,
    cluster: Option<String>,
    etcd: Option<peers::EtcdFields>,
    peers: Vec<peers::PeerFields>,
    labels: BTreeMap<String, String>,
    cpu_profile: Option<String>,
    cpu_profile_file: Option<PathBuf>,
    lease_seconds: Option<u64>,
    log_dir: Option<PathBuf>,
    events: Option<PathBuf>,
    max_vms: Option<usize>,
    max_pause_seconds: Option<u64>,
    ready: Option<usize>,
    prefetch: Option<bool>,
    limits: Vec<String>,
    keep: Vec<String>,
    image_memory: Option<String>,
    clone: Sending,
    placement: toml::Table,
}

impl PlatformConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`Error`]: what is wrong with it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text =
            fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        // A host whose name can't be read needs one in the file, as one whose name can't be a platform's.
        let host_name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self::parse(&text, path, host_name.trim())
    }

    /// Takes what stands in the file `path`, on a host of this name.
    fn parse(text: &str, path: &Path, host_name: &str) -> Result<Self, Error> {
        let fields = toml::from_str(text);
        let fields: Fields =
            fields.map_err(|error| Error::Syntax { path: path.to_owned(), source: Box::new(error) })?;
        Checker { path, folder: path.parent().unwrap_or_else(|| Path::new("")) }.check(fields, host_name)
    }
}

/// Checks fields, and knows which file they are from.
#[derive(Debug, Clone, Copy)]
struct Checker<'a> {
    path: &'a Path,
    folder: &'a Path,
}

impl Checker<'_> {
    fn check(self, mut fields: Fields, host_name: &str) -> Result<PlatformConfig, Error> {
        let listen = self.listen(&fields)?;
        let (cluster, etcd) = self.cluster(fields.cluster.take(), fields.etcd.take())?;
        if etcd.is_some() && listen.is_none() {
            let right = "an address, such as listen = \"192.0.2.1:7070\"";
            return Err(self.wrong("listen", "a platform of a cluster must be reached by the others", right));
        }
        let peers = self.peers(std::mem::take(&mut fields.peers), &cluster)?;
        self.trust(&fields, listen, &peers)?;
        check::labels(&fields.labels).map_err(|error| self.wrong("labels", error, check::LABEL_RULE))?;
        let absolute = |path: PathBuf| self.folder.join(path);
        Ok(PlatformConfig {
            name: self.name(fields.name, host_name)?,
            listen,
            tls: fields.tls.map(|tls| Tls {
                ca: absolute(tls.ca),
                cert: absolute(tls.cert),
                key: absolute(tls.key),
            }),
            api: fields.api.map(absolute),
            cluster,
            etcd,
            peers,
            labels: fields.labels,
            cpu_profile: self.cpu_profile(fields.cpu_profile, fields.cpu_profile_file.is_some())?,
            cpu_profile_file: fields.cpu_profile_file.map(absolute),
            lease: self.seconds(
                "lease_seconds",
                fields.lease_seconds.unwrap_or(LEASE_SECONDS),
                LEASE_RANGE,
            )?,
            log_dir: fields.log_dir.map_or_else(|| LOG_DIR.into(), absolute),
            events: fields.events.map(absolute),
            max_vms: self.max_vms(fields.max_vms.unwrap_or(MAX_VMS))?,
            max_pause: self.seconds(
                "max_pause_seconds",
                fields.max_pause_seconds.unwrap_or(MAX_PAUSE_SECONDS),
                MAX_PAUSE_RANGE,
            )?,
            ready: fields.ready.unwrap_or(READY),
            prefetch: fields.prefetch.unwrap_or(true),
            limits: self.each(
                "limits",
                &fields.limits,
                "an entry such as \"web:children=8\", as --limit takes it",
            )?,
            keep: self.each("keep", &fields.keep, "an entry such as \"web:2\", as --keep takes it")?,
            image_memory: fields.image_memory.map(|text| self.image_memory(&text)).transpose()?,
            sending: self.sending(fields.clone)?,
            placement: fields.placement,
        })
    }

    fn wrong(self, field: impl Into<String>, wrong: impl fmt::Display, right: impl Into<String>) -> Error {
        Error::Field {
            path: self.path.to_owned(),
            field: field.into(),
            wrong: wrong.to_string(),
            right: right.into(),
        }
    }

    fn name(self, name: Option<String>, host_name: &str) -> Result<String, Error> {
        match name {
            Some(name) if is_vm_type(&name) => Ok(name),
            Some(name) => Err(self.wrong("name", format!("{name:?} is no name"), NAME_RULE)),
            None if is_vm_type(host_name) => Ok(host_name.to_owned()),
            None => {
                let wrong =
                    format!("it is not given, and this host's name, {host_name:?}, can't be a platform's");
                Err(self.wrong("name", wrong, NAME_RULE))
            }
        }
    }

    fn listen(self, fields: &Fields) -> Result<Option<SocketAddr>, Error> {
        let Some(text) = &fields.listen else { return Ok(None) };
        let address = self.address("listen", text)?;
        if address.ip().is_unspecified() {
            let wrong = format!("others are told {address}, and that leads nowhere");
            return Err(self.wrong("listen", wrong, "the address by which the others reach this host"));
        }
        Ok(Some(address))
    }

    /// An IP address and a port.
    fn address(self, field: impl Into<String>, text: &str) -> Result<SocketAddr, Error> {
        text.parse().map_err(|_| {
            let right = "an IP address and a port, such as 192.0.2.1:7070 or [2001:db8::1]:7070 (names can't be \
                         resolved: this program is statically linked)";
            self.wrong(field, format!("{text:?} is no address"), right)
        })
    }

    /// How this platform and others know whom they speak with: by certificates, or within this host by
    /// nothing.
    fn trust(self, fields: &Fields, listen: Option<SocketAddr>, peers: &[Peer]) -> Result<(), Error> {
        const FILES: &str = "tls = { ca = \"ca.pem\", cert = \"platform.pem\", key = \"platform.key\" }";
        let addresses = || listen.iter().chain(peers.iter().map(|peer| &peer.address));
        match (fields.plaintext, &fields.tls) {
            (true, Some(_)) => Err(self.wrong("plaintext", "it contradicts tls", "one of both")),
            (true, None) => match addresses().find(|address| !address.ip().is_loopback()) {
                Some(address) => {
                    let wrong = format!(
                        "{address} is reached by a network, where everybody could read guests' memory"
                    );
                    Err(self.wrong(
                        "plaintext",
                        wrong,
                        format!("an address such as 127.0.0.1:7070, or {FILES}"),
                    ))
                }
                None => Ok(()),
            },
            (false, None) if addresses().next().is_some() => {
                Err(self.wrong("tls", "other platforms could not be told from strangers", FILES))
            }
            (false, _) => Ok(()),
        }
    }

    fn cpu_profile(self, profile: Option<String>, has_file: bool) -> Result<Option<String>, Error> {
        match profile {
            None if has_file => Err(self.wrong(
                "cpu_profile_file",
                "its profile has no name",
                "cpu_profile with a name for others to ask for",
            )),
            Some(bad) if !check::is_label_name(&bad) => {
                Err(self.wrong("cpu_profile", format!("{bad:?} is no name of a profile"), check::LABEL_RULE))
            }
            profile => Ok(profile),
        }
    }

    /// A time in seconds that is within a range.
    fn seconds(
        self,
        field: &str,
        seconds: u64,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Duration, Error> {
        if range.contains(&seconds) {
            return Ok(Duration::from_secs(seconds));
        }
        let right = format!("from {} to {}", range.start(), range.end());
        Err(self.wrong(field, format!("{seconds} is out of range"), right))
    }

    fn sending(self, sending: Sending) -> Result<Sending, Error> {
        if !(1..=MAX_CONNECTIONS).contains(&sending.connections) {
            let wrong = format!("{} is out of range", sending.connections);
            return Err(self.wrong("clone.connections", wrong, format!("from 1 to {MAX_CONNECTIONS}")));
        }
        if (1..MIN_BANDWIDTH).contains(&sending.bandwidth) {
            let wrong = format!("{} is too little", sending.bandwidth);
            return Err(self.wrong("clone.bandwidth", wrong, format!("0, or {MIN_BANDWIDTH} and more")));
        }
        Ok(sending)
    }

    fn max_vms(self, max_vms: usize) -> Result<usize, Error> {
        if max_vms > 0 {
            Ok(max_vms)
        } else {
            Err(self.wrong("max_vms", "0 leaves no room for any VM", "1 or more"))
        }
    }

    fn image_memory(self, text: &str) -> Result<u64, Error> {
        let right = "bytes, or a number with K, M or G, such as \"8G\"";
        units::size(text).ok_or_else(|| self.wrong("image_memory", format!("{text:?} is no size"), right))
    }

    /// The entries of an array that are written as on the command line.
    fn each<T: FromStr<Err = String>>(
        self,
        field: &str,
        texts: &[String],
        right: &str,
    ) -> Result<Vec<T>, Error> {
        let parse = |(at, text): (usize, &String)| {
            text.parse()
                .map_err(|wrong| self.wrong(format!("{field}[{at}]"), format!("{text:?}: {wrong}"), right))
        };
        texts.iter().enumerate().map(parse).collect()
    }
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
