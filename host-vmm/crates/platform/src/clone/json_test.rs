//! What one side of a clone says in JSON, the other understands.

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use types::are_copies_of_fork;
use uuid::Uuid;

use super::*;

/// The same, as somebody else understands it.
fn told<T: Serialize + DeserializeOwned>(value: &T) -> T {
    serde_json::from_slice(&serde_json::to_vec(value).unwrap()).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_said_of_a_clone_is_understood(text in "\\p{Any}{0,200}", times in 0..100_usize, id: u128) {
        let long = text.repeat(times);
        let vms = vec![Copied { id: Uuid::from_u128(id), name: long.as_str().into() }];
        let (committed, aborted) = (Stage::Committed { vms }, Stage::Aborted { why: long.as_str().into() });
        for stage in [Stage::Reserved, Stage::Receiving, Stage::Preparing, Stage::Prepared, committed, aborted] {
            prop_assert_eq!(&told(&stage), &stage);
        }
    }

    #[test]
    fn what_is_asked_for_a_clone_is_understood_and_taken(
        ids in proptest::collection::btree_set(1..u128::MAX, 1..1024), number: u32, lazy: bool,
    ) {
        let slots: Vec<_> = (1..).zip(ids).map(|(index, id)| CopySpec { id: Uuid::from_u128(id), index }).collect();
        let total = u32::try_from(slots.len()).unwrap();
        let order = told(&Order { source: "north".into(), slots, total, lazy });
        prop_assert!(are_copies_of_fork(&order.slots, order.total));
        let missing = Missing { chunks: vec![0..1, 2..number.max(3)] };
        prop_assert!(told(&missing) == missing && missing.is_sound());
        let need = Need { chunks: vec![number; 64], urgent: lazy };
        prop_assert_eq!(told(&need), need);
    }
}
