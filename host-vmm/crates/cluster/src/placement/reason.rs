//! Why copies go where they go, and why they can't go elsewhere: for programs, and for people.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    fmt,
    net::SocketAddr,
};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    Policy, Score, Wish,
    choice::{Pick, name_of},
    room::{Evaluation, Fit, available_bytes, charge_bytes},
};
use crate::member::Member;

/// Most platforms of which [`Unplaceable`] tells one by one; [`explain`](super::explain) tells of all.
pub const MAX_TOLD: usize = 64;

/// Most platforms that the text of [`Unplaceable`] names.
const MAX_NAMED: usize = 8;

/// Why a platform takes no copies, or no more. What comes first is nearest to taking some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// It has no free node.
    NoNode,
    /// It has too little memory.
    Memory,
    /// It takes no new VMs.
    Draining,
    /// It has not a label that the rule wants.
    Label,
    /// It shows its guests another CPU than the rule wants.
    CpuProfile,
    /// It is of another cluster than the rule wants.
    Cluster,
    /// It is not among those that the rule names.
    NotPinned,
    /// It is where the VM is that is copied, and another one is wanted.
    OnlyRemote,
    /// It is not where the VM is that is copied, and no other is wanted.
    OnlyLocal,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoNode => "without a free node",
            Self::Memory => "with too little memory",
            Self::Draining => "draining",
            Self::Label => "with another label",
            Self::CpuProfile => "with another CPU profile",
            Self::Cluster => "in another cluster",
            Self::NotPinned => "not pinned",
            Self::OnlyRemote => "not remote",
            Self::OnlyLocal => "not local",
        })
    }
}

/// Why a platform takes no copies, or no more, in words too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Obstacle {
    /// Which kind of reason it is.
    pub cause: Cause,
    /// For people.
    pub text: String,
}

/// What a decision makes of one platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reason {
    /// Its name.
    pub platform: String,
    /// How many copies it gets.
    pub copies: u32,
    /// For how many it has room, at most as many as were wished for; 0 where it may take none.
    pub room: u32,
    /// Why there is no more room; null where there is room for all.
    pub obstacle: Option<Obstacle>,
    /// Its score for the first copy; null where it can't take one.
    pub score: Option<Score>,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { platform, room, obstacle, .. } = self;
        let why = obstacle.as_ref().map_or("", |obstacle| &obstacle.text);
        match room {
            0 => write!(f, "{platform}: {why}"),
            _ => write!(f, "{platform}: room for {room}, {why}"),
        }
    }
}

/// There is no room for all copies; so none is placed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub struct Unplaceable {
    /// Type of the copies.
    pub vm_type: String,
    /// How many were wished for.
    pub count: u32,
    /// The policy.
    pub policy: Policy,
    /// For how many there is room on all platforms.
    pub room: u64,
    /// What is in the way, by platform: those with most room first, then those that are nearest to taking
    /// some; [`MAX_TOLD`] at most.
    pub platforms: Vec<Reason>,
    /// How many platforms there are besides, by what is in the way.
    pub others: BTreeMap<Cause, usize>,
}

impl fmt::Display for Unplaceable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vm_type, count, policy, room, platforms, others } = self;
        write!(f, "there is room for {room} of {count} copies of {vm_type:?} (policy {policy})")?;
        if platforms.is_empty() {
            return write!(f, ": no platform is known");
        }
        let (named, counted) = platforms.split_at(platforms.len().min(MAX_NAMED));
        for (between, reason) in std::iter::once(": ").chain(std::iter::repeat("; ")).zip(named) {
            write!(f, "{between}{reason}")?;
        }
        let mut rest = others.clone();
        for obstacle in counted.iter().filter_map(|reason| reason.obstacle.as_ref()) {
            *rest.entry(obstacle.cause).or_default() += 1;
        }
        if rest.is_empty() {
            return Ok(());
        }
        let counts: Vec<String> = rest.iter().map(|(cause, count)| format!("{count} {cause}")).collect();
        write!(f, "; and {} others: {}", rest.values().sum::<usize>(), counts.join(", "))
    }
}

/// What a decision makes of all platforms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// Type of the copies.
    pub vm_type: String,
    /// How many were wished for.
    pub count: u32,
    /// The policy.
    pub policy: Policy,
    /// Whether they are placed: all of them, or none.
    pub placed: bool,
    /// The platforms: those first that get most, then those with the best score.
    pub platforms: Vec<Reason>,
}

impl Explanation {
    /// Titles of the columns of [`rows`](Self::rows).
    pub const HEAD: [&str; 12] = [
        "PLATFORM",
        "COPIES",
        "ROOM",
        "SCORE",
        "MEMORY",
        "MEM-PSI",
        "PROCESSORS",
        "CPU-PSI",
        "NODES",
        "READY",
        "IMAGE",
        "WHY NO MORE",
    ];

    /// A row of text for each platform: its name, numbers, and what is in the way.
    pub fn rows(&self) -> Vec<[String; 12]> {
        self.platforms.iter().map(row).collect()
    }
}

