//! One host's platform: it starts and watches the nodes, launches the children of forks, and has the
//! consoles.
//!
//! A thread serves each node ([`node_server`]); one has all consoles ([`console`]); one keeps warm VMs ready
//! ([`warm_pool`]). What they share is the [`Registry`]. In reading order:
//!
//! - this file: [`Platform`], what it is set up with, and why it refuses something.
//! - `process`, `warm_pool`: the zygote and the nodes that come from it, before they have an order.
//! - `node_server`, `registry`, `console`, `logs`, `terminal`: VMs that there are.
//! - `fork`, `launcher`, `working_sets`: their forks, and copies that are launched.
//! - `images`, `seals`: what forks leave, kept or not.
//! - [`clone`]: copies that come from other platforms, and go there.
//! - [`others`]: the platform's place among others.
//! - `limits`, `events`, `trace`, `vms`: what VMs may do, and what is told of them.
//! - [`config`]: how a platform of a cluster is set up.
//! - [`server`]: the API.
//!
//! Six of them use each other in a circle: a node's fork is served by `node_server`, which hands it to
//! `fork`, whose copies `launcher` makes nodes of again, for `images` and [`clone`] too; and all have methods
//! on [`Platform`]. The circle ends where launcher and fork are services that know no [`Platform`].

#![forbid(unsafe_code)]

use std::{
    fs::File,
    io,
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, mpsc},
    time::{Duration, Instant},
};

use api::client;
use base::{sync::lock, text::Reason};
use capsule::{self, Digests, compat::HostCapabilities};
use cluster::placement::Unplaceable;
use node::{
    fork::rendezvous,
    wire::{ToNode, link},
};
use types::{ExitReason, ForkStep, VmIdentity, VmShape, new_id};
use vmfork_abi::ErrorCode;
use vmm::{
    kvm,
    memory::{Budget, budget},
};

pub mod clone;
pub mod config;
mod console;
mod events;
mod fork;
mod images;
mod launcher;
mod limits;
mod logs;
mod node_server;
pub mod others;
mod process;
mod registry;
mod seals;
pub mod server;
mod terminal;
mod trace;
mod vms;
mod warm_pool;
mod working_sets;

pub use console::ConsoleInput;
pub use fork::Target;
pub use images::Keep;
pub use launcher::Copies;
pub use limits::{Limit, Limited};
pub use registry::Reservation;
pub use terminal::{Terminal, read_keys};

use clone::{Clones, outgoing::Transfers, page_server::PageServers, postcopy, source};
use console::Consoles;
use events::{Event, Events};
use fork::operator;
use images::Images;
use limits::Limits;
use node_server::{LaunchWaiter, Node};
use others::Cluster;
use registry::Registry;
use seals::Seals;
use trace::Trace;
use warm_pool::WarmPool;

/// How long a platform that comes to its end waits for those who follow logs.
const LAST_READERS: Duration = Duration::from_secs(5);

/// How long standard output, events and trace together are waited for then, where one stands still: long
/// enough for a busy machine to write the rest.
const LAST_OUTPUT: Duration = Duration::from_secs(4);

/// How a platform is set up.
#[derive(Debug)]
pub struct Settings {
    /// Folder for the consoles' logs.
    pub log_dir: PathBuf,
    /// Where events are written, as JSON lines.
    pub events: Option<File>,
    /// Where the timelines of forks are written, for Perfetto's viewer.
    pub trace: Option<File>,
    /// Most VMs at a time.
    pub max_vms: usize,
    /// Longest pause of a VM for a fork.
    pub max_pause: Duration,
    /// How many warm VMs of each shape to keep ready.
    pub ready: usize,
    /// CPU that guests are shown, as [`Profile::to_text`](vmm::arch::profile::Profile::to_text) has it.
    pub cpu_profile: String,
    /// Whether copies make pages ready that others before them have written to.
    pub prefetches: bool,
    /// What VMs may do.
    pub limits: Vec<Limit>,
    /// Which images to keep.
    pub keep: Vec<Keep>,
    /// Most memory that images from elsewhere take, in bytes; `None`: half of the host's.
    pub image_memory: Option<u64>,
}

