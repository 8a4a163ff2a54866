//! Sessions with an etcd, one after another, and what goes on in each.

use std::{
    collections::{BTreeMap, HashSet},
    convert::Infallible,
    mem,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use base::{
    error::chain,
    text::{Name, Reason},
};
use tokio::{
    sync::oneshot,
    time::{self, MissedTickBehavior, interval_at, sleep},
};
use tonic::Code;
use uuid::Uuid;
use vmfork_abi::is_vm_type;

use super::{
    Entry, Error, LAST_CALLS,
    client::{Client, Put, Server},
    messages::{self, Compare, Event, KeyValue, PutRequest, WatchResponse},
};
use crate::{
    member::Member,
    membership::{
        SelfReport, Shared, check,
        view::{MAX_MEMBERS, Registered},
    },
};

/// The pause after a session that has failed, and the longest one after several.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How often a lease is renewed within its time.
const RENEWALS: u32 = 3;

/// How long etcd may take to remove the entry of a platform whose lease has ended.
const GRACE: Duration = Duration::from_secs(2);

/// The shortest time between two entries; each platform has one of its own, up to twice as long, so that not
/// all write at once.
const TELL_MS: u64 = 1000;

/// How a platform joins.
pub(super) struct Settings {
    pub(super) servers: Vec<Server>,
    pub(super) own: Arc<SelfReport>,
    pub(super) instance: Uuid,
    pub(super) name: String,
    pub(super) cluster: String,
    pub(super) lease: Duration,
    pub(super) shared: Arc<Shared>,
    /// Who waits until it has joined.
    pub(super) answer: mpsc::Sender<Result<(), Error>>,
}

/// Keeps a platform's entry, and looks at those of others.
pub(super) struct Registrar {
    settings: Settings,
    /// What the keys of the cluster's platforms begin with; their names follow.
    prefix: String,
    /// Whether nobody waits for an answer any more.
    has_answered: bool,
    /// The connection of the latest session.
    client: Option<Client>,
    /// The lease, for as long as it is not known to be gone.
    lease_id: Option<i64>,
    /// The revision at which the own entry was created, and what it is.
    created: i64,
    reported: Vec<u8>,
    /// What was seen first of another platform with the own name: when its entry was written, and when it was
    /// seen.
    holder: Option<(i64, Instant)>,
    /// What is wrong with entries that are left out.
    bad: BTreeMap<String, String>,
    /// Whether etcd takes no writes at present: its disk's quota is used up.
    is_full: bool,
}

impl Registrar {
    pub(super) fn new(settings: Settings) -> Self {
        Self {
            prefix: format!("/host-vmm/v1/{}/platforms/", settings.cluster),
            settings,
            has_answered: false,
            client: None,
            lease_id: None,
            created: 0,
            reported: Vec::new(),
            holder: None,
            bad: BTreeMap::new(),
            is_full: false,
        }
    }

    /// Stays a member until `stopped`, and leaves then.
    pub(super) async fn run(mut self, stopped: oneshot::Receiver<()>) {
        tokio::select! {
            // Nothing is ever sent: the other side is dropped.
            _ = stopped => {}
            () = self.stay() => {}
        }
        if let (Some(client), Some(lease)) = (&self.client, self.lease_id) {
            let left = time::timeout(LAST_CALLS, client.revoke(lease)).await;
            match left {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = chain(&error), "the cluster was not told of the end")
                }
                Err(_) => tracing::warn!("the cluster was not told of the end: etcd does not answer"),
            }
        }
    }

    /// Has one session after another. Ends only where it never got in, and never will.
    async fn stay(&mut self) {
        let longest = (self.settings.lease / 4).min(LONGEST_PAUSE);
        let (mut pause, mut failures, mut reported) = (SHORTEST_PAUSE, 0, ReportedErrors::default());
        loop {
            let began = Instant::now();
            let Err(error) = self.session(failures).await;
            let is_name_taken = matches!(error, Error::NameTaken { .. });
            self.settings.shared.change_registered(|registered| registered.name_taken = is_name_taken);
            if !self.has_answered && self.is_final(&error) {
                return self.answer(Err(error));
            }
            if began.elapsed() > self.settings.lease {
                (pause, reported) = (SHORTEST_PAUSE, ReportedErrors::default());
            }
            if reported.is_first(&error) {
                tracing::warn!(why = chain(&error), "not a member of the cluster at present; trying again");
            }
            failures += 1;
            // Those who wait go on without etcd when all servers were tried, but not with a name that may be
            // another's.
            if failures >= self.settings.servers.len() && !is_name_taken {
                self.answer(Ok(()));
            }
            sleep(pause).await;
            pause = (2 * pause).min(longest);
        }
    }

    /// Whether it makes no sense to wait, at the start.
    fn is_final(&mut self, error: &Error) -> bool {
        match error {
            Error::Login { .. } | Error::Own(_) | Error::Json(_) => true,
            Error::Refused { source, .. } => source.code() == Code::PermissionDenied,
            Error::NameTaken { revision, .. } => {
                let (first, since) = *self.holder.get_or_insert_with(|| (*revision, Instant::now()));
                // A holder that lives says something new, or is there for longer than the entry of one that
                // has died.
                *revision != first || since.elapsed() > self.settings.lease + GRACE
            }
            _ => false,
        }
    }

    /// Tells those who wait, if any do.
    fn answer(&mut self, answer: Result<(), Error>) {
        if !self.has_answered && self.settings.answer.send(answer).is_err() {
            tracing::debug!("nobody waits for the cluster");
        }
        self.has_answered = true;
    }

    /// Joins by way of a server, and goes on until something is wrong.
    async fn session(&mut self, number: usize) -> Result<Infallible, Error> {
        let server = &self.settings.servers[number % self.settings.servers.len()];
        let client = self.client.insert(Client::connect(server).await?).clone();
        let confirmed = self.renew(&client).await?;
        self.claim(&client).await?;
        let revision = self.load(&client).await?;
        let mut watch = client.watch(&self.prefix, revision + 1).await?;
        self.settings.shared.change_registered(|registered| {
            (registered.confirmed, registered.name_taken) = (Some(confirmed), false);
        });
        self.answer(Ok(()));
        tracing::info!(name = self.settings.name, "a member of the cluster");
        let (mut renew, mut tell) = (every(self.settings.lease / RENEWALS), every(self.tell_time()));
        loop {
            tokio::select! {
                answer = watch.message() => match answer {
                    Ok(Some(answer)) => self.apply(answer)?,
                    Ok(None) => return Err(Error::WatchEnded(Reason::default())),
                    Err(status) => return Err(client.refused(messages::WATCH, status)),
                },
                _ = renew.tick() => {
                    let lease = self.lease_id.ok_or(Error::LeaseLost)?;
                    let Some(confirmed) = client.keep_alive(lease).await? else {
                        self.lease_id = None;
                        return Err(Error::LeaseLost);
                    };
                    self.settings.shared.change_registered(|registered| registered.confirmed = Some(confirmed));
                }
                _ = tell.tick() => match self.tell(&client).await {
                    Err(error) if error.is_full() => self.complain_of_full(&error),
                    told => told?,
                },
            }
        }
    }

    fn tell_time(&self) -> Duration {
        let share = u64::from(self.settings.instance.as_bytes()[0]) * TELL_MS / 256;
        Duration::from_millis(TELL_MS + share)
    }

    /// Sees to it that there is a lease, the one that there was before if it can be; says when it was last
    /// certain to begin anew.
    async fn renew(&mut self, client: &Client) -> Result<Instant, Error> {
        if let Some(lease) = self.lease_id {
            if let Some(confirmed) = client.keep_alive(lease).await? {
                return Ok(confirmed);
            }
            self.lease_id = None;
        }
        let asked = Instant::now();
        let seconds = i64::try_from(self.settings.lease.as_secs()).unwrap_or(i64::MAX);
        self.lease_id = Some(client.grant(seconds).await?);
        Ok(asked)
    }

    /// Makes the own entry, or takes the one that this process has made before. One that its lease still
    /// keeps is not written again: an etcd that is full takes no writes, and the platform is a member for as
    /// long as the lease lives.
    async fn claim(&mut self, client: &Client) -> Result<(), Error> {
        if self.created != 0
            && let Some(found) = client.get(self.key()).await?
            && self.is_own(&found)
        {
            self.reported = found.value;
            return Ok(());
        }
        let value = self.describe()?;
        let absent = Compare { create_revision: Some(0), ..self.compare(messages::CREATE_REVISION) };
        let found = match client.put_if(absent, self.put(value.clone())?).await? {
            Put::Done(revision) => {
                (self.created, self.reported) = (revision, value);
                self.takes_writes();
                return Ok(());
            }
            Put::Not(found) => found.ok_or(Error::EntryLost)?,
        };
        let holder = entry_in(&found);
        if holder.as_ref().is_none_or(|holder| holder.instance != self.settings.instance) {
            let (name, holder) = (self.settings.name.clone(), holder.map(|holder| holder.member.address));
            return Err(Error::NameTaken { name, holder, revision: found.mod_revision });
        }
        let unchanged =
            Compare { mod_revision: Some(found.mod_revision), ..self.compare(messages::MOD_REVISION) };
        match client.put_if(unchanged, self.put(value.clone())?).await? {
            Put::Done(_) => (self.created, self.reported) = (found.create_revision, value),
            Put::Not(_) => return Err(Error::EntryLost),
        }
        Ok(())
    }

    /// Writes the own entry anew if it has changed.
    async fn tell(&mut self, client: &Client) -> Result<(), Error> {
        let value = self.describe()?;
        if value == self.reported {
            return Ok(());
        }
        let own = Compare { create_revision: Some(self.created), ..self.compare(messages::CREATE_REVISION) };
        match client.put_if(own, self.put(value.clone())?).await? {
            Put::Done(_) => self.reported = value,
            Put::Not(_) => return Err(Error::EntryLost),
        }
        self.takes_writes();
        Ok(())
    }

    /// Says that etcd is not full any more, if it was.
    fn takes_writes(&mut self) {
        if mem::take(&mut self.is_full) {
            tracing::warn!("etcd takes writes again: other platforms see what this one has to do");
        }
    }

    /// Says that etcd is full, once.
    fn complain_of_full(&mut self, error: &Error) {
        if !mem::replace(&mut self.is_full, true) {
            tracing::warn!(
                why = chain(error),
                "etcd takes no writes: other platforms see this one, but not what it has to do; compact and defragment etcd, or raise its quota, and \
                 disarm the alarm"
            );
        }
    }

    /// Takes all entries, in place of those that were known, and gives back the revision at which they were
    /// so.
    async fn load(&mut self, client: &Client) -> Result<i64, Error> {
        let (prefix, mut found) = (self.prefix.clone(), Registered::default());
        let each = |kv: KeyValue| {
            if let Some((name, member)) = self.read(&kv) {
                self.enter(&mut found, name, member);
            }
        };
        let revision = client.list(&prefix, MAX_MEMBERS, each).await?;
        self.settings.shared.change_registered(|registered| registered.members = found.members);
        Ok(revision)
    }

    /// Takes changes.
    pub(super) fn apply(&mut self, answer: WatchResponse) -> Result<(), Error> {
        if answer.canceled || answer.compact_revision != 0 {
            return Err(Error::WatchEnded(answer.cancel_reason.into()));
        }
        for Event { kind, kv } in answer.events {
            let kv = kv.unwrap_or_default();
            let is_gone = kind == messages::DELETE;
            if kv.key == self.key() && (is_gone || !self.is_own(&kv)) {
                return Err(Error::EntryLost);
            }
            let found = if is_gone { self.name_of(&kv.key).map(|name| (name, None)) } else { self.read(&kv) };
            if let Some((name, member)) = found {
                let shared = Arc::clone(&self.settings.shared);
                shared.change_registered(|registered| self.enter(registered, name, member));
            }
        }
        Ok(())
    }

    /// Enters what is known of a platform, or that there is none of this name.
    fn enter(&mut self, registered: &mut Registered, name: String, member: Option<Member>) {
        let has_room = registered.members.len() < MAX_MEMBERS || registered.members.contains_key(&name);
        match member {
            Some(member) if has_room => {
                self.bad.remove(&name);
                registered.members.insert(name, (Arc::new(member), Instant::now()));
            }
            Some(_) => self.complain(&name, format!("there are {MAX_MEMBERS} others already")),
            None => drop(registered.members.remove(&name)),
        }
    }

    /// Whose entry it is, and what that says, if it is valid.
    fn read(&mut self, kv: &KeyValue) -> Option<(String, Option<Member>)> {
        let name = self.name_of(&kv.key)?;
        match self.check(&name, &kv.value) {
            Ok(member) => Some((name, Some(member))),
            Err(error) => {
                self.complain(&name, chain(&error));
                Some((name, None))
            }
        }
    }

    fn check(&self, name: &str, value: &[u8]) -> Result<Member, check::Error> {
        let Entry { member, .. } = check::parse_json(value)?;
        check::check(&member)?;
        if (member.name.as_str(), &member.cluster) == (name, &self.settings.cluster) {
            return Ok(member);
        }
        Err(check::Error::Stranger { found: Name::of(format_args!("{} of {}", member.name, member.cluster)) })
    }

    /// Whose key it is, unless it is the own one, or no platform's.
    fn name_of(&mut self, key: &[u8]) -> Option<String> {
        let key = String::from_utf8_lossy(key);
        let name = key.strip_prefix(&self.prefix)?;
        if !is_vm_type(name) {
            self.complain(&Name::from(name), "that is no name".to_owned());
            return None;
        }
        (name != self.settings.name).then(|| name.to_owned())
    }

    /// Says what is wrong with an entry, once.
    fn complain(&mut self, name: &str, why: String) {
        if self.bad.get(name) == Some(&why) {
            return;
        }
        tracing::warn!(name, why, "an entry in etcd is left out");
        if self.bad.len() >= MAX_MEMBERS {
            self.bad.clear();
        }
        self.bad.insert(name.to_owned(), why);
    }

    /// Whether this process has written it, and its end is the lease's.
    fn is_own(&self, kv: &KeyValue) -> bool {
        let is_instance = entry_in(kv).is_some_and(|entry| entry.instance == self.settings.instance);
        is_instance && kv.create_revision == self.created && Some(kv.lease) == self.lease_id
    }

    fn key(&self) -> Vec<u8> {
        format!("{}{}", self.prefix, self.settings.name).into_bytes()
    }

    /// A condition for writing the own entry; the revision is to be added.
    fn compare(&self, target: i32) -> Compare {
        Compare { target, key: self.key(), ..Compare::default() }
    }

    fn put(&self, value: Vec<u8>) -> Result<PutRequest, Error> {
        Ok(PutRequest { key: self.key(), value, lease: self.lease_id.ok_or(Error::LeaseLost)? })
    }

    /// The own entry as it is to be now.
    fn describe(&self) -> Result<Vec<u8>, Error> {
        let member = (self.settings.own)();
        check::check(&member).map_err(Error::Own)?;
        serde_json::to_vec(&Entry { instance: self.settings.instance, member }).map_err(Error::Json)
    }
}

/// Kinds of errors that were reported: each is once, not each of the many attempts.
#[derive(Debug, Default)]
pub(super) struct ReportedErrors(HashSet<mem::Discriminant<Error>>);

impl ReportedErrors {
    /// Whether this one is the first of its kind.
    pub(super) fn is_first(&mut self, error: &Error) -> bool {
        self.0.insert(mem::discriminant(error))
    }
}

/// What somebody has written, not checked.
fn entry_in(kv: &KeyValue) -> Option<Entry> {
    check::parse_json(&kv.value).ok()
}

/// Ticks again and again, first after one period.
fn every(period: Duration) -> time::Interval {
    let mut interval = interval_at(time::Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}
