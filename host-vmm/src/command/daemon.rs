//! A platform with its API, and its place among others: what `host-vmm run` and `host-vmm serve` have in
//! common.

use std::{
    fs::{self, File},
    io::stdin,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, Weak},
    thread,
    time::Duration,
};

use anyhow::Context;
use api::{
    self,
    client::{Connection, Connections, Content, Endpoint},
};
use base::{descriptors, error::chain};
use cluster::{
    load,
    member::{Load, Member},
    membership::{self, Directory, check},
    placement::Rules,
    principal::{Principal, Role},
    settings::Peer,
    tls::Credentials,
};
use hyper::Method;
use nix::sys::signal::{SigSet, Signal};
use platform::{
    Platform, Settings,
    config::{PlatformConfig, Sending},
    others::{Cluster, SendSettings},
    server::{self, Network, Server},
};
use vmm::{
    arch::profile::{Profile, Subset},
    kvm::Hypervisor,
};

/// Files that a platform has open for each VM: its connection, its console, its process, its log, and what
/// its next fork will come with, which is more for a late generation.
const FILES_PER_VM: usize = 10;

/// Files that it has room for in any case.
const MIN_FILES: u64 = 256;

/// How long a platform that is listed has to say that it is there.
const ANSWER: Duration = Duration::from_secs(3);

/// A platform that others can ask.
#[derive(Debug)]
pub(super) struct Daemon {
    pub(super) platform: Arc<Platform>,
    /// Dropped when nothing is to be asked any more.
    pub(super) server: Option<Server>,
}

impl Daemon {
    /// Starts one. Where there is a configuration, it takes its place among others.
    pub(super) fn start(
        settings: Settings,
        socket: Option<&Path>,
        config: Option<&PlatformConfig>,
    ) -> anyhow::Result<Self> {
        make_room(settings.max_vms)?;
        let platform = Platform::new(settings)?;
        let credentials = config.and_then(|config| config.tls.as_ref());
        let credentials =
            credentials.map(|tls| Credentials::load(&tls.ca, &tls.cert, &tls.key)).transpose()?;
        if let (Some(config), Some(credentials)) = (config, &credentials) {
            check_principal(credentials.principal(), &config.name)?;
        }
        let network = config.and_then(|config| config.listen).map(|address| match &credentials {
            Some(credentials) => Network::Tls(address, credentials.clone()),
            None => Network::Plain(address),
        });
        let server = serve_api(&platform, socket, network.as_ref())?;
        if let Some(config) = config {
            let address = server.as_ref().and_then(Server::address);
            platform.join(join(&platform, config, address, credentials)?);
        }
        Ok(Self { platform, server })
    }
}

/// Checks whether a certificate is that of the platform: nobody would believe it else.
fn check_principal(principal: &Principal, name: &str) -> anyhow::Result<()> {
    let is_own = principal.role() == Role::Platform && principal.name() == name;
    anyhow::ensure!(
        is_own,
        "the certificate in tls.cert is that of {principal}, and this platform is called {name}: give it another name or certificate"
    );
    Ok(())
}

/// Serves the API. Where nobody has named a socket for it, or wants it for others, VMs run without it too.
fn serve_api(
    platform: &Arc<Platform>,
    socket: Option<&Path>,
    network: Option<&Network>,
) -> anyhow::Result<Option<Server>> {
    if let Some(path) = socket {
        return Ok(Some(server::serve(platform, path, network)?));
    }
    let served = api::default_socket().context("can't find a place for the API's socket");
    let served = served.and_then(|path| Ok(server::serve(platform, &path, network)?));
    if network.is_some() {
        return served.map(Some);
    }
    Ok(served
        .inspect_err(|error| tracing::warn!("no API: `host-vmm ps` will not find these VMs: {error:#}"))
        .ok())
}

