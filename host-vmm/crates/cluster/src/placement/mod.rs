//! Placement: which platforms the copies of a VM go to.
//!
//! A decision is pure. [`place`] is given the operator's [`Rules`], a [`Wish`], and what the platforms tell
//! of themselves; it calculates in integers, and where platforms are equal their names decide. So every
//! platform that knows the same comes to the same result, in whatever order it knows it. All copies of a fork
//! are placed in one decision: each counts against the platform that gets it before the next one is placed,
//! and if one can't be placed, none is.
//!
//! - `rules`: what the operator wants, by VM type: a [`Policy`], and what a platform must be.
//! - `room`: whether a platform may take copies, and how many it has room for.
//! - `score`: how well it is suited, as the sum of a few parts ([`Score`]).
//! - `choice`: the policies.
//! - `pending`: what was placed since others have told of themselves.
//! - `reason`: the answer to "why there", and to "why not there".
//!
//! What platforms tell is believed as far as it is possible: numbers out of range give a bad place at worst.
//! Each platform decides by itself whether it takes what is sent to it, since by then it may be fuller than
//! it was.

use serde::{Deserialize, Serialize};
use types::{Locality, VmShape};
use utoipa::ToSchema;
use uuid::Uuid;

mod choice;
mod pending;
mod reason;
mod room;
mod rules;
mod score;

pub use pending::{Claim, PendingPlacements, count};
pub use reason::{Cause, Explanation, MAX_TOLD, Obstacle, Reason, Unplaceable};
pub use room::{COPY_SHARE, charge_bytes};
pub use rules::{Error, Policy, Rule, Rules};
pub use score::Score;

use self::{
    choice::{Pick, choose},
    room::Evaluation,
};
use super::member::Member;

/// Copies that are to be placed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Wish {
    /// Their type.
    pub vm_type: String,
    /// How many; where a guest asks, as many at most as one fork may make.
    pub count: u32,
    /// Their shape.
    pub config: VmShape,
    /// Where the guest wants them.
    pub location: Locality,
    /// Their image, and then its ancestors.
    pub images: Vec<Uuid>,
    /// Name of the platform where the VM is that is copied.
    pub source: String,
}

/// Allocation of copies to one platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// Its name.
    pub platform: String,
    /// How many; not 0.
    pub count: u32,
}

/// Where copies go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// By which policy.
    pub policy: Policy,
    /// Who gets how many, by name: as many as were wished for, together.
    pub shares: Vec<Allocation>,
    /// What spoke for each of them, in the same order.
    pub reasons: Vec<Reason>,
}

/// Places all copies that are wished for.
///
/// A decision looks at each member once, and sorts none but those that it may use: its time grows with the
/// number of members, and with the number of images that each tells of where ancestors are asked for.
///
/// # Errors
/// [`Unplaceable`]: there is not enough room on the platforms that may take copies.
pub fn place<'m>(
    rules: &Rules,
    wish: &Wish,
    members: impl IntoIterator<Item = &'m Member, IntoIter: Clone>,
) -> Result<Decision, Unplaceable> {
    let (evaluation, members) = (Evaluation::new(rules, wish), members.into_iter());
    let chosen = choose(&evaluation, members.clone()).ok_or_else(|| evaluation.unplaceable(members))?;
    let share = |chosen: &Pick<'_>| Allocation {
        platform: chosen.candidate.member.name.clone(),
        count: chosen.copies,
    };
    let reason =
        |chosen: &Pick<'_>| evaluation.reason(&evaluation.judge(chosen.candidate.member), chosen.copies);
    Ok(Decision {
        policy: evaluation.rule.policy,
        shares: chosen.iter().map(share).collect(),
        reasons: chosen.iter().map(reason).collect(),
    })
}

/// Tells what [`place`] makes of each member, and why.
pub fn explain<'m>(
    rules: &Rules,
    wish: &Wish,
    members: impl IntoIterator<Item = &'m Member, IntoIter: Clone>,
) -> Explanation {
    let (evaluation, members) = (Evaluation::new(rules, wish), members.into_iter());
    let chosen = choose(&evaluation, members.clone());
    evaluation.explanation(members, chosen)
}

#[cfg(test)]
#[path = "placement_test.rs"]
mod tests;
