//! A platform's place among others: how it reaches them, and what it lets them do.

use std::{
    borrow::Cow,
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use api::client::{Connections, Endpoint, PooledClient};
use base::sync::lock;
use cluster::{
    member::Member,
    membership::{self, Directory, View},
    placement::{self, Allocation, Claim, Explanation, PendingPlacements, Rules, Unplaceable, Wish},
    principal::Principal,
    tls::Credentials,
};
use serde::Deserialize;

/// How long another platform has for each answer.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a platform can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody has that name.
    #[error("no platform {name} is known; there are: {known}")]
    Unknown {
        /// What it was called.
        name: String,
        /// All names.
        known: String,
    },
    /// Several have it.
    #[error("several clusters have a platform {0}: name it as CLUSTER/{0}")]
    Ambiguous(String),
    /// It may not order clones here.
    #[error("{principal} may not order clones of what the platform {own} has; {advice}")]
    Order {
        /// Who has tried to.
        principal: Principal,
        /// The platform that was asked.
        own: String,
        /// What can be done.
        advice: &'static str,
    },
}

/// Who may order clones of what a platform has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Orders {
    /// Operators alone.
    #[default]
    Operators,
    /// Other platforms of its cluster too. Each of them can have a VM cloned to itself, and read its memory
    /// there.
    Platforms,
}

/// How a clone is sent.
#[derive(Debug, Clone)]
pub struct SendSettings {
    /// Connections for its memory, where it is not lazy.
    pub connections: usize,
    /// Most bytes of memory that are sent within a second, on all of them together.
    pub bandwidth: Option<u64>,
    /// Whether the copies of guests' forks run before all of their memory has come.
    pub lazy: bool,
}

/// A platform's place among others.
pub struct Cluster {
    /// The platform's own name.
    pub name: String,
    /// How the others are known.
    pub directory: Directory,
    /// What it says of itself.
    pub own: Arc<membership::SelfReport>,
    /// What it shows others; none where they are all on this host, and nobody else is.
    pub credentials: Option<Credentials>,
    /// Where copies go.
    pub rules: Rules,
    /// What has gone there of late.
    pub recent: Mutex<PendingPlacements>,
    /// How they are sent.
    pub sending: SendSettings,
    /// Who may order clones over the network.
    pub orders: Orders,
    /// Connections to the others.
    pub connections: Connections,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { directory, rules, sending, .. } = self;
        let mut fields = f.debug_struct("Cluster");
        fields
            .field("directory", directory)
            .field("rules", rules)
            .field("sending", sending)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// The way to a platform that is called NAME, or CLUSTER/NAME where several clusters have one of that
    /// name.
    ///
    /// # Errors
    /// [`Error`].
    pub fn find(&self, name: &str) -> Result<PooledClient, Error> {
        let view = self.directory.members();
        let (cluster, short) =
            name.split_once('/').map_or((None, name), |(cluster, name)| (Some(cluster), name));
        let is_it = |member: &&Member| {
            member.name == short && cluster.is_none_or(|cluster| member.cluster == cluster)
        };
        let mut found = members(&view).filter(is_it);
        match (found.next(), found.next()) {
            (Some(member), None) => {
                let endpoint = Endpoint::of_platform(&member.name, member.address, self.credentials.as_ref());
                Ok(self.connections.client(endpoint, REQUEST_TIMEOUT))
            }
            (None, _) => {
                let known: Vec<&str> = members(&view).map(|member| member.name.as_str()).collect();
                Err(Error::Unknown { name: name.to_owned(), known: known.join(", ") })
            }
            (Some(_), Some(_)) => Err(Error::Ambiguous(short.to_owned())),
        }
    }

    /// Checks whether another platform may order clones here.
    ///
    /// # Errors
    /// [`Error::Order`].
    pub fn check_order(&self, principal: &Principal) -> Result<(), Error> {
        let advice = match self.orders {
            Orders::Operators => {
                "its configuration would have to allow it, by orders = \"platforms\" under [clone]"
            }
            // Certificates don't tell clusters apart.
            Orders::Platforms
                if self.directory.members().is_alone((self.own)().cluster.as_str(), principal.name()) =>
            {
                return Ok(());
            }
            Orders::Platforms => {
                "its configuration allows that to platforms of its own cluster that it knows, and whose names no others have"
            }
        };
        Err(Error::Order { principal: principal.clone(), own: self.name.clone(), advice })
    }

    /// Chooses where copies go. Those that go to another platform come with a claim on it.
    ///
    /// # Errors
    /// [`Unplaceable`].
    pub fn place(
        &self,
        wish: &Wish,
        but: &[String],
    ) -> Result<Vec<(Allocation, Option<Claim>)>, Unplaceable> {
        let (own, view, now) = ((self.own)(), self.directory.members(), Instant::now());
        let choose = |recent: &PendingPlacements| {
            let members = all(&own, &view, recent, now);
            let known =
                members.iter().map(AsRef::as_ref).filter(|member: &&Member| !but.contains(&member.name));
            placement::place(&self.rules, wish, known)
        };
        let mut recent = lock(&self.recent);
        // Each decision counts on those before it. Where that leaves no room, some of those copies may have
        // ended: whoever is full says so.
        let shares = choose(&recent).or_else(|_| choose(&PendingPlacements::default()))?.shares;
        let claimed = shares.into_iter().map(|share| {
            // Another cluster may have a platform of the source's name.
            let is_away = share.platform != wish.source;
            let claim = is_away.then(|| recent.enter(&share.platform, wish.config, share.count, now));
            (share, claim)
        });
        Ok(claimed.collect())
    }

    /// Tells what speaks for each platform, and what against it.
    pub fn explain(&self, wish: &Wish) -> Explanation {
        let (own, view) = ((self.own)(), self.directory.members());
        let members = all(&own, &view, &lock(&self.recent), Instant::now());
        placement::explain(&self.rules, wish, members.iter().map(AsRef::as_ref))
    }
}

fn members(view: &View) -> impl Iterator<Item = &Member> + Clone {
    view.members.iter().map(|seen| &*seen.member)
}

/// This platform, as it is now, and the others, with what has gone there since they have told of themselves.
fn all<'m>(
    own: &'m Member,
    view: &'m View,
    recent: &PendingPlacements,
    now: Instant,
) -> Vec<Cow<'m, Member>> {
    let is_other = |member: &Member| (&member.cluster, &member.name) != (&own.cluster, &own.name);
    let others = view.members.iter().filter(|seen| is_other(&seen.member));
    let others = others.map(|seen| recent.count(&seen.member, seen.reported_at, now));
    std::iter::once(Cow::Borrowed(own)).chain(others).collect()
}
