//! Profiles never show what a host lacks, and are sets.

use proptest::prelude::*;

use super::*;
use crate::arch::{
    VcpuId,
    cpuid::{self, Shape},
    leaf::Register,
    samples::{any_cpu, entries, everything},
};

fn level(level: Level) -> Vec<Leaf> {
    leaf::leaves(&Profile::Level(level).apply(&entries(&everything())).unwrap())
}

fn state_word(leaves: &[Leaf], index: u32, register: Register) -> u32 {
    leaf::word(leaves, Word::new(xstate::FUNCTION, index, register))
}

fn feature(name: &str) -> Feature {
    name.parse().unwrap()
}

#[test]
fn all_names_are_those_of_features() {
    assert_eq!(named(NEVER).count(), NEVER.len());
    assert_eq!(named(UNCOPIED).count(), UNCOPIED.len());
    assert_eq!(named(MACHINES).count(), MACHINES.len());
    assert_eq!(named(&[TILES]).count(), 1);
    assert_eq!(Profile::names().collect::<Vec<_>>(), ["host", "x86-64-v2", "x86-64-v3", "x86-64-v4"]);
    for name in Profile::names() {
        assert_eq!(Profile::named(name).unwrap().to_string(), name);
    }
    assert_eq!(Profile::named("x86-64-v5"), None);
    let common = Profile::Common(Subset::of_host(&entries(&everything())));
    for profile in [Profile::Host, Profile::Level(Level::V3), common] {
        assert_eq!(profile.to_text().unwrap().parse::<Profile>().unwrap(), profile);
    }
}

#[test]
fn the_host_is_as_it_is_but_for_state_that_copies_would_lose() {
    let mut host = everything();
    // A leaf and a bit that nobody knows.
    host.push(Leaf { function: 0x14, index: 0, registers: [1; 4] });
    let nameless = features::all().find(|feature| feature.name().is_none()).unwrap();
    for leaf in host.iter_mut().filter(|leaf| leaf.function == nameless.word().function) {
        leaf.set(nameless.word().register, leaf.get(nameless.word().register) | nameless.mask());
    }
    let shown = leaf::leaves(&Profile::Host.apply(&entries(&host)).unwrap());
    assert_eq!(xstate::shown(&shown), COPIED_COMPONENTS);
    assert_eq!(leaf::find(&shown, 0x14, 0), None);
    let hidden = |feature: &Feature| {
        let is_uncopied = named(UNCOPIED).any(|uncopied| uncopied == *feature) || feature.name().is_none();
        let is_of_state = feature.word().function == xstate::FUNCTION && feature.to_string().contains('.');
        is_uncopied || is_of_state
    };
    for feature in features::all().filter(|feature| feature.is_shown(&host) && !hidden(feature)) {
        assert!(feature.is_shown(&shown), "{feature}");
    }
    assert!(named(UNCOPIED).chain([nameless]).all(|feature| !feature.is_shown(&shown)));
    // What is left is settled: it stays as it is.
    let again = Profile::Host.apply(&entries(&shown)).unwrap();
    assert_eq!(leaf::leaves(&again), shown);
}

#[test]
fn a_level_shows_what_it_defines_and_no_other_instructions() {
    for (shown, present, absent) in [
        (level(Level::V2), ["sse4_2", "nx"], ["avx", "xsave"]),
        (level(Level::V3), ["avx2", "bmi2"], ["avx512f", "aes"]),
        (level(Level::V4), ["avx512vl", "smap"], ["avx512_bf16", "arch_capabilities"]),
    ] {
        assert!(present.iter().all(|name| feature(name).is_shown(&shown)));
        assert!(!absent.iter().any(|name| feature(name).is_shown(&shown)));
        assert!(features::of_kvm().filter(|kvm| kvm.name().is_some()).all(|kvm| kvm.is_shown(&shown)));
    }
}

#[test]
fn a_level_keeps_the_state_that_it_needs() {
    assert_eq!(leaf::find(&level(Level::V2), xstate::FUNCTION, 0), None);
    for (shown, components, bytes) in [(level(Level::V3), 0b111, 832), (level(Level::V4), 0b1110_0111, 2688)]
    {
        assert_eq!(xstate::shown(&shown), components);
        let sizes = [Register::Ebx, Register::Ecx].map(|register| state_word(&shown, 0, register));
        assert_eq!(sizes, [bytes; 2]);
        assert_eq!(state_word(&shown, 1, Register::Ebx), 0, "there is no compact format");
        let subleaves = shown.iter().filter(|leaf| leaf.function == xstate::FUNCTION && leaf.index > 1);
        assert!(subleaves.map(|leaf| leaf.index).eq(xstate::numbers(components)));
    }
}

#[test]
fn a_level_has_no_counters_and_four_levels_of_page_tables() {
    let shown = level(Level::V3);
    let numbers =
        NUMBERS.iter().map(|number| (number.name, number.shown(&shown))).collect::<BTreeMap<_, _>>();
    assert_eq!(numbers["physical address bits"], 46);
    assert_eq!(numbers[LINEAR_ADDRESS_BITS], 48);
    assert_eq!((numbers["PMU version"], numbers["PMU counters"], numbers["AVX10 version"]), (0, 0, 0));
}

#[test]
fn a_host_below_the_level_is_told_what_it_lacks() {
    let mut host = everything();
    for leaf in host.iter_mut().filter(|leaf| leaf.function == 7 && leaf.index == 0) {
        leaf.set(
            Register::Ebx,
            leaf.get(Register::Ebx) & !(feature("bmi2").mask() | feature("avx512f").mask()),
        );
    }
    let host = entries(&host);
    let error = Profile::Level(Level::V3).apply(&host).unwrap_err();
    assert_eq!(error.to_string(), "this host lacks what the CPU profile x86-64-v3 shows: bmi2");
    assert!(Profile::Level(Level::V2).apply(&host).is_ok());
}

