use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use proptest::{collection::vec, prelude::*, sample::subsequence};

use super::*;
use crate::member::{Load, Ready};

const MIB: u64 = 1 << 20;
const SHAPE: VmShape = VmShape { ram_bytes: 512 * MIB, vcpus: 1 };

/// A platform with nothing to do: 16 processors, 64 GiB, 100 nodes.
fn idle(name: &str) -> Member {
    let load = Load {
        max_vms: 100,
        processors: 16,
        memory_bytes: 65_536 * MIB,
        memory_available_bytes: 60_000 * MIB,
        ..Load::default()
    };
    Member {
        name: name.to_owned(),
        cluster: "main".to_owned(),
        address: ([10, 0, 0, 1], 7000).into(),
        labels: BTreeMap::new(),
        cpu_profile: String::new(),
        load,
    }
}

/// One with something to do.
fn busy(name: &str, change: impl FnOnce(&mut Load)) -> Member {
    let mut member = idle(name);
    change(&mut member.load);
    member
}

fn wish(count: u32) -> Wish {
    Wish {
        vm_type: "web".to_owned(),
        count,
        config: SHAPE,
        location: Locality::Any,
        images: Vec::new(),
        source: "a".to_owned(),
    }
}

fn rules(rule: Rule) -> Rules {
    Rules::new(BTreeMap::from([("*".to_owned(), rule)])).unwrap()
}

fn policy(policy: Policy) -> Rules {
    rules(Rule { policy, ..Rule::default() })
}