/// Finds the others.
fn join(
    platform: &Arc<Platform>,
    config: &PlatformConfig,
    address: Option<SocketAddr>,
    credentials: Option<Credentials>,
) -> anyhow::Result<Cluster> {
    let rules: Rules = config.placement.clone().try_into().context("the field placement is not valid")?;
    let member = Member {
        name: config.name.clone(),
        cluster: config.cluster.clone(),
        // Nobody asks one that serves nothing to others.
        address: address.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0))),
        labels: config.labels.clone(),
        cpu_profile: config.cpu_profile.clone().unwrap_or_default(),
        load: Load::default(),
    };
    let weak: Weak<Platform> = Arc::downgrade(platform);
    let own: Arc<membership::SelfReport> = Arc::new(move || {
        let load = load::read().unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "other platforms are not told what this host has left");
            Load::default()
        });
        let load = weak
            .upgrade()
            .map_or(Load { draining: true, ..Load::default() }, |platform| platform.fill_in(load));
        Member { load, ..member.clone() }
    });
    let connections = Connections::default();
    let ask = {
        let (credentials, connections) = (credentials.clone(), connections.clone());
        move |peer: &Peer| {
            let endpoint = Endpoint::of_platform(&peer.name, peer.address, credentials.as_ref());
            let ask =
                |connection: &mut Connection| connection.ask(Method::GET, "/v1/platform", Content::none());
            Ok(check::parse(&connections.client(endpoint, ANSWER).ask(ask)?)?)
        }
    };
    let directory = Directory::start(membership::Settings {
        own: Arc::clone(&own),
        lease: config.lease,
        etcd: config.etcd.clone(),
        peers: config.peers.clone(),
        ask: Arc::new(ask),
    })?;
    let Sending { lazy, connections: at_once, bandwidth, orders } = config.sending;
    let bandwidth = Some(bandwidth).filter(|bandwidth| *bandwidth > 0);
    let sending = SendSettings { connections: at_once, bandwidth, lazy };
    let (name, recent) = (config.name.clone(), Mutex::default());
    Ok(Cluster { name, directory, own, credentials, rules, recent, sending, orders, connections })
}

/// Makes room for the files that so many VMs need.
fn make_room(max_vms: usize) -> anyhow::Result<()> {
    let limit = descriptors::raise_limit().context("can't raise the limit of open files")?;
    let wanted = max_vms.saturating_mul(FILES_PER_VM) as u64;
    descriptors::make_room(&stdin(), wanted.max(MIN_FILES).min(limit))
        .context("can't make room for open files")
}

/// Has all threads to come leave the signals to the one that waits for them.
pub(super) fn block_signals() -> anyhow::Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM]);
    signals.thread_block().context("can't block signals")?;
    Ok(signals)
}

/// Waits for a signal, on a thread of its own, and gives it to `stop`.
pub(super) fn on_signal(signals: SigSet, stop: impl FnOnce(Signal) + Send + 'static) -> anyhow::Result<()> {
    let wait = move || match signals.wait() {
        Ok(signal) => stop(signal),
        Err(errno) => tracing::error!(%errno, "signals can't be waited for"),
    };
    thread::Builder::new().name("signals".into()).spawn(wait).context("can't start a thread")?;
    Ok(())
}

/// Opens a file to be written anew.
pub(super) fn create(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("can't create {}", path.display()))
}

fn profile(config: &PlatformConfig) -> anyhow::Result<Profile> {
    if let Some(path) = &config.cpu_profile_file {
        let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
        let subset = Subset::from_json(&text).with_context(|| path.display().to_string())?;
        return Ok(Profile::Common(subset));
    }
    let Some(name) = &config.cpu_profile else { return Ok(Profile::Host) };
    let names = || Profile::names().collect::<Vec<_>>().join(", ");
    Profile::named(name).with_context(|| format!("the field cpu_profile: {name:?} is none of {}", names()))
}

/// The profile as text. Where it does not fit this host, that is told before anything is started.
pub(super) fn check_profile(profile: &Profile) -> anyhow::Result<String> {
    if *profile != Profile::Host {
        profile.apply(&Hypervisor::open()?.supported_cpuid()?)?;
    }
    Ok(profile.to_text()?)
}

/// How a platform is set up by its configuration.
pub(super) fn settings(config: &PlatformConfig) -> anyhow::Result<Settings> {
    Ok(Settings {
        log_dir: config.log_dir.clone(),
        events: config.events.as_deref().map(create).transpose()?,
        trace: None,
        max_vms: config.max_vms,
        max_pause: config.max_pause,
        ready: config.ready,
        cpu_profile: check_profile(&profile(config)?)?,
        prefetches: config.prefetch,
        limits: config.limits.clone(),
        keep: config.keep.clone(),
        image_memory: config.image_memory,
    })
}
