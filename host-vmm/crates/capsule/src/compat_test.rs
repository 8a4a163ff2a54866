//! A VM goes on where it was captured, and wherever nothing is missing; what is missing is named.

use proptest::{prelude::*, sample::Index};
use vmfork_abi::cpuid::{LEAF_FEATURES, LEAF_INTERFACE, LEAF_SIGNATURE};
use vmm::arch::{
    CpuidEntry,
    features::Feature,
    msr::Msr,
    profile::{Profile, Subset},
    samples::{any_cpu, entries, everything},
};

use super::*;
use crate::{codec, unpack, v1::tests::written_before};

const ARCH_CAPABILITIES: u64 = 0b1010_1011;

fn model(cpuid: Vec<CpuidEntry>, msrs: Vec<u32>) -> HostModel {
    HostModel {
        shown: cpuid.clone(),
        cpuid,
        msrs,
        arch_capabilities: ARCH_CAPABILITIES,
        tsc_deadline_timer: true,
        tsc_khz: Some(2_500_000),
        tsc_scaling: false,
        tsc_shift: true,
        tsc_steady: true,
        mce_banks: true,
        xsave_bytes: 4096,
        capabilities: ["KVM_CAP_EXIT_HYPERCALL", "KVM_CAP_XCRS"].map(str::to_owned).into(),
    }
}

/// A host that has everything.
fn rich() -> HostModel {
    model(entries(&everything()), vec![0x10, ARCH_CAPABILITIES_MSR])
}

fn any_model() -> impl Strategy<Value = HostModel> {
    let unknown = any::<[u32; 4]>().prop_map(|registers| Leaf { function: 0x14, index: 0, registers });
    let msrs = proptest::collection::btree_set(any::<u32>(), 0..20);
    let machine = (any::<u64>(), any::<bool>(), 1..6_000_000u32, any::<bool>(), 1024..4096usize);
    (any_cpu(), unknown, msrs, machine).prop_map(|(mut cpu, unknown, mut msrs, machine)| {
        let (arch_capabilities, tsc_deadline_timer, tsc_khz, tsc_scaling, xsave_words) = machine;
        cpu.push(unknown);
        msrs.insert(ARCH_CAPABILITIES_MSR);
        HostModel {
            arch_capabilities,
            tsc_deadline_timer,
            tsc_khz: Some(tsc_khz),
            tsc_scaling,
            xsave_bytes: 4 * xsave_words,
            ..model(entries(&cpu), msrs.into_iter().collect())
        }
    })
}

/// What a machine needs that is captured on such a host. Its guest uses all registers, and all components of
/// the state.
fn captured(model: &HostModel, vcpus: u8) -> Requirements {
    let states: Vec<_> = (0..vcpus)
        .map(|vcpu| {
            let shape = Shape { vcpus, tsc_deadline_timer: model.tsc_deadline_timer };
            let cpuid = cpuid::for_vcpu(&model.shown, shape, VcpuId(vcpu));
            let value = |index| if index == ARCH_CAPABILITIES_MSR { model.arch_capabilities } else { 7 };
            let msrs = model.msrs.iter().map(|&index| Msr { index, value: value(index) });
            let unused = Msr { index: 0x1c4, value: 0 };
            let xcr0 = xstate::user(&leaf::leaves(&cpuid));
            VcpuState::sample(cpuid, msrs.chain([unused]).collect(), xcr0, model.xsave_bytes)
        })
        .collect();
    Requirements::of_vcpus(&states, &model.capabilities, model.tsc_khz)
}

/// What is told of a VM that was captured on the rich host, on another one that differs from it.
fn told(change: impl FnOnce(&mut Needs, &mut HostCapabilities)) -> Vec<Incompatibility> {
    let (mut requirements, mut host) = (captured(&rich(), 1), HostCapabilities::of(&rich()));
    change(&mut requirements.0, &mut host);
    check(&requirements, &host).err().map(|Incompatible(differences)| differences).unwrap_or_default()
}

fn set(leaves: &mut [Leaf], word: Word, value: u32) {
    let leaf =
        leaves.iter_mut().find(|leaf| (leaf.function, leaf.index) == (word.function, word.index)).unwrap();
    leaf.set(word.register, value);
}

