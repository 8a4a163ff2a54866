use proptest::prelude::*;

use super::*;
use crate::member::Load;

const LEASE: Duration = Duration::from_secs(10);

fn member(cluster: &str, name: &str, vms: u32) -> Member {
    Member {
        name: name.into(),
        cluster: cluster.into(),
        address: "192.0.2.1:7070".parse().unwrap(),
        labels: BTreeMap::new(),
        cpu_profile: String::new(),
        load: Load { vms, ..Load::default() },
    }
}

fn known(has_etcd: bool) -> Known {
    Known::new(&member("web", "own", 0), LEASE, has_etcd)
}

fn names(view: &View) -> Vec<(&str, &str, u32)> {
    view.members
        .iter()
        .map(|KnownMember { member, .. }| (&*member.cluster, &*member.name, member.load.vms))
        .collect()
}

fn register(known: &mut Known, members: &[Member], at: Instant) {
    known.change_registered(|registered| {
        registered.confirmed = Some(at);
        registered.members =
            members.iter().map(|member| (member.name.clone(), (Arc::new(member.clone()), at))).collect();
    });
}

#[test]
fn one_that_is_silent_for_the_lease_time_is_gone_until_it_answers() {
    let (mut known, start) = (known(false), Instant::now());
    known.answer(member("web", "a", 1), start);
    known.answer(member("web", "b", 1), start + LEASE / 2);
    let just_before = start + LEASE - Duration::from_nanos(1);
    let view = known.view(just_before);
    assert_eq!(names(&view), [("web", "a", 1), ("web", "b", 1)]);
    assert_eq!(known.expires(), Some(start + LEASE));

    let later = known.view(start + LEASE);
    assert_eq!(names(&later), [("web", "b", 1)]);
    assert!(later.version > view.version);
    known.answer(member("web", "a", 2), start + LEASE);
    assert_eq!(names(&known.view(start + LEASE)), [("web", "a", 2), ("web", "b", 1)]);
}

#[test]
fn a_view_is_the_same_one_until_something_changes() {
    let (mut known, start) = (known(false), Instant::now());
    known.answer(member("web", "a", 1), start);
    let view = known.view(start);
    assert!(Arc::ptr_eq(&view, &known.view(start + LEASE / 2)));
    known.answer(member("web", "a", 1), start);
    assert!(!Arc::ptr_eq(&view, &known.view(start + LEASE / 2)));
    // Whoever has a view keeps it.
    assert_eq!(names(&view), [("web", "a", 1)]);
    assert!(view.find("web", "a").is_some() && view.find("db", "a").is_none());
}

#[test]
fn a_name_that_two_clusters_have_stands_for_neither() {
    let (mut known, start) = (known(false), Instant::now());
    for (cluster, name) in [("web", "a"), ("web", "b"), ("db", "b"), ("db", "c")] {
        known.answer(member(cluster, name, 1), start);
    }
    let view = known.view(start);
    assert_eq!(
        ["a", "b", "c", "d", "own"].map(|name| view.is_alone("web", name)),
        [true, false, false, false, false]
    );
}

#[test]
fn what_etcd_had_stays_and_ages() {
    let (mut known, start) = (known(true), Instant::now());
    register(&mut known, &[member("web", "a", 1), member("web", "own", 1)], start);
    let view = known.view(start + 100 * LEASE);
    assert_eq!(names(&view), [("web", "a", 1)], "the own entry is no other platform");
    assert_eq!((view.members[0].last_seen, view.members[0].source), (start, Source::Etcd));
}

#[test]
fn what_was_heard_last_counts() {
    let (mut known, start) = (known(true), Instant::now());
    register(&mut known, &[member("web", "a", 1)], start);
    known.answer(member("web", "a", 2), start + LEASE / 2);
    known.answer(member("db", "a", 3), start);
    known.answer(member("web", "own", 4), start);
    assert_eq!(names(&known.view(start + LEASE / 2)), [("db", "a", 3), ("web", "a", 2)]);
    register(&mut known, &[member("web", "a", 5)], start + LEASE);
    assert_eq!(names(&known.view(start + LEASE)), [("web", "a", 5)]);
}

#[test]
fn a_platform_without_etcd_for_the_lease_time_is_partitioned() {
    let start = Instant::now();
    assert_eq!(known(false).status(start), Status::Listed);
    let mut known = known(true);
    assert_eq!(known.status(start), Status::Partitioned);
    register(&mut known, &[], start);
    assert_eq!(known.status(start + LEASE / 2), Status::Joined);
    assert_eq!(known.status(start + LEASE), Status::Partitioned);
    known.change_registered(|registered| registered.name_taken = true);
    assert_eq!(known.status(start), Status::NameTaken);
}

proptest! {
    /// Against a list of all that was ever said.
    #[test]
    fn a_view_has_the_latest_answer_of_each_that_has_answered_lately(
        answers in proptest::collection::vec((0..4usize, 0..3000u64, any::<bool>()), 0..40),
    ) {
        let (mut known, mut now) = (known(false), Instant::now());
        let (mut said, mut version) = (Vec::new(), 0);
        for (number, (who, ms, looks)) in (0..).zip(answers) {
            let name = ["a", "b", "c", "own"][who];
            known.answer(member("web", name, number), now);
            said.push((name, number, now));
            now += Duration::from_millis(ms);
            if !looks {
                continue;
            }
            let expected = ["a", "b", "c"].into_iter().filter_map(|name| {
                let latest = said.iter().rev().find(|(who, ..)| *who == name);
                latest.filter(|(.., last_seen)| now < *last_seen + LEASE).map(|(_, number, _)| ("web", name, *number))
            });
            let view = known.view(now);
            prop_assert_eq!(names(&view), expected.collect::<Vec<_>>());
            prop_assert!(view.version >= version);
            version = view.version;
        }
    }
}
