//! What one platform can say in JSON, the other understands.

use std::fmt::Debug;

use cluster::{
    member::Load,
    membership::check,
    placement::{Cause, Explanation, Obstacle, Policy, Reason as Verdict, Score, Wish},
};
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use types::VmShape;

use super::*;

/// The same, as somebody else understands it.
fn told<T: Serialize + DeserializeOwned>(value: &T) -> T {
    serde_json::from_slice(&serde_json::to_vec(value).unwrap()).unwrap()
}

/// Checks that it is understood as what it is.
fn check_told<T: Serialize + DeserializeOwned + Debug>(value: &T) -> Result<(), TestCaseError> {
    prop_assert_eq!(format!("{:?}", told(value)), format!("{:?}", value));
    Ok(())
}

/// A member whose configuration was taken: labels are what an operator likes, within what is allowed.
fn member(label: &str) -> Member {
    Member {
        name: "north".into(),
        cluster: "production".into(),
        address: "192.0.2.1:7070".parse().unwrap(),
        labels: [("zone".to_owned(), label.to_owned())].into(),
        cpu_profile: String::new(),
        load: Load::default(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_said_of_vms_is_understood(text in "\\p{Any}{0,200}", times in 0..100_usize, number: u64) {
        let long = text.repeat(times);
        let id = Uuid::from_u128(number.into());
        check_told(&Failure { error: long.as_str().into() })?;
        check_told(&Spawned { vms: vec![Copied { id, name: long.as_str().into() }] })?;
        for placement in [Placement::Local, Placement::Remote] {
            let (name, platform) = (long.as_str().into(), long.as_str().into());
            check_told(&Forked { vms: vec![ForkedVm { id, name, index: 1, platform, placement }] })?;
        }
        let ended = vec![Ended { id, name: long.clone(), parent: Some(id), why: Some(long.as_str().into()) }];
        check_told(&Vms { vms: Vec::new(), ended })?;
        let versions = Versions { oldest: 1, newest: u32::try_from(number).unwrap_or(u32::MAX) };
        check_told(&Version { vmm: long.clone(), api: VERSION, capsules: versions, states: versions })?;
        let (image, original, to) = (id, id, long.clone());
        let sent = Transfer {
            id, image, original, original_name: long, to, wanted_bytes: number, sent_bytes: 0, spared_bytes: 0,
        };
        check_told(&vec![sent])?;
    }

    #[test]
    fn what_is_said_between_platforms_is_understood_and_taken(
        label in "[ -~]{0,63}", number: u32, lazy: bool,
    ) {
        let member = member(&label);
        prop_assert_eq!(&check::parse(&serde_json::to_vec(&member).unwrap()).unwrap(), &member);
        check_told(&Platforms { platforms: vec![Platform { member, age_ms: 5 }], partitioned: lazy })?;
        let shape = VmShape { ram_bytes: 1 << 30, vcpus: 1 };
        let (source, images) = ("north".to_owned(), vec![Uuid::from_u128(number.into())]);
        let wish = Wish { vm_type: "web".into(), count: number, config: shape, location: Locality::Any, images, source };
        check_told(&wish)?;
        let obstacle = Some(Obstacle { cause: Cause::Label, text: label.clone() });
        let score = Some(Score::default());
        let platforms = vec![Verdict { platform: label.clone(), copies: number, room: number, obstacle, score }];
        let explanation =
            Explanation { vm_type: label.clone(), count: number, policy: Policy::Spread, placed: lazy, platforms };
        check_told(&explanation)?;
        check_told(&CloneWish { from: Some(label.clone()), to: label, count: number, lazy })?;
        check_told(&ForkWish { count: number, location: Locality::Remote })?;
    }
}