fn take(leaves: &mut [Leaf], feature: Feature) {
    let word = feature.word();
    let left = leaf::word(leaves, word) & !feature.mask();
    set(leaves, word, left);
}

fn named(name: &str) -> Feature {
    name.parse().unwrap()
}

#[test]
fn all_differences_are_told_at_once() {
    let mut poor = HostCapabilities { tsc_khz: Some(2_100_000), ..HostCapabilities::of(&rich()) };
    take(&mut poor.leaves, named("avx512f"));
    assert_eq!(
        check(&captured(&rich(), 2), &poor).unwrap_err().to_string(),
        "this platform can't run the VM: missing avx512f; TSC 2.5 GHz vs 2.1 GHz without scaling"
    );
}

#[test]
fn each_difference_has_its_words() {
    type Change = fn(&mut Needs, &mut HostCapabilities);
    let cases: [(Change, &str); 19] = [
        (|_, host| take(&mut host.leaves, named("kvm_steal_time")), "missing kvm_steal_time"),
        (|_, host| take(&mut host.leaves, named("xss.cet_u")), "missing xss.cet_u"),
        (|needs, _| needs.xcr0 |= 1 << 63, "missing cpuid d.0:edx bit 31"),
        (|_, host| host.arch_capabilities &= !1, "missing rdcl_no"),
        (|_, host| host.arch_capabilities |= 1 << 2, "flaw rsba unknown to the guest"),
        (
            |_, host| set(&mut host.leaves, Word::new(0x8000_0008, 0, Register::Eax), 0x39_27),
            "physical address bits 46 vs 39",
        ),
        (
            |_, host| set(&mut host.leaves, Word::new(0xa, 0, Register::Eax), 0x0730_0402),
            "PMU counters 8 vs 4",
        ),
        (
            |needs, _| needs.leaves.push(Leaf { function: 0x1d, index: 1, registers: [1, 2, 3, 4] }),
            "unknown cpuid leaf 1d.1 differs",
        ),
        (
            |_, host| set(&mut host.leaves, Word::new(0xd, 9, Register::Ebx), 832),
            "XSAVE component 9 of 8 bytes at 2688 (flags 0) vs of 8 bytes at 832 (flags 0)",
        ),
        (|_, host| host.xsave_bytes = 11008, "XSAVE area of 4096 bytes vs 11008"),
        (|needs, _| needs.tsc_khz = None, "TSC of unknown frequency"),
        (|_, host| host.tsc_khz = None, "TSC 2.5 GHz vs unknown frequency without scaling"),
        (|_, host| host.msrs.retain(|index| *index != 0x10), "missing MSR 0x10"),
        (|_, host| host.capabilities.truncate(1), "missing KVM_CAP_XCRS"),
        (|_, host| host.page_bytes = 16384, "pages of 4096 bytes vs 16384"),
        (|needs, _| needs.devices.push(("disk".to_owned(), 3)), "missing device disk version 3"),
        (|needs, _| needs.devices[1].1 = 2, "device serial version 2 vs 1"),
        (|needs, _| needs.state_version = 9, "state version 9 vs 1 to 2"),
        (|needs, host| (needs.state_version, host.state_versions) = (1, 2..=4), "state version 1 vs 2 to 4"),
    ];
    for (change, expected) in cases {
        assert_eq!(told(change).iter().map(Incompatibility::to_string).collect::<Vec<_>>(), [expected]);
    }
    assert_eq!(told(|_, _| {}), []);
}

