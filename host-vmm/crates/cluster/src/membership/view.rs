//! What is known of other platforms, and since when: plain values, and the time is always given.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::member::Member;

/// Most platforms of a cluster that are known at a time.
pub(super) const MAX_MEMBERS: usize = 1024;

/// The other platforms at a moment, ordered by their clusters' names and their own.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Counts the changes: a later view has a larger number.
    pub version: u64,
    /// The platforms.
    pub members: Vec<KnownMember>,
}

/// Another platform, as it is known.
#[derive(Debug, Clone)]
pub struct KnownMember {
    /// What it says of itself.
    pub member: Arc<Member>,
    /// When it was last certain that it is there, and says this.
    pub last_seen: Instant,
    /// When it has said this.
    pub reported_at: Instant,
    /// How it is known.
    pub source: Source,
}

/// How another platform is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The etcd of the own cluster has it.
    Etcd,
    /// It is listed, and has answered.
    Asked,
}

/// Where a platform stands in its cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It knows others by its list alone: there is no etcd that could be lost.
    Listed,
    /// The etcd of its cluster has it, and others see it.
    Joined,
    /// It has not reached the etcd of its cluster for the lease time, or not yet: others take it for gone.
    /// Its own view stays as it was.
    Partitioned,
    /// Another platform has its name; it can come back when that one is gone.
    NameTaken,
}

impl View {
    /// The platform of this name in a cluster.
    pub fn find(&self, cluster: &str, name: &str) -> Option<&KnownMember> {
        self.members
            .iter()
            .find(|seen| (seen.member.cluster.as_str(), seen.member.name.as_str()) == (cluster, name))
    }

    /// Whether a cluster has a platform of this name, and no other cluster has one.
    pub fn is_alone(&self, cluster: &str, name: &str) -> bool {
        let mut clusters =
            self.members.iter().filter(|seen| seen.member.name == name).map(|seen| &seen.member.cluster);
        clusters.next().is_some_and(|found| found == cluster) && clusters.next().is_none()
    }
}

/// A platform's name and that of its cluster, the cluster first.
type FullName = (String, String);

/// What is known.
#[derive(Debug)]
pub(super) struct Known {
    own: FullName,
    lease: Duration,
    /// What etcd has of the own cluster, and how things stand with it; `None` where there is none.
    registered: Option<Registered>,
    /// Those that have answered, and when.
    answered: BTreeMap<FullName, (Arc<Member>, Instant)>,
    /// Counts the changes.
    version: u64,
    /// As it was when somebody asked for it last.
    view: Arc<View>,
    /// When the first of those in the view that were asked has been silent for too long.
    expires: Option<Instant>,
}

/// What etcd has.
#[derive(Debug, Default)]
pub(super) struct Registered {
    /// The platforms, by their names, and when each entry has come.
    pub(super) members: BTreeMap<String, (Arc<Member>, Instant)>,
    /// When it was last certain that etcd keeps the own entry, and that nothing else has changed.
    pub(super) confirmed: Option<Instant>,
    /// Whether the own name is another platform's.
    pub(super) name_taken: bool,
}

impl Known {
    /// Nobody yet.
    pub(super) fn new(own: &Member, lease: Duration, has_etcd: bool) -> Self {
        Self {
            own: full_name(own),
            lease,
            registered: has_etcd.then(Registered::default),
            answered: BTreeMap::new(),
            version: 0,
            view: Arc::default(),
            expires: None,
        }
    }

    /// Changes what etcd has.
    pub(super) fn change_registered(&mut self, change: impl FnOnce(&mut Registered)) {
        if let Some(registered) = &mut self.registered {
            change(registered);
            self.version += 1;
        }
    }

    /// One that was asked has answered.
    pub(super) fn answer(&mut self, member: Member, now: Instant) {
        self.answered.insert(full_name(&member), (Arc::new(member), now));
        self.version += 1;
    }

    /// The present view.
    pub(super) fn view(&mut self, now: Instant) -> Arc<View> {
        if self.expires.is_some_and(|expires| expires <= now) {
            self.version += 1;
        }
        if self.view.version != self.version {
            let lease = self.lease;
            self.answered.retain(|_, (_, last_seen)| now < *last_seen + lease);
            self.expires = self.answered.values().map(|(_, last_seen)| *last_seen + lease).min();
            self.view = Arc::new(View { version: self.version, members: self.merge() });
        }
        Arc::clone(&self.view)
    }

    /// When the view changes though nobody says anything.
    pub(super) fn expires(&self) -> Option<Instant> {
        self.expires
    }

    /// Where the own platform stands.
    pub(super) fn status(&self, now: Instant) -> Status {
        let Some(registered) = &self.registered else { return Status::Listed };
        match registered.confirmed {
            _ if registered.name_taken => Status::NameTaken,
            Some(confirmed) if now < confirmed + self.lease => Status::Joined,
            _ => Status::Partitioned,
        }
    }

    /// All but the own platform; of one that is known in both ways, what was heard last.
    fn merge(&self) -> Vec<KnownMember> {
        let mut all: BTreeMap<FullName, KnownMember> = BTreeMap::new();
        if let Some(Registered { members, confirmed: Some(last_seen), .. }) = &self.registered {
            let seen = |(member, reported_at): &(Arc<Member>, Instant)| KnownMember {
                member: Arc::clone(member),
                last_seen: *last_seen,
                reported_at: *reported_at,
                source: Source::Etcd,
            };
            all.extend(members.values().map(|entry| (full_name(&entry.0), seen(entry))));
        }
        for (name, (member, last_seen)) in &self.answered {
            if all.get(name).is_none_or(|known| known.last_seen < *last_seen) {
                let (member, source) = (Arc::clone(member), Source::Asked);
                let seen = KnownMember { member, last_seen: *last_seen, reported_at: *last_seen, source };
                all.insert(name.clone(), seen);
            }
        }
        all.remove(&self.own);
        all.into_values().collect()
    }
}

fn full_name(member: &Member) -> FullName {
    (member.cluster.clone(), member.name.clone())
}

#[cfg(test)]
#[path = "view_test.rs"]
mod tests;
