//! Whether a platform may take copies, and for how many it has room.

use std::collections::HashMap;

use types::{Locality, VmShape};

use super::{Cause, Policy, Rule, Rules, Wish};
use crate::member::{Load, Member};

/// A copy is charged this part of its guest's memory: it is copy-on-write, and shares what it does not write
/// to. It is an estimate, on the safe side for workers that serve; those that write to more show in what
/// memory is available.
pub const COPY_SHARE: u64 = 16;

/// What copies on one platform are charged of its memory, in bytes: a part for each, and, where it is not the
/// platform of the VM that is copied, the guest's memory once. That holds even where the image is already: it
/// may be on a disk, or be let go of by then.
pub fn charge_bytes(config: VmShape, copies: u32, on_source: bool) -> u64 {
    u64::try_from(charge(config, copies, on_source)).unwrap_or(u64::MAX)
}

fn charge(config: VmShape, copies: u32, on_source: bool) -> u128 {
    let copies_bytes = u128::from(copy_bytes(config)) * u128::from(copies);
    if copies == 0 { 0 } else { copies_bytes + u128::from(image_bytes(config, on_source)) }
}

fn image_bytes(config: VmShape, on_source: bool) -> u64 {
    if on_source { 0 } else { config.ram_bytes }
}

fn copy_bytes(config: VmShape) -> u64 {
    (config.ram_bytes / COPY_SHARE).max(1)
}

/// How many copies memory is left for, at most `most`.
fn copies_within(available_bytes: u64, config: VmShape, most: u32, on_source: bool) -> u32 {
    if charge(config, most, on_source) <= u128::from(available_bytes) {
        return most;
    }
    let copies = available_bytes.saturating_sub(image_bytes(config, on_source)) / copy_bytes(config);
    u32::try_from(copies).map_or(most, |copies| copies.min(most))
}

/// What of a platform's memory can be had, in bytes: never more than it has, whatever it tells.
pub(super) fn available_bytes(load: &Load) -> u64 {
    load.memory_available_bytes.min(load.memory_bytes)
}

/// Evaluation of platforms for a wish, under the rule that the wish falls under.
#[derive(Debug)]
pub(super) struct Evaluation<'r> {
    pub(super) rule: &'r Rule,
    pub(super) wish: &'r Wish,
    /// Where platforms stand among those that are pinned.
    pinned: HashMap<&'r str, usize>,
}

/// A platform that has room for one copy at least.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate<'m> {
    pub(super) member: &'m Member,
    /// Whether it is the platform of the VM that is copied.
    pub(super) is_source: bool,
    /// Copies that it has room for, at most as many as are wished for.
    pub(super) room: u32,
}

/// Fit of a platform for a wish.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fit<'m> {
    /// Its room is 0 where it may take none.
    pub(super) candidate: Candidate<'m>,
    /// Why it takes no more copies than that, unless it could take all.
    pub(super) cause: Option<Cause>,
}

impl<'r> Evaluation<'r> {
    pub(super) fn new(rules: &'r Rules, wish: &'r Wish) -> Self {
        let rule = rules.of(&wish.vm_type);
        Self { rule, wish, pinned: rule.pinned.iter().map(String::as_str).zip(0..).collect() }
    }

    /// Where a platform stands among those that are pinned.
    pub(super) fn pinned_at(&self, member: &Member) -> Option<usize> {
        self.pinned.get(member.name.as_str()).copied()
    }

    /// Whether all copies must stay on the source.
    pub(super) fn only_local(&self) -> bool {
        self.rule.policy == Policy::Local || self.wish.location == Locality::Local
    }

    /// The first label that a platform must have and has not, and its value.
    pub(super) fn wrong_label<'a>(&'a self, member: &Member) -> Option<(&'a str, &'a str)> {
        let mut labels = self.rule.labels.iter();
        let wrong = labels.find(|(label, value)| member.labels.get(*label) != Some(*value));
        wrong.map(|(label, value)| (label.as_str(), value.as_str()))
    }

    /// Judges a platform.
    pub(super) fn judge<'m>(&self, member: &'m Member) -> Fit<'m> {
        let is_source = member.name == self.wish.source;
        let (room, cause) = match self.forbids(member, is_source) {
            Some(cause) => (0, Some(cause)),
            None => self.room(&member.load, is_source),
        };
        Fit { candidate: Candidate { member, is_source, room }, cause }
    }

    /// Why a platform may take no copies, whatever room it has.
    fn forbids(&self, member: &Member, is_source: bool) -> Option<Cause> {
        let differs =
            |wished: &Option<String>, found: &String| wished.as_ref().is_some_and(|wished| wished != found);
        if !is_source && self.only_local() {
            Some(Cause::OnlyLocal)
        } else if is_source && self.wish.location == Locality::Remote {
            Some(Cause::OnlyRemote)
        } else if self.rule.policy == Policy::Pinned && self.pinned_at(member).is_none() {
            Some(Cause::NotPinned)
        } else if differs(&self.rule.cluster, &member.cluster) {
            Some(Cause::Cluster)
        } else if differs(&self.rule.cpu_profile, &member.cpu_profile) {
            Some(Cause::CpuProfile)
        } else if self.wrong_label(member).is_some() {
            Some(Cause::Label)
        } else {
            member.load.draining.then_some(Cause::Draining)
        }
    }

    /// How many copies a platform has room for, and what there is no more of.
    fn room(&self, load: &Load, is_source: bool) -> (u32, Option<Cause>) {
        let Wish { count, config, .. } = *self.wish;
        let by_nodes = load.max_vms.saturating_sub(load.vms).min(count);
        let by_memory = copies_within(available_bytes(load), config, by_nodes, is_source);
        let cause = if by_memory < by_nodes {
            Some(Cause::Memory)
        } else {
            (by_nodes < count).then_some(Cause::NoNode)
        };
        (by_memory, cause)
    }
}