/// The VM that a platform boots.
#[derive(Debug)]
pub struct Boot {
    /// The machine.
    pub config: VmShape,
    /// Take all of its memory from the host at once.
    pub prealloc: bool,
    /// Name of the VM, which is its type too.
    pub name: String,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Steps at which its forks are to fail, one for each fork, in order.
    pub faults: Vec<ForkStep>,
}

/// What can go wrong with the platform itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder for the logs can't be made.
    #[error("can't make the folder {path} for console logs")]
    Log {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A node could not be started.
    #[error("can't start a node")]
    Start(#[source] io::Error),
    /// The process that starts nodes does not answer.
    #[error("the zygote, from which nodes are started, failed")]
    Zygote(#[source] link::Error),
    /// A fork came without the file in which parent and children meet.
    #[error("a fork came without a rendezvous")]
    NoRendezvous,
    /// Parent and children can't meet.
    #[error("parent and children can't meet")]
    Rendezvous(#[from] rendezvous::Error),
    /// A node does not answer as it should.
    #[error("the node of {name} failed")]
    Node {
        /// Name of its VM.
        name: String,
        /// What went wrong.
        source: link::Error,
    },
    /// A node could not build its machine.
    #[error("{name} can't be launched: {why}")]
    Launch {
        /// Name of the VM.
        name: String,
        /// The node's reason.
        why: Reason,
    },
    /// There is no room for more VMs.
    #[error("{wanted} more VMs do not fit: {running} of at most {max} are there, or about to be")]
    Full {
        /// How many were asked for.
        wanted: usize,
        /// How many there are, with those for which room is kept.
        running: usize,
        /// The limit.
        max: usize,
    },
    /// There is no such image.
    #[error("there is no image whose ID begins with {0:?}")]
    NoImage(String),
    /// There are several.
    #[error("the IDs of several images begin with {0:?}")]
    Ambiguous(String),
    /// There is no such VM.
    #[error("there is no VM whose name is {0:?}, or whose ID begins so")]
    NoVm(String),
    /// There are several.
    #[error("the IDs of several VMs begin with {0:?}")]
    AmbiguousVm(String),
    /// A VM does not end.
    #[error("the VM {0} is being stopped, and has not ended yet: look for it again later")]
    Lingers(uuid::Uuid),
    /// A VM was not forked for an operator.
    #[error("the VM {vm} was not forked: {why}{}", operator::advice(*code))]
    NotForked {
        /// The VM, as the operator has called it.
        vm: String,
        /// What a guest would be told.
        code: ErrorCode,
        /// The reason.
        why: Reason,
    },
    /// Copies of a fork are gone before they were seen to run, or nobody can tell whether they run.
    #[error(
        "the VM {vm} was forked, and of {count} copies {running} run{}: `host-vmm ps` lists them, where they are",
        operator::unknown(*unknown)
    )]
    Lost {
        /// The VM, as the operator has called it.
        vm: String,
        /// How many copies were made.
        count: u32,
        /// How many of them run.
        running: usize,
        /// Of how many it is not known whether they do.
        unknown: usize,
    },
    /// A VM does not say what has come of a fork.
    #[error(
        "the VM {0} has not said whether it was forked: `host-vmm ps` lists its copies, if there are any"
    )]
    NoAnswer(uuid::Uuid),
    /// The log of a console can't be read.
    #[error("can't read the console log of the VM {vm}")]
    ReadLog {
        /// Its ID.
        vm: uuid::Uuid,
        /// The system's reason.
        source: io::Error,
    },
    /// A layer of an image can't be looked at.
    #[error("can't look at a layer of an image")]
    Layer(#[source] io::Error),
    /// An image can't be saved or loaded.
    #[error("can't use {path}")]
    ImageFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: capsule::Error,
    },
    /// An image can't be put into a capsule, or taken out of one.
    #[error("can't use a capsule")]
    Capsule(#[source] capsule::Error),
    /// No platforms have room for copies, or may take them.
    #[error(transparent)]
    Place(Box<Unplaceable>),
    /// There are no others.
    #[error("copies are to go to other platforms, and this one is in no cluster")]
    Alone,
    /// Another platform is not known.
    #[error(transparent)]
    Cluster(others::Error),
    /// Copies can't be sent.
    #[error("can't send copies to the platform {platform}")]
    Send {
        /// Where to.
        platform: String,
        /// Why.
        source: Box<source::Error>,
    },
    /// Another platform was asked to send copies of what it has, and does not do it, or does not say so.
    #[error("the platform {platform} was asked to send copies{}", operator::doubt(source))]
    PassedOn {
        /// Its name.
        platform: String,
        /// Why.
        source: client::Error,
    },
    /// A clone's memory can't be filled while it runs.
    #[error("can't fill a clone's memory while it runs")]
    Postcopy(#[source] postcopy::Error),
    /// KVM can't be asked what it has.
    #[error("can't find out what this host has for VMs from elsewhere")]
    Host(#[source] kvm::Error),
    /// An image is kept already.
    #[error("the image {0} is kept already, or the platform is being stopped")]
    Kept(uuid::Uuid),
    /// Copies of an image could not be launched.
    #[error("no copies were launched: {0}")]
    Spawn(Reason),
    /// The operator does not allow it.
    #[error("{limited} of the type {vm_type} is limited to {most}, and this fork would make it {wanted}")]
    Limit {
        /// The type.
        vm_type: String,
        /// What is limited.
        limited: Limited,
        /// What the fork would come to.
        wanted: u64,
        /// What is allowed.
        most: u64,
    },
    /// No ID could be drawn.
    #[error("the system has no random bytes for an ID")]
    Id(#[source] io::Error),
    /// A loaded image needs what this host does not have.
    #[error("can't use {path}")]
    Unfit {
        /// The file.
        path: PathBuf,
        /// What is different.
        source: capsule::Incompatible,
    },
    /// A node asks for a type that no guest can ask for.
    #[error("{0:?} is no VM type")]
    Type(String),
    /// A node asks for more copies than a guest can ask for, or for none.
    #[error("{0} copies can't be asked for")]
    Count(u32),
    /// A VM comes whose ID another one has.
    #[error("there is a VM {0} already")]
    Twice(uuid::Uuid),
    /// An image can't be used, for somebody can still write to it.
    #[error("the image {image} can't be used, for it could still be changed: {why}")]
    NotSealed {
        /// Its ID.
        image: uuid::Uuid,
        /// Why.
        why: String,
    },
    /// Too many files of a VM's earlier forks are not sealed yet.
    #[error(
        "{0} memory files of earlier forks of this VM can still be written to, since its node has them mapped: fork again later"
    )]
    Unsealed(usize),
    /// The platform is being stopped.
    #[error("the platform is being stopped")]
    Stopping,
    /// A failure that was asked for.
    #[error("{0} was made to fail")]
    Injected(ForkStep),
    /// This host does not say how much memory it has.
    #[error("images from elsewhere can't be limited to a part of this host's memory")]
    Memory(#[source] budget::Error),
    /// Events can't be written.
    #[error("can't write events")]
    Events(#[source] io::Error),
    /// The trace can't be written.
    #[error("can't write the trace")]
    Trace(#[source] io::Error),
    /// The consoles could not be set up.
    #[error("can't set up the consoles")]
    Consoles(#[source] io::Error),
}

/// A platform and its VMs.
#[derive(Debug)]
pub struct Platform {
    registry: Registry,
    pool: WarmPool,
    consoles: Consoles,
    events: Arc<Events>,
    trace: Trace,
    max_vms: usize,
    max_pause: Duration,
    prefetches: bool,
    limits: Limits,
    images: Images,
    /// Those that are not sealed yet, kept or not.
    seals: Seals,
    /// The memory that images from elsewhere may take, and what describes them.
    image_memory: Budget,
    /// What is known of layers that were sent, or looked at for that.
    digests: Digests,
    /// Clones that come from other platforms.
    clones: Clones,
    /// The memories of clones that run elsewhere, and have not got all of it yet.
    page_servers: PageServers,
    /// Clones that are being sent to others.
    transfers: Transfers,
    /// The platform's place among others, if it has one.
    cluster: OnceLock<Cluster>,
    /// The CPU that its guests are shown, as text.
    cpu_profile: String,
    /// What this host has for VMs that come from others, once somebody wanted to know.
    host_capabilities: OnceLock<HostCapabilities>,
    /// How the first VM ended, once it has.
    root_end: Mutex<Option<ExitReason>>,
}

impl Platform {
    /// Sets up a platform without VMs.
    ///
    /// # Errors
    /// [`Error::Log`], [`Error::Events`], [`Error::Trace`], [`Error::Consoles`] or [`Error::Memory`].
    pub fn new(settings: Settings) -> Result<Arc<Self>, Error> {
        let events = Arc::new(Events::new(settings.events).map_err(Error::Events)?);
        let consoles = Consoles::new(settings.log_dir, Arc::clone(&events))?;
        let platform = Arc::new(Self {
            registry: Registry::default(),
            pool: WarmPool::new(settings.ready, settings.cpu_profile.clone(), settings.max_pause),
            cpu_profile: settings.cpu_profile,
            consoles,
            events,
            trace: Trace::new(settings.trace)?,
            max_vms: settings.max_vms,
            max_pause: settings.max_pause,
            prefetches: settings.prefetches,
            limits: Limits::new(settings.limits),
            images: Images::new(settings.keep),
            seals: Seals::default(),
            image_memory: Budget::of_this_host(settings.image_memory).map_err(Error::Memory)?,
            digests: Digests::default(),
            clones: Clones::default(),
            page_servers: PageServers::default(),
            transfers: Transfers::default(),
            cluster: OnceLock::new(),
            host_capabilities: OnceLock::new(),
            root_end: Mutex::new(None),
        });
        WarmPool::fill_in_background(&platform)?;
        platform.seal_in_background()?;
        platform.tend_clones()?;
        Ok(platform)
    }

    /// Takes its place among others. To be called once.
    pub fn join(&self, cluster: Cluster) {
        if self.cluster.set(cluster).is_err() {
            tracing::error!("a platform can't be in a cluster twice");
        }
    }

    /// Its place among others.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.get()
    }

    /// Its name among others; empty where there are none.
    pub fn name(&self) -> &str {
        self.cluster.get().map_or("", |cluster| &cluster.name)
    }

    /// Boots a VM, and gives back the way to its console. Its output goes to this program's output as it is.
    ///
    /// # Errors
    /// [`Error`]: why it can't be launched.
    pub fn boot(self: &Arc<Self>, boot: Boot) -> Result<ConsoleInput, Error> {
        let identity = VmIdentity {
            id: new_id().map_err(Error::Id)?,
            parent: uuid::Uuid::nil(),
            vm_type: boot.name.clone(),
            name: boot.name,
            index: 0,
            count: 0,
            generation: 0,
        };
        let name = identity.name.clone();
        let failed = |source| Error::Node { name: name.clone(), source };
        let order = ToNode::Boot {
            identity: identity.clone(),
            cmdline: boot.cmdline,
            prealloc: boot.prealloc,
            faults: boot.faults,
        };
        let warm_node = self.pool.take(boot.config, 1)?.pop().ok_or(Error::Stopping)?;
        let (runs, running) = mpsc::channel();
        let node = Node::new(self, warm_node, identity, LaunchWaiter::Caller(runs))?;
        let link = Arc::clone(node.link());
        let files: Vec<_> = std::iter::once(&boot.kernel).chain(&boot.initrd).map(AsFd::as_fd).collect();
        link.send(&order, &files).map_err(failed)?;
        node.serve()?;
        // A node that dies drops its end of the channel.
        running.recv().unwrap_or_else(|_| Err(failed(link::Error::Closed)))?;
        Ok(ConsoleInput(link))
    }

    /// Waits until all VMs have ended, no image is kept, no clone elsewhere needs memory from here; leaves
    /// the cluster; waits until all output is written, and those have read it who follow it; and says how the
    /// first VM ended: `None` where its node died.
    pub fn wait(&self) -> Option<ExitReason> {
        loop {
            self.registry.wait_empty();
            self.images.wait_empty();
            self.page_servers.wait_empty();
            if self.registry.is_empty() {
                break;
            }
        }
        if let Some(cluster) = self.cluster() {
            cluster.directory.leave();
        }
        self.seals.close();
        self.pool.close();
        self.consoles.wait_drained();
        self.consoles.logs().wait_read(LAST_READERS);
        let deadline = Instant::now() + LAST_OUTPUT;
        let left = || deadline.saturating_duration_since(Instant::now());
        self.consoles.flush(left());
        self.events.flush(left());
        self.trace.flush(left());
        lock(&self.root_end).take()
    }

    /// Ends all VMs, and lets no new ones come.
    pub fn stop(&self) {
        self.clones.close();
        self.page_servers.close();
        self.images.close();
        self.seals.close();
        self.pool.close();
        self.registry.stop();
    }
}
