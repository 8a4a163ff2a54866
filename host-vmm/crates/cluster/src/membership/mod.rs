//! Who else there is: what one platform knows of the others.
//!
//! There are two ways to know them, and both can be used at once:
//!
//! - **An etcd**, for the platforms of one cluster. Each keeps an entry there for as long as it lives, under
//!   a lease, and watches those of the others. A platform that dies is gone when its lease ends. One that
//!   loses etcd keeps its view and its VMs, and knows after the lease time that others take it for gone: it
//!   is [partitioned](Status::Partitioned), and is to take no VMs from others. An entry there says more than
//!   it seems to: who can write to the etcd can say where copies of VMs go.
//! - **A list**, for platforms of this cluster or others. Each is asked again and again; one that has not
//!   answered for the lease time is gone until it answers.
//!
//! What comes from others is [checked](check) before it is looked at; what is wrong is left out, with a
//! warning that says whose it was.

use std::{
    error, fmt, io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base::sync::lock;

pub mod check;
mod etcd;
mod peers;
mod view;

pub use etcd::Error as EtcdError;
pub use view::{KnownMember, Source, Status, View};

use super::{
    member::Member,
    settings::{Etcd, Peer},
};
use view::{Known, Registered};

/// Asks a platform that is listed what it says of itself. It may take long; what it gives back is checked
/// here.
pub type Ask = dyn Fn(&Peer) -> Result<Member, Box<dyn error::Error + Send + Sync>> + Send + Sync;

/// Report of this platform on itself. Name, cluster and address never change.
pub type SelfReport = dyn Fn() -> Member + Send + Sync;

/// How a platform knows the others, and they it.
pub struct Settings {
    /// What it says of itself.
    pub own: Arc<SelfReport>,
    /// How long a platform may be silent before others take it for gone; the same for all platforms of a
    /// cluster, in whole seconds.
    pub lease: Duration,
    /// The etcd of its cluster, if there is one.
    pub etcd: Option<Etcd>,
    /// Platforms that are listed. This one may be among them.
    pub peers: Vec<Peer>,
    /// How they are asked.
    pub ask: Arc<Ask>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lease, etcd, peers, .. } = self;
        let mut fields = f.debug_struct("Settings");
        fields.field("lease", lease).field("etcd", etcd).field("peers", peers).finish_non_exhaustive()
    }
}

/// Why a platform can't know others, or they it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What it says of itself would not be taken.
    #[error("other platforms would not take what this one says of itself")]
    Own(#[source] check::Error),
    /// The etcd of its cluster does not let it in.
    #[error("can't join the cluster {cluster}")]
    Etcd {
        /// The cluster.
        cluster: String,
        /// Why.
        source: EtcdError,
    },
    /// There is no thread to ask others.
    #[error("can't start a thread that asks {peer}")]
    Thread {
        /// Who would be asked.
        peer: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// What a platform knows of the others. Dropping it [leaves](Directory::leave) the cluster.
#[derive(Debug)]
#[must_use]
pub struct Directory {
    shared: Arc<Shared>,
    etcd: Mutex<Option<etcd::Handle>>,
    _peers: peers::Handle,
}

impl Directory {
    /// Joins the cluster, and starts to ask the platforms that are listed.
    ///
    /// An etcd that can't be reached is tried again and again: until then the platform is
    /// [partitioned](Status::Partitioned). Where the name is in use, this waits until it is certain that its
    /// holder lives: one that was killed is gone after its lease.
    ///
    /// # Errors
    /// [`Error`]: why it can't be.
    pub fn start(settings: Settings) -> Result<Self, Error> {
        let Settings { own, lease, etcd, peers, ask } = settings;
        let member = own();
        // Others are told where it is by etcd alone.
        if etcd.is_some() { check::check(&member) } else { check::check_alone(&member) }
            .map_err(Error::Own)?;
        let shared = Arc::new(Shared::new(Known::new(&member, lease, etcd.is_some())));
        let (name, cluster) = (member.name.clone(), member.cluster.clone());
        let is_own = |peer: &Peer| (&peer.name, &peer.cluster) == (&name, &cluster);
        let peers = peers.into_iter().filter(|peer| !is_own(peer)).collect();
        let join = |etcd| etcd::start(&etcd, own, &member, lease, Arc::clone(&shared));
        let etcd = etcd.map(join).transpose().map_err(|source| Error::Etcd { cluster, source })?;
        Ok(Self { etcd: Mutex::new(etcd), _peers: peers::start(peers, &ask, &shared)?, shared })
    }

    /// Takes the own entry out of etcd, if that can be had within three seconds: others need not wait for the
    /// end of its lease.
    pub fn leave(&self) {
        let etcd = lock(&self.etcd).take();
        drop(etcd);
    }

    /// The present view.
    pub fn members(&self) -> Arc<View> {
        lock(&self.shared.known).view(Instant::now())
    }

    /// The present view, once it is another one than that with this number; waits so long at most.
    pub fn newer(&self, version: u64, at_most: Duration) -> Arc<View> {
        let end = Instant::now() + at_most;
        let mut known = lock(&self.shared.known);
        loop {
            let now = Instant::now();
            let view = known.view(now);
            if view.version != version || now >= end {
                return view;
            }
            let next = known.expires().map_or(end, |expires| expires.min(end));
            let changed = self.shared.changed.wait_timeout(known, next.saturating_duration_since(now));
            known = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Where the platform stands in its cluster.
    pub fn status(&self) -> Status {
        lock(&self.shared.known).status(Instant::now())
    }

    /// Whether others take the platform for gone, as far as it knows: then it is to take no VMs from them.
    pub fn is_partitioned(&self) -> bool {
        matches!(self.status(), Status::Partitioned | Status::NameTaken)
    }
}

/// What is known, and who waits for it to change.
#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    changed: Condvar,
}

impl Shared {
    fn new(known: Known) -> Self {
        Self { known: Mutex::new(known), changed: Condvar::new() }
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        change(&mut lock(&self.known));
        self.changed.notify_all();
    }

    fn change_registered(&self, change: impl FnOnce(&mut Registered)) {
        self.change(|known| known.change_registered(change));
    }
}