fn row(reason: &Reason) -> [String; 12] {
    let parts = reason.score.map(|score| score.parts());
    let part = |at: usize| parts.map_or_else(|| "-".to_owned(), |parts| parts[at].1.to_string());
    [
        reason.platform.clone(),
        reason.copies.to_string(),
        reason.room.to_string(),
        reason.score.map_or_else(|| "-".to_owned(), |score| score.total().to_string()),
        part(0),
        part(1),
        part(2),
        part(3),
        part(4),
        part(5),
        part(6),
        reason.obstacle.as_ref().map_or_else(String::new, |obstacle| obstacle.text.clone()),
    ]
}

impl Evaluation<'_> {
    /// What the decision makes of a platform.
    pub(super) fn reason(&self, fit: &Fit<'_>, copies: u32) -> Reason {
        let Fit { candidate, cause } = fit;
        Reason {
            platform: candidate.member.name.clone(),
            copies,
            room: candidate.room,
            obstacle: cause.map(|cause| Obstacle { cause, text: self.tell(cause, fit) }),
            score: (candidate.room > 0).then(|| self.score(candidate, 0)),
        }
    }

    /// What is in the way, in words.
    fn tell(&self, cause: Cause, fit: &Fit<'_>) -> String {
        let Wish { count, config, ref source, .. } = *self.wish;
        let Member { load, labels, cluster, cpu_profile, .. } = fit.candidate.member;
        let wished = |wished: &Option<String>| format!("{:?}", wished.as_deref().unwrap_or_default());
        match cause {
            Cause::NoNode => format!("{} of {} nodes are taken", load.vms, load.max_vms),
            Cause::Memory => {
                let needed_bytes = charge_bytes(config, count, fit.candidate.is_source);
                let left_bytes = available_bytes(load);
                format!(
                    "{} MiB of memory are left, and all copies need {}",
                    left_bytes >> 20,
                    needed_bytes >> 20
                )
            }
            Cause::Draining => "it is draining".to_owned(),
            Cause::Label => {
                let (label, value) = self.wrong_label(fit.candidate.member).unwrap_or_default();
                match labels.get(label) {
                    Some(found) => format!("its label {label} is {found:?}, not {value:?}"),
                    None => format!("it has no label {label}, which must be {value:?}"),
                }
            }
            Cause::CpuProfile => {
                format!("its CPU profile is {cpu_profile:?}, not {}", wished(&self.rule.cpu_profile))
            }
            Cause::Cluster => format!("it is in cluster {cluster:?}, not in {}", wished(&self.rule.cluster)),
            Cause::NotPinned => "it is not among the platforms that the rule names".to_owned(),
            Cause::OnlyRemote => "the VM is there, and a remote platform was asked for".to_owned(),
            Cause::OnlyLocal if self.rule.policy == Policy::Local => {
                format!("copies must stay on {source:?}, where the VM is (policy local)")
            }
            Cause::OnlyLocal => format!("only {source:?} was asked for, where the VM is"),
        }
    }

    /// Why there is not enough room.
    pub(super) fn unplaceable<'m>(&self, members: impl Iterator<Item = &'m Member>) -> Unplaceable {
        let mut told: Vec<Fit<'m>> = members.map(|member| self.judge(member)).collect();
        let room = told.iter().map(|fit| u64::from(fit.candidate.room)).sum();
        let mut others: BTreeMap<Cause, usize> = BTreeMap::new();
        if told.len() > MAX_TOLD {
            told.select_nth_unstable_by_key(MAX_TOLD, nearest_first);
            for cause in told.drain(MAX_TOLD..).filter_map(|fit| fit.cause) {
                *others.entry(cause).or_default() += 1;
            }
        }
        told.sort_unstable_by_key(nearest_first);
        Unplaceable {
            vm_type: self.wish.vm_type.clone(),
            count: self.wish.count,
            policy: self.rule.policy,
            room,
            platforms: told.iter().map(|fit| self.reason(fit, 0)).collect(),
            others,
        }
    }

    /// What the decision makes of each platform.
    pub(super) fn explanation<'m>(
        &self,
        members: impl Iterator<Item = &'m Member>,
        chosen: Option<Vec<Pick<'m>>>,
    ) -> Explanation {
        let placed = chosen.is_some();
        let chosen = chosen.into_iter().flatten();
        let copies: HashMap<_, u32> =
            chosen.map(|Pick { candidate, copies }| (name_of(candidate.member), copies)).collect();
        let mut fits: Vec<_> =
            members.map(|member| (self.judge(member), copies.get(&name_of(member)))).collect();
        fits.sort_unstable_by_key(|(fit, _)| nearest_first(fit));
        let reasons = fits.iter().map(|(fit, copies)| self.reason(fit, copies.copied().unwrap_or(0)));
        let mut platforms: Vec<Reason> = reasons.collect();
        platforms
            .sort_by_key(|reason| (Reverse(reason.copies), Reverse(reason.score.map(|score| score.total()))));
        Explanation {
            vm_type: self.wish.vm_type.clone(),
            count: self.wish.count,
            policy: self.rule.policy,
            placed,
            platforms,
        }
    }
}

/// What platforms are sorted by that are in the way of a decision.
fn nearest_first<'m>(fit: &Fit<'m>) -> (Reverse<u32>, Option<Cause>, (&'m str, &'m str, SocketAddr)) {
    (Reverse(fit.candidate.room), fit.cause, name_of(fit.candidate.member))
}
