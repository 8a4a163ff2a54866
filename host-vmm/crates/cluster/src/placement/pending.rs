//! Pending placements: copies that were placed on platforms since these have reported on themselves.
//!
//! What a source knows of others is a little old. If it did not count what it has placed since, it would send
//! the next copies there too.

use std::{
    borrow::Cow,
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use types::VmShape;

use super::{charge_bytes, room::available_bytes};
use crate::member::{Load, Member};

/// For how long copies that are on their way are counted where their platform tells nothing more: they may
/// not have come.
const COUNTED: Duration = Duration::from_secs(30);

/// Copies that were placed on a platform. Dropping it says that this is about to know of them, or that they
/// do not go there.
#[derive(Debug)]
#[must_use]
pub struct Claim(Arc<OnceLock<Instant>>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.get_or_init(Instant::now);
    }
}

/// Copies on their way to a platform, as they are counted.
#[derive(Debug)]
struct PendingPlacement {
    config: VmShape,
    copies: u32,
    /// Since when their platform may know of them.
    known: Arc<OnceLock<Instant>>,
}

impl PendingPlacement {
    fn counts(&self, now: Instant) -> bool {
        self.known.get().is_none_or(|known| now.saturating_duration_since(*known) < COUNTED)
    }
}

/// Pending placements, by the names of their platforms.
#[derive(Debug, Default)]
pub struct PendingPlacements(HashMap<String, Vec<PendingPlacement>>);

impl PendingPlacements {
    /// Copies are placed on a platform.
    pub fn enter(&mut self, platform: &str, config: VmShape, copies: u32, now: Instant) -> Claim {
        self.0.retain(|_, placed| {
            placed.retain(|placed| placed.counts(now));
            !placed.is_empty()
        });
        let known = Arc::default();
        let claim = Claim(Arc::clone(&known));
        self.0.entry(platform.to_owned()).or_default().push(PendingPlacement { config, copies, known });
        claim
    }

    /// A platform as it has reported itself at a time, with the copies of which it did not know then.
    pub fn count<'m>(&self, member: &'m Member, reported_at: Instant, now: Instant) -> Cow<'m, Member> {
        let is_unreported = |placed: &&PendingPlacement| {
            placed.counts(now) && placed.known.get().is_none_or(|known| reported_at <= *known)
        };
        let placed = self.0.get(&member.name).into_iter().flatten().filter(is_unreported);
        placed.fold(Cow::Borrowed(member), |mut member, PendingPlacement { config, copies, .. }| {
            count(&mut member.to_mut().load, *config, *copies, false);
            member
        })
    }
}

/// Counts copies on a platform; the VM that is copied may be there.
pub fn count(load: &mut Load, config: VmShape, copies: u32, on_source: bool) {
    load.vms = load.vms.saturating_add(copies);
    load.memory_available_bytes =
        available_bytes(load).saturating_sub(charge_bytes(config, copies, on_source));
}
