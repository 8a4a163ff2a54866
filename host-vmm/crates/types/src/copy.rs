//! The copies of a fork that are yet to be made.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One copy of a fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct CopySpec {
    /// ID of the VM to be.
    pub id: Uuid,
    /// Which of the fork's copies it is, from 1.
    pub index: u32,
}

/// Whether these may be some of the copies of a fork that makes `total`: it comes from another platform.
pub fn are_copies_of_fork(slots: &[CopySpec], total: u32) -> bool {
    let ids: BTreeSet<Uuid> = slots.iter().map(|slot| slot.id).collect();
    let are_sorted = slots.is_sorted_by(|one, next| one.index < next.index);
    let are_within = slots.iter().all(|slot| (1..=total).contains(&slot.index) && !slot.id.is_nil());
    !slots.is_empty() && ids.len() == slots.len() && are_sorted && are_within
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_told_apart() {
        let all = [1, 2, 3, 4].map(|index| CopySpec { id: Uuid::from_u128(index.into()), index });
        assert!(
            are_copies_of_fork(&all, 4) && are_copies_of_fork(&all[2..], 4) && are_copies_of_fork(&all, 9)
        );
        let other = |index, id| CopySpec { id: Uuid::from_u128(id), index };
        for (slots, why) in [
            (vec![], "none"),
            (vec![other(0, 1)], "from 1"),
            (vec![other(5, 1)], "more than there are"),
            (vec![other(2, 1), other(1, 2)], "not in order"),
            (vec![other(1, 1), other(1, 2)], "one twice"),
            (vec![other(1, 1), other(2, 1)], "two with one ID"),
            (vec![other(1, 0)], "no ID"),
        ] {
            assert!(!are_copies_of_fork(&slots, 4), "{why}");
        }
    }
}