/// Who gets how many, as `a:2 b:1`.
fn placed(rules: &Rules, wish: &Wish, members: &[Member]) -> String {
    let shares = place(rules, wish, members).unwrap().shares;
    shares
        .iter()
        .map(|Allocation { platform, count }| format!("{platform}:{count}"))
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn a_copy_stays_until_another_platform_has_enough_to_make_up_for_the_image() {
    let crowded = |vms| [busy("a", |load| load.vms = vms), idle("b")];
    let least = policy(Policy::LeastLoaded);
    assert_eq!(placed(&least, &wish(1), &crowded(2)), "a:1");
    assert_eq!(placed(&least, &wish(1), &crowded(60)), "b:1");
    assert_eq!(placed(&least, &wish(4), &crowded(0)), "a:4");
    // From then on the image is on both.
    assert_eq!(placed(&least, &wish(40), &crowded(0)), "a:20 b:20");
}

#[test]
fn each_part_of_the_score_counts() {
    type Worsening = (&'static str, fn(&mut Load));
    let id = Uuid::from_u128(7);
    let worsenings: [Worsening; 7] = [
        ("memory", |load| load.memory_available_bytes /= 2),
        ("memory-pressure", |load| load.memory_pressure_permille = 100),
        ("processors", |load| load.processors = 8),
        ("cpu-pressure", |load| load.cpu_pressure_permille = 300),
        ("nodes", |load| load.max_vms = 1),
        ("ready", |load| load.ready.clear()),
        ("image", |load| load.images.clear()),
    ];
    let ready = Ready { config: SHAPE, shells: 1 };
    let wish = Wish { images: vec![id], source: "elsewhere".to_owned(), ..wish(1) };
    let full = |load: &mut Load| (load.images, load.ready) = (vec![id], vec![ready]);
    for (part, worsen) in worsenings {
        let worse = busy("b", |load| {
            full(load);
            worsen(load);
        });
        let members = [worse, busy("c", full)];
        let policy = policy(Policy::LeastLoaded);
        assert_eq!(placed(&policy, &wish, &members), "c:1", "{part}");
        let platforms = explain(&policy, &wish, &members).platforms;
        let parts = |reason: &Reason| BTreeMap::from(reason.score.unwrap().parts());
        let (best, other) = (parts(&platforms[0]), parts(&platforms[1]));
        let differ: Vec<_> = best.keys().filter(|name| best[*name] != other[*name]).collect();
        assert_eq!(differ, [&part]);
    }
}

#[test]
fn an_ancestor_is_half_an_image_and_a_copy_brings_the_image() {
    let (image, ancestor) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let wish = Wish { images: vec![image, ancestor], location: Locality::Remote, ..wish(2) };
    let members = [
        idle("a"),
        busy("b", |load| load.images = vec![ancestor]),
        busy("c", |load| load.images = vec![image]),
        idle("d"),
    ];
    let explanation = explain(&policy(Policy::LeastLoaded), &wish, &members);
    let image = |reason: &Reason| (reason.platform.clone(), reason.score.map(|score| score.image));
    let images: Vec<_> = explanation.platforms.iter().map(image).collect();
    let expected = [("c", Some(2000)), ("b", Some(1000)), ("d", Some(0)), ("a", None)];
    assert_eq!(images, expected.map(|(name, points)| (name.to_owned(), points)));
    assert_eq!(placed(&policy(Policy::LeastLoaded), &wish, &[idle("d"), idle("e")]), "d:2");
}

#[test]
fn single_copies_are_spread_too() {
    let mut members = ["a", "b", "c"].map(idle);
    for _ in 0..10 {
        let decision = place(&policy(Policy::Spread), &wish(1), &members).unwrap();
        let chosen = members.iter_mut().find(|member| member.name == decision.shares[0].platform).unwrap();
        chosen.load.vms += 1;
    }
    let mut vms = members.map(|member| member.load.vms);
    vms.sort_unstable();
    assert_eq!(vms, [3, 3, 4]);
}

#[test]
fn packed_copies_leave_empty_platforms_empty() {
    let pack = policy(Policy::Pack);
    let with = |name, vms| busy(name, |load| load.vms = vms);
    let members = [with("a", 40), with("b", 70), with("c", 99), idle("d"), idle("e")];
    assert_eq!(placed(&pack, &wish(1), &members), "c:1");
    assert_eq!(placed(&pack, &wish(30), &members), "b:30");
    assert_eq!(placed(&pack, &wish(31), &members), "a:31");
    assert_eq!(placed(&pack, &wish(80), &members), "a:60 b:20");
    assert_eq!(placed(&pack, &wish(91), &members), "a:60 b:30 c:1");
    assert_eq!(placed(&pack, &wish(92), &members), "d:92");
    assert_eq!(placed(&pack, &wish(150), &members), "a:50 d:100");
}

#[test]
fn pinned_platforms_are_filled_in_their_order() {
    let members = ["a", "b", "c"].map(idle);
    let pinned = vec!["c".to_owned(), "z".to_owned(), "a".to_owned()];
    let rules = rules(Rule { policy: Policy::Pinned, pinned, ..Rule::default() });
    assert_eq!(placed(&rules, &wish(3), &members), "c:3");
    assert_eq!(placed(&rules, &wish(120), &members), "a:20 c:100");
    let reason = &place(&rules, &wish(201), &members).unwrap_err().platforms[2];
    assert_eq!((reason.platform.as_str(), reason.obstacle.as_ref().unwrap().cause), ("b", Cause::NotPinned));
}

#[test]
fn only_other_platforms_are_charged_the_image() {
    let small = |name| busy(name, |load| load.memory_available_bytes = 600 * MIB);
    let local = Wish { location: Locality::Local, ..wish(18) };
    assert_eq!(placed(&Rules::default(), &local, &[small("a"), small("b")]), "a:18");
    let remote = Wish { location: Locality::Remote, ..wish(2) };
    assert_eq!(placed(&Rules::default(), &remote, &[small("a"), small("b")]), "b:2");
    let error =
        place(&Rules::default(), &Wish { count: 3, ..remote }, &[small("a"), small("b")]).unwrap_err();
    assert_eq!(error.room, 2);
    assert!(
        error.to_string().contains("b: room for 2, 600 MiB of memory are left, and all copies need 608"),
        "{error}"
    );
    assert_eq!([0, 1, 2].map(|copies| charge_bytes(SHAPE, copies, false) / MIB), [0, 544, 576]);
    assert_eq!([0, 1, 2].map(|copies| charge_bytes(SHAPE, copies, true) / MIB), [0, 32, 64]);
}

#[test]
fn an_operator_is_told_what_is_in_the_way() {
    let rules = rules(Rule {
        policy: Policy::Spread,
        labels: BTreeMap::from([("zone".to_owned(), "north".to_owned())]),
        cluster: Some("main".to_owned()),
        cpu_profile: Some("v3".to_owned()),
        ..Rule::default()
    });
    let fits = |name| {
        let labels = BTreeMap::from([("zone".to_owned(), "north".to_owned())]);
        Member { labels, cpu_profile: "v3".to_owned(), ..idle(name) }
    };
    let mut members = ["a", "b", "c", "d", "e", "f", "g"].map(fits);
    members[1].labels.insert("zone".to_owned(), "south".to_owned());
    members[2].labels.clear();
    members[3].cpu_profile.clear();
    members[4].cluster = "other".to_owned();
    members[5].load.draining = true;
    members[6].load.vms = 98;
    let error = place(&rules, &Wish { location: Locality::Remote, ..wish(3) }, &members).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there is room for 2 of 3 copies of \"web\" (policy spread): g: room for 2, 98 of 100 nodes are taken; \
         f: it is draining; b: its label zone is \"south\", not \"north\"; \
         c: it has no label zone, which must be \"north\"; d: its CPU profile is \"\", not \"v3\"; \
         e: it is in cluster \"other\", not in \"main\"; \
         a: the VM is there, and a remote platform was asked for"
    );
    let json = serde_json::to_string(&error).unwrap();
    assert!(json.contains(r#""cause":"cpu-profile""#), "{json}");
    assert_eq!(serde_json::from_str::<Unplaceable>(&json).unwrap(), error);
    for (wish, rules, told) in [
        (
            Wish { location: Locality::Local, source: "y".to_owned(), ..wish(1) },
            Rules::default(),
            "only \"y\" was asked",
        ),
        (Wish { source: "y".to_owned(), ..wish(1) }, policy(Policy::Local), "must stay on \"y\""),
    ] {
        let error = place(&rules, &wish, &members).unwrap_err().to_string();
        assert!(error.contains(told), "{error}");
    }
    assert!(place(&rules, &wish(1), &[]).unwrap_err().to_string().ends_with("no platform is known"));
}

#[test]
fn of_many_platforms_a_few_are_told_and_the_others_counted() {
    let full = |at: usize| {
        busy(&format!("p{at:04}"), |load| {
            load.draining = at < 900;
            load.vms = 100;
        })
    };
    let members: Vec<Member> = (0..1000).map(full).collect();
    let error = place(&Rules::default(), &wish(1), &members).unwrap_err();
    assert_eq!(error.platforms.len(), MAX_TOLD);
    assert_eq!(error.others, BTreeMap::from([(Cause::NoNode, 36), (Cause::Draining, 900)]));
    let text = error.to_string();
    assert!(text.contains(": p0900: 100 of 100 nodes are taken; p0901: "), "{text}");
    assert!(text.ends_with("; and 992 others: 92 without a free node, 900 draining"), "{text}");
}

#[test]
fn an_explanation_has_a_row_for_each_platform() {
    let members = [idle("a"), busy("b", |load| load.draining = true), busy("c", |load| load.vms = 99)];
    let explanation = explain(&policy(Policy::Spread), &wish(2), &members);
    let rows = explanation.rows();
    assert_eq!(rows.len(), 3);
    assert_eq!((rows[0][0].as_str(), rows[0][1].as_str(), rows[0][11].as_str()), ("a", "1", ""));
    assert_eq!(
        (rows[1][0].as_str(), rows[1][2].as_str(), rows[1][11].as_str()),
        ("c", "1", "99 of 100 nodes are taken")
    );
    assert_eq!(
        (rows[2][0].as_str(), rows[2][3].as_str(), rows[2][11].as_str()),
        ("b", "-", "it is draining")
    );
    let json = serde_json::to_string(&explanation).unwrap();
    assert_eq!(serde_json::from_str::<Explanation>(&json).unwrap(), explanation);
}

/// Numbers that are likely, and such as only somebody tells who means harm.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0..20u32, 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![6 => (0..8192u64).prop_map(|mib| mib * MIB), 1 => Just(u64::MAX), 1 => any::<u64>()]
}

fn shape() -> impl Strategy<Value = VmShape> {
    let ram_bytes = prop_oneof![4 => Just(512 * MIB), 1 => Just(0), 1 => any::<u64>()];
    (ram_bytes, prop_oneof![Just(1u8), any::<u8>()])
        .prop_map(|(ram_bytes, vcpus)| VmShape { ram_bytes, vcpus })
}

fn images() -> impl Strategy<Value = Vec<Uuid>> {
    subsequence((1..5).map(Uuid::from_u128).collect::<Vec<_>>(), 0..4)
}

fn load() -> impl Strategy<Value = Load> {
    let ready = vec((shape(), number()).prop_map(|(config, shells)| Ready { config, shells }), 0..3);
    let counts = (number(), number(), prop::bool::weighted(0.1));
    (counts, number(), number(), number(), bytes(), bytes(), ready, images()).prop_map(
        |(
            (vms, max_vms, draining),
            processors,
            cpu,
            memory,
            memory_bytes,
            memory_available_bytes,
            ready,
            images,
        )| {
            Load {
                vms,
                max_vms,
                draining,
                processors,
                cpu_pressure_permille: cpu,
                memory_pressure_permille: memory,
                memory_bytes,
                memory_available_bytes,
                ready,
                images,
            }
        },
    )
}

fn member() -> impl Strategy<Value = Member> {
    let zone = prop_oneof![Just(None), Just(Some("north")), Just(Some("south"))];
    let cluster = prop_oneof![4 => Just("main"), 1 => Just("other")];
    let profile = prop_oneof![4 => Just("v3"), 1 => Just("")];
    (zone, cluster, profile, load()).prop_map(|(zone, cluster, profile, load)| Member {
        labels: zone.map(|zone| ("zone".to_owned(), zone.to_owned())).into_iter().collect(),
        cluster: cluster.to_owned(),
        cpu_profile: profile.to_owned(),
        load,
        ..idle("")
    })
}

fn members(most: usize) -> impl Strategy<Value = Vec<Member>> {
    vec(member(), 0..=most).prop_map(|members| {
        let named = members.into_iter().enumerate();
        named.map(|(at, member)| Member { name: format!("p{at}"), ..member }).collect()
    })
}

fn a_wish() -> impl Strategy<Value = Wish> {
    let location =
        prop_oneof![6 => Just(Locality::Any), 1 => Just(Locality::Local), 1 => Just(Locality::Remote)];
    (0..40u32, shape(), location, images(), 0..14u32).prop_map(|(count, config, location, images, source)| {
        Wish { config, location, images, source: format!("p{source}"), ..wish(count) }
    })
}

fn a_rule() -> impl Strategy<Value = Rule> {
    let policy = prop::sample::select(Policy::ALL.map(|(_, policy)| policy).to_vec());
    let wanted = |value: &'static str| prop_oneof![3 => Just(None), 1 => Just(Some(value.to_owned()))];
    let names: Vec<String> = (0..13).map(|at| format!("p{at}")).collect();
    let pinned = subsequence(names, 1..=13).prop_shuffle();
    (policy, wanted("north"), wanted("main"), wanted("v3"), pinned).prop_map(
        |(policy, zone, cluster, cpu_profile, pinned)| Rule {
            policy,
            labels: zone.map(|zone| ("zone".to_owned(), zone)).into_iter().collect(),
            cluster,
            cpu_profile,
            pinned: if policy == Policy::Pinned { pinned } else { Vec::new() },
        },
    )
}

/// Whether a platform may take copies, as one would say it.
fn may(rule: &Rule, wish: &Wish, member: &Member) -> bool {
    let is_source = member.name == wish.source;
    let place_fits = match wish.location {
        Locality::Any => rule.policy != Policy::Local || is_source,
        Locality::Local => is_source,
        Locality::Remote => rule.policy != Policy::Local && !is_source,
    };
    place_fits
        && !member.load.draining
        && (rule.policy != Policy::Pinned || rule.pinned.contains(&member.name))
        && rule.cluster.iter().all(|cluster| *cluster == member.cluster)
        && rule.cpu_profile.iter().all(|profile| *profile == member.cpu_profile)
        && rule.labels.iter().all(|(label, value)| member.labels.get(label) == Some(value))
}

/// The most copies of which memory and nodes allow each, found by trying.
fn naive_room(rule: &Rule, wish: &Wish, member: &Member) -> u32 {
    let Load { vms, max_vms, memory_bytes, memory_available_bytes, .. } = member.load;
    let ram_bytes = u128::from(wish.config.ram_bytes);
    let fits = |copies: &u32| {
        let image = if member.name == wish.source { 0 } else { ram_bytes };
        let memory = image + (ram_bytes / 16).max(1) * u128::from(*copies);
        let nodes = u64::from(vms) + u64::from(*copies) <= max_vms.into();
        may(rule, wish, member) && nodes && memory <= u128::from(memory_bytes.min(memory_available_bytes))
    };
    (1..=wish.count).take_while(fits).last().unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn the_order_of_members_makes_no_difference(
        (members, shuffled) in members(12).prop_flat_map(|members| (Just(members.clone()), Just(members).prop_shuffle())),
        rule in a_rule(),
        wish in a_wish(),
    ) {
        let rules = rules(rule);
        prop_assert_eq!(place(&rules, &wish, &members), place(&rules, &wish, &shuffled));
        prop_assert_eq!(explain(&rules, &wish, &members), explain(&rules, &wish, &shuffled));
    }

    #[test]
    fn all_copies_are_placed_where_they_may_be_or_none(
        members in members(12),
        rule in a_rule(),
        wish in a_wish(),
    ) {
        let rooms: Vec<u32> = members.iter().map(|member| naive_room(&rule, &wish, member)).collect();
        let room: u64 = rooms.iter().map(|room| u64::from(*room)).sum();
        let rules = rules(rule);
        let explanation = explain(&rules, &wish, &members);
        prop_assert_eq!(explanation.rows().len(), members.len());
        match place(&rules, &wish, &members) {
            Ok(decision) => {
                prop_assert_eq!(decision.shares.iter().map(|share| share.count).sum::<u32>(), wish.count);
                for (share, reason) in decision.shares.iter().zip(&decision.reasons) {
                    let at = members.iter().position(|member| member.name == share.platform).unwrap();
                    prop_assert!(share.count > 0 && share.count <= rooms[at], "{:?} of {}", share, rooms[at]);
                    prop_assert_eq!((&reason.platform, reason.copies, reason.room), (&share.platform, share.count, rooms[at]));
                    prop_assert!(explanation.platforms.contains(reason));
                }
                prop_assert_eq!(decision.reasons.len(), decision.shares.len());
                prop_assert!(explanation.placed);
            }
            Err(error) => {
                prop_assert!(room < wish.count.into() && !explanation.placed);
                prop_assert_eq!(error.room, room);
                prop_assert_eq!(error.platforms.len(), members.len());
                prop_assert!(error.platforms.iter().all(|reason| reason.obstacle.is_some()));
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }

    /// The naive model: each copy goes to the best of all platforms.
    #[test]
    fn each_copy_goes_to_the_platform_that_is_best_for_it(
        members in members(12),
        policy in prop::sample::select(vec![Policy::LeastLoaded, Policy::Spread]),
        wish in a_wish(),
    ) {
        let rule = Rule { policy, ..Rule::default() };
        let rules = rules(rule.clone());
        let evaluation = Evaluation::new(&rules, &wish);
        let mut copies: BTreeMap<&str, u32> = BTreeMap::new();
        for _ in 0..wish.count {
            let best = members.iter().filter_map(|member| {
                let before = copies.get(member.name.as_str()).copied().unwrap_or(0);
                let candidate = evaluation.judge(member).candidate;
                (candidate.room > before).then(|| {
                    let score = evaluation.score(&candidate, before);
                    let rank = match policy {
                        Policy::Spread => {
                            let taken = (u64::from(member.load.vms) << 32) / u64::from(member.load.max_vms);
                            (before, taken, u32::MAX - score.load(), u32::MAX - score.locality())
                        }
                        _ => (u32::MAX - score.total(), 0, 0, 0),
                    };
                    (rank, member.name.as_str())
                })
            });
            if let Some((_, name)) = best.min() {
                *copies.entry(name).or_default() += 1;
            }
        }
        let Ok(decision) = place(&rules, &wish, &members) else { return Ok(()) };
        let shares: BTreeMap<_, _> = decision.shares.iter().map(|share| (share.platform.as_str(), share.count)).collect();
        prop_assert_eq!(shares, copies);
    }

    #[test]
    fn spread_copies_are_even_to_within_one(members in members(12), wish in a_wish()) {
        let rule = Rule { policy: Policy::Spread, ..Rule::default() };
        let Ok(decision) = place(&rules(rule.clone()), &wish, &members) else { return Ok(()) };
        let copies = |member: &Member| {
            decision.shares.iter().find(|share| share.platform == member.name).map_or(0, |share| share.count)
        };
        let most = members.iter().map(copies).max().unwrap_or(0);
        for member in &members {
            let is_full = copies(member) == naive_room(&rule, &wish, member);
            prop_assert!(is_full || copies(member) + 1 >= most, "{} has {} of {most}", member.name, copies(member));
        }
    }

    /// The naive model: all sets of platforms.
    #[test]
    fn packed_copies_use_no_more_platforms_than_needed(
        nodes in vec((prop_oneof![Just(0), 1..10u32], 0..10u32), 1..8),
        count in 1..40u32,
    ) {
        let member = |(at, (vms, free)): (usize, &(u32, u32))| {
            busy(&format!("p{at}"), |load| (load.vms, load.max_vms) = (*vms, vms + free))
        };
        let members: Vec<Member> = nodes.iter().enumerate().map(member).collect();
        let cost = |set: &[&Member]| {
            (set.iter().filter(|member| member.load.vms == 0).count(), set.len())
        };
        let sets = (0..1u32 << members.len()).map(|mask| -> Vec<&Member> {
            members.iter().enumerate().filter(|(at, _)| mask >> at & 1 == 1).map(|(_, member)| member).collect()
        });
        let holds = |set: &Vec<&Member>| set.iter().map(|member| member.load.max_vms - member.load.vms).sum::<u32>() >= count;
        let least = sets.filter(holds).map(|set| cost(&set)).min();
        let used = place(&policy(Policy::Pack), &wish(count), &members).ok().map(|decision| {
            let is_used = |member: &&Member| decision.shares.iter().any(|share| share.platform == member.name);
            cost(&members.iter().filter(is_used).collect::<Vec<_>>())
        });
        prop_assert_eq!(used, least);
    }

    #[test]
    fn views_that_are_old_make_no_platform_fuller_than_it_can_be(
        members in vec((0u32..6, 0u64..4000), 2..6),
        counts in vec(1u32..5, 1..12),
        policies in vec(0..Policy::ALL.len(), 12),
    ) {
        let members: Vec<Member> = (0..).zip(&members).map(|(at, (max_vms, mib))| busy(&format!("p{at}"), |load| {
            (load.max_vms, load.memory_available_bytes) = (*max_vms, mib * MIB);
        })).collect();
        let (mut recent, start, mut taken) = (PendingPlacements::default(), Instant::now(), BTreeMap::<String, Vec<u32>>::new());
        for (count, at) in counts.into_iter().zip(policies) {
            let (_, kind) = Policy::ALL[at];
            let counted: Vec<_> = members.iter().map(|member| recent.count(member, start, start)).collect();
            let wish = Wish { source: "elsewhere".to_owned(), ..wish(count) };
            let names = members.iter().filter(|_| kind == Policy::Pinned).map(|member| member.name.clone());
            let rules = rules(Rule { policy: kind, pinned: names.collect(), ..Rule::default() });
            let decision = place(&rules, &wish, counted.iter().map(AsRef::as_ref));
            for Allocation { platform, count } in decision.map(|decision| decision.shares).unwrap_or_default() {
                drop(recent.enter(&platform, SHAPE, count, start));
                taken.entry(platform).or_default().push(count);
            }
        }
        for member in &members {
            let taken = taken.remove(&member.name).unwrap_or_default();
            prop_assert!(taken.iter().sum::<u32>() <= member.load.max_vms);
            let charged: u64 = taken.iter().map(|count| charge_bytes(SHAPE, *count, false)).sum();
            prop_assert!(charged <= member.load.memory_available_bytes);
        }
    }
}

#[test]
fn no_count_does_harm() {
    let members = [busy("a", |load| load.max_vms = u32::MAX), idle("b")];
    for (_, policy) in Policy::ALL {
        let pinned = if policy == Policy::Pinned { vec!["a".to_owned()] } else { Vec::new() };
        let rules = rules(Rule { policy, pinned, ..Rule::default() });
        assert!(place(&rules, &wish(u32::MAX), &members).is_err(), "{policy}");
        assert_eq!(place(&rules, &wish(0), &members).unwrap().shares, [], "{policy}");
    }
}

#[test]
fn what_was_placed_counts_until_its_platform_tells_of_it() {
    let (mut recent, start) = (PendingPlacements::default(), Instant::now());
    let member = busy("b", |load| load.vms = 3);
    let vms = |recent: &PendingPlacements, told, now| recent.count(&member, told, now).load.vms;
    let claim = recent.enter("b", SHAPE, 2, start);
    let other = recent.enter("c", SHAPE, 9, start);
    // However long it takes until they are sent.
    let later = start + Duration::from_secs(3600);
    assert_eq!((vms(&recent, start, later), vms(&recent, later, later)), (5, 5));
    drop(claim);
    let sent = Instant::now() + Duration::from_millis(1);
    assert_eq!(vms(&recent, start, sent), 5);
    assert_eq!(vms(&recent, sent, sent), 3, "it tells of them itself");
    assert_eq!(vms(&recent, start, sent + Duration::from_secs(31)), 3, "they have not come");
    drop(other);
    drop(recent.enter("d", SHAPE, 1, later));
    assert_eq!(recent.count(&idle("c"), start, start).load.vms, 0, "they are forgotten");
}