#[test]
fn a_profile_of_another_host_is_refused() {
    let amd = |leaf: Leaf| if leaf.function == 0 { Leaf { registers: [1, 2, 3, 4], ..leaf } } else { leaf };
    let other: Vec<Leaf> = everything().into_iter().map(amd).collect();
    let (ours, theirs) = (Subset::of_host(&entries(&everything())), Subset::of_host(&entries(&other)));
    assert!(matches!(ours.intersection(&theirs), Err(Error::Vendors(..))));
    assert!(matches!(Profile::Common(theirs).apply(&entries(&everything())), Err(Error::Vendor { .. })));
}

#[test]
fn state_that_lies_elsewhere_is_not_common_and_neither_is_what_needs_it() {
    let mut other = everything();
    for leaf in other.iter_mut().filter(|leaf| leaf.function == xstate::FUNCTION && leaf.index == 9) {
        leaf.set(Register::Ebx, 832);
    }
    let (ours, theirs) = (entries(&everything()), entries(&other));
    let common = Subset::of_host(&ours).intersection(&Subset::of_host(&theirs)).unwrap();
    let lost = Subset::of_host(&ours)
        .features
        .difference(&common.features)
        .map(Feature::to_string)
        .collect::<Vec<_>>();
    assert_eq!(lost, ["pku", "xcr0.pkru"]);
    assert!([ours, theirs].iter().all(|host| Profile::Common(common.clone()).apply(host).is_ok()));
}

#[test]
fn a_vcpu_made_of_a_profile_is_consistent() {
    let left = Profile::Level(Level::V3).apply(&entries(&everything())).unwrap();
    let vcpu = leaf::leaves(&cpuid::for_vcpu(&left, Shape { vcpus: 2, tsc_deadline_timer: true }, VcpuId(1)));
    assert!(MACHINES.iter().all(|name| feature(name).is_shown(&vcpu)));
    assert_eq!(state_word(&vcpu, 0, Register::Eax), 0b111);
    assert_eq!(state_word(&vcpu, 0, Register::Ecx), 832);
    let mut settled = vcpu.clone();
    xstate::settle(&mut settled);
    assert_eq!(settled, vcpu);
}

#[test]
fn what_was_printed_is_read() {
    let subset = Subset::of_host(&entries(&everything()));
    assert!(subset.features.contains(&feature("avx512f")) && subset.state.len() == 5);
    assert_eq!(Subset::from_json(&subset.to_json().unwrap()).unwrap(), subset);
}

#[test]
fn mistakes_in_a_file_are_told() {
    for (text, told) in [
        ("", "EOF"),
        (r#"{"vendor":null,"features":["avx513"],"most":{},"state":{}}"#, "avx513"),
        (r#"{"vendor":null,"features":[],"most":{"wheels":4},"state":{}}"#, "wheels"),
        (
            r#"{"vendor":null,"features":[],"most":{},"state":{"64":{"bytes":1,"offset":1,"flags":0}}}"#,
            "component 64",
        ),
        (r#"{"vendor":null,"features":[],"most":{},"state":{},"more":1}"#, "more"),
    ] {
        let Err(Error::Form(error)) = Subset::from_json(text) else { panic!("{text}") };
        assert!(error.to_string().contains(told), "{error}");
    }
}

proptest! {
    #[test]
    fn an_intersection_is_one_of_sets(a in any_cpu(), b in any_cpu(), c in any_cpu()) {
        let [a, b, c] = [a, b, c].map(|cpu| Subset::of_host(&entries(&cpu)));
        let and = |one: &Subset, other: &Subset| one.intersection(other).unwrap();
        prop_assert_eq!(and(&a, &b), and(&b, &a));
        prop_assert_eq!(and(&and(&a, &b), &c), and(&a, &and(&b, &c)));
        prop_assert_eq!(and(&a, &a), a);
    }

    #[test]
    fn what_hosts_have_in_common_each_of_them_has(a in any_cpu(), b in any_cpu()) {
        let (a, b) = (entries(&a), entries(&b));
        let common = Subset::of_host(&a).intersection(&Subset::of_host(&b)).unwrap();
        for host in [&a, &b] {
            let (shown, there) = (leaf::leaves(&common.cut(host)), leaf::leaves(host));
            let machines: BTreeSet<_> = named(MACHINES).collect();
            for feature in features::all().filter(|feature| feature.is_shown(&shown)) {
                prop_assert!(feature.is_shown(&there), "{} is made up", feature);
                prop_assert!(common.features.contains(&feature) || machines.contains(&feature), "{} is not common", feature);
            }
            for number in NUMBERS {
                prop_assert!(number.shown(&shown) <= common.most[number.name]);
            }
            let mut settled = shown.clone();
            xstate::settle(&mut settled);
            prop_assert_eq!(settled, shown);
        }
    }

    #[test]
    fn a_common_profile_is_for_each_of_its_hosts(a in any_cpu(), b in any_cpu()) {
        let hosts = [a, b].map(|cpu| entries(&cpu));
        let own = hosts.each_ref().map(|host| Subset::of_host(host));
        let common = own[0].intersection(&own[1]).unwrap();
        for (host, own) in hosts.iter().zip(own) {
            prop_assert!(Profile::Common(own).apply(host).is_ok());
            prop_assert!(Profile::Common(common.clone()).apply(host).is_ok());
        }
    }

    #[test]
    fn no_text_does_harm(text in ".*") {
        prop_assert!(Subset::from_json(&text).is_err());
    }
}