#[test]
fn another_makers_cpu_is_another_one() {
    let differences = told(|_, host| {
        let [ebx, edx, ecx] = [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
        let first = host.leaves.iter_mut().find(|leaf| leaf.function == 0).unwrap();
        first.registers = [0x10, ebx, ecx, edx];
    });
    assert_eq!(differences[0].to_string(), "CPU of GenuineIntel vs AuthenticAMD");
    assert_eq!(differences.len(), 1);
}

#[test]
fn more_than_was_shown_is_no_difference() {
    let more = told(|needs, _| {
        take(&mut needs.leaves, named("avx512f"));
        needs.arch_capabilities = Some(1 << 2 | 1 << 19);
        needs.capabilities.clear();
        needs.msrs.clear();
    });
    assert_eq!(more, []);
}

#[test]
fn a_guest_that_can_not_read_what_its_cpu_is_safe_from_needs_nothing_of_it() {
    let mut model = rich();
    model.shown = Profile::named("x86-64-v3").unwrap().apply(&model.cpuid).unwrap();
    let requirements = captured(&model, 1);
    assert_eq!(requirements.0.arch_capabilities, None);
    assert_eq!(
        check(&requirements, &HostCapabilities { arch_capabilities: 0, ..HostCapabilities::of(&model) }),
        Ok(())
    );
}

#[test]
fn frequencies_may_differ_by_what_a_clock_is_disciplined_by() {
    for (needed, offered, same) in [
        (2_000_000, 2_000_500, true),
        (2_000_000, 1_999_500, true),
        (2_000_000, 2_000_501, false),
        (2_000_000, 1_999_499, false),
        (u32::MAX, 0, false),
        (0, u32::MAX, false),
    ] {
        assert_eq!(is_same_frequency(needed, offered), same, "{needed} {offered}");
    }
    assert_eq!(told(|_, host| (host.tsc_khz, host.tsc_scaling) = (Some(1), true)), []);
}

/// Leaves as a program of before the features shows them.
fn without_features(leaves: &mut Vec<Leaf>) {
    leaves.retain(|leaf| leaf.function != LEAF_FEATURES);
    set(leaves, Word::new(LEAF_SIGNATURE, 0, Register::Eax), LEAF_INTERFACE);
}

#[test]
fn a_guest_goes_on_where_the_vmm_has_other_features_and_keeps_its_own_leaves() {
    let set_features =
        |leaves: &mut Vec<Leaf>, low| set(leaves, Word::new(LEAF_FEATURES, 0, Register::Eax), low);
    // One of before, here; one of today, with a program of before, which compares these leaves as little.
    assert_eq!(told(|needs, _| without_features(&mut needs.leaves)), []);
    assert_eq!(told(|_, offer| without_features(&mut offer.leaves)), []);
    assert_eq!(told(|needs, _| set_features(&mut needs.leaves, u32::MAX)), []);
    assert_eq!(told(|_, offer| set_features(&mut offer.leaves, 0)), []);
    // A vCPU that has run with today's leaves can't take others: such a guest gets one that has not.
    let (Requirements(mut needs), offer) = (captured(&rich(), 1), HostCapabilities::of(&rich()));
    assert!(!offer.has_foreign_cpu(&Requirements(needs.clone()), 1));
    without_features(&mut needs.leaves);
    assert!(offer.has_foreign_cpu(&Requirements(needs), 1));
}

#[test]
fn images_of_before_the_features_are_accepted_where_their_cpu_is() {
    for capsule in written_before() {
        let (machine, _) = unpack(&capsule.state, &capsule.files).unwrap();
        let requirements = Requirements::of(&machine);
        let needs = &requirements.0;
        // The host that has what they were shown: KVM's part of it, to which this program adds its own.
        let of_kvm =
            needs.leaves.iter().filter(|leaf| !(LEAF_SIGNATURE..=LEAF_INTERFACE).contains(&leaf.function));
        let host = HostModel {
            xsave_bytes: usize::try_from(needs.xsave_bytes).unwrap(),
            arch_capabilities: needs.arch_capabilities.unwrap_or(0),
            tsc_khz: needs.tsc_khz,
            capabilities: needs.capabilities.clone(),
            ..model(entries(&of_kvm.copied().collect::<Vec<_>>()), needs.msrs.clone())
        };
        // The older one does not say how fast its guest's TSC runs.
        let expected: &[&str] = if needs.tsc_khz.is_some() { &[] } else { &["TSC of unknown frequency"] };
        let differences = check(&requirements, &HostCapabilities::of(&host))
            .err()
            .map(|Incompatible(differences)| differences);
        let differences = differences.unwrap_or_default();
        assert_eq!(differences.iter().map(Incompatibility::to_string).collect::<Vec<_>>(), expected);
    }
}

#[test]
fn requirements_have_bounds() {
    let decoded = |change: fn(&mut Needs)| {
        let Requirements(mut needs) = captured(&rich(), 1);
        change(&mut needs);
        codec::decode::<Requirements>(&codec::encode(&needs).unwrap()).is_ok()
    };
    assert!(decoded(|_| {}));
    let bad: [fn(&mut Needs); 7] = [
        |needs| needs.leaves = vec![needs.leaves[0]; MAX_CPUID_LEAVES + 1],
        |needs| needs.msrs = vec![1; MAX_MSRS + 1],
        |needs| needs.capabilities = vec!["A".to_owned(); MAX_NAMES + 1],
        |needs| needs.devices = vec![("a".to_owned(), 1); MAX_NAMES + 1],
        |needs| needs.devices.push(("x".repeat(MAX_NAME_BYTES + 1), 1)),
        |needs| needs.devices.push((String::new(), 1)),
        |needs| needs.capabilities.push("KVM\x1b[2J".to_owned()),
    ];
    assert!(bad.into_iter().all(|change| !decoded(change)));
}

/// Leaves that no CPU has.
fn forged_leaves() -> impl Strategy<Value = Vec<Leaf>> {
    let function = prop_oneof![
        proptest::sample::select(vec![
            0,
            1,
            7,
            0xa,
            0xd,
            0x14,
            0x1d,
            0x24,
            0x4000_0001,
            0x8000_0001,
            0x8000_0008
        ]),
        any::<u32>(),
    ];
    let leaf = (function, prop_oneof![0..64u32, any::<u32>()], any::<[u32; 4]>());
    proptest::collection::vec(
        leaf.prop_map(|(function, index, registers)| Leaf { function, index, registers }),
        0..20,
    )
}

proptest! {
    #[test]
    fn what_was_captured_here_goes_on_here(model in any_model(), vcpus in 1..=4u8) {
        prop_assert_eq!(check(&captured(&model, vcpus), &HostCapabilities::of(&model)), Ok(()));
    }

    #[test]
    fn each_missing_feature_is_named(model in any_model(), which: Index) {
        let (requirements, mut host) = (captured(&model, 1), HostCapabilities::of(&model));
        let shown: Vec<_> = features::all().filter(|feature| feature.is_shown(&requirements.0.leaves)).collect();
        let feature = *which.get(&shown);
        take(&mut host.leaves, feature);
        let Incompatible(differences) = check(&requirements, &host).unwrap_err();
        prop_assert_eq!(&differences[..1], &[Incompatibility::Feature(feature)]);
        prop_assert_eq!(differences.len(), 1);
        prop_assert!(differences[0].to_string().ends_with(&feature.to_string()));
    }

    #[test]
    fn guests_of_a_common_profile_go_on_on_all_its_hosts(a in any_cpu(), b in any_cpu()) {
        let [mut a, b] = [a, b].map(|cpu| model(entries(&cpu), vec![ARCH_CAPABILITIES_MSR]));
        let common = Subset::of_host(&a.cpuid).intersection(&Subset::of_host(&b.cpuid)).unwrap();
        a.shown = Profile::Common(common).apply(&a.cpuid).unwrap();
        prop_assert_eq!(check(&captured(&a, 2), &HostCapabilities::of(&b)), Ok(()));
    }

    #[test]
    fn what_was_sent_arrives(model in any_model()) {
        let requirements = captured(&model, 1);
        prop_assert_eq!(codec::decode::<Requirements>(&codec::encode(&requirements).unwrap()).unwrap(), requirements);
    }

    #[test]
    fn no_requirements_do_harm(leaves in forged_leaves(), theirs in forged_leaves(), xcr0: u64, khz: u32, promised: u64) {
        let Requirements(needs) = captured(&rich(), 1);
        let needs = Needs { leaves, xcr0, tsc_khz: Some(khz), arch_capabilities: Some(promised), ..needs };
        let host = HostCapabilities { leaves: theirs, ..HostCapabilities::of(&rich()) };
        if let Err(error) = check(&Requirements(needs), &host) {
            prop_assert!(!error.0.is_empty());
        }
    }

    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        // Whatever becomes requirements can be compared.
        if let Ok(requirements) = codec::decode::<Requirements>(&bytes) {
            prop_assert!(check(&requirements, &HostCapabilities::of(&rich())).is_err());
        }
    }
}
