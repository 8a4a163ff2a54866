//! What the words of CPUID say: which of their bits are features, by name, and which parts are numbers.
//!
//! A feature says that something is there, for every vCPU of a machine alike. The names are those of Linux's
//! /proc/cpuinfo where it has one, else those of the manuals (Intel SDM, volume 2, CPUID; AMD APM, volume 3,
//! appendix E; kernel documentation, virt/kvm/x86/cpuid.rst; x86-cpuid.org).

use std::{collections::BTreeMap, fmt, str::FromStr, sync::LazyLock};

use super::{
    leaf::{
        self, Leaf,
        Register::{self, Eax, Ebx, Ecx, Edx},
        Word,
    },
    xstate,
};

/// IA32_ARCH_CAPABILITIES: what the processor is safe from, and how it can be made so. Intel's processors
/// have it, and show it by the feature `arch_capabilities`.
pub const ARCH_CAPABILITIES_MSR: u32 = 0x10a;

/// Registers that describe the CPU as CPUID does, and the features by which a guest knows that they are
/// there: the one above, IA32_CORE_CAPABILITIES and IA32_PERF_CAPABILITIES.
const DESCRIBING_MSRS: &[(u32, &str)] =
    &[(ARCH_CAPABILITIES_MSR, "arch_capabilities"), (0xcf, "core_capabilities"), (0x345, "pdcm")];

/// Stands for a feature without a name.
const NAMELESS: &str = "-";

/// Stands for a bit that is no feature: it repeats another one, follows what the guest has switched on, or
/// depends on the number of vCPUs.
const NO_FEATURE: &str = ".";

/// The words that hold features, and the names of these from bit 0 on. Those behind the last name are
/// features without one.
const WORDS: &[(Word, &str)] = &[
    (
        at(0x1, 0, Ecx),
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave . avx f16c rdrand hypervisor",
    ),
    (
        at(0x1, 0, Edx),
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse \
         sse2 ss . tm ia64 pbe",
    ),
    (at(0x6, 0, Eax), "dtherm ida arat - pln ecmd pts hwp"),
    (at(0x6, 0, Ecx), "aperfmperf - - epb - - - - . . . . . . . ."),
    (
        at(0x7, 0, Ebx),
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    (
        at(0x7, 0, Ecx),
        "prefetchwt1 avx512vbmi umip pku . waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg \
         tme avx512_vpopcntdq - la57 . . . . . rdpid key_locker bus_lock_detect cldemote - movdiri movdir64b enqcmd \
         sgx_lc pks",
    ),
    (
        at(0x7, 0, Edx),
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
         spec_ctrl_ssbd",
    ),
    (
        at(0x7, 1, Eax),
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred \
         lkgs wrmsrns - amx_fp16 hreset avx_ifma - - lam msrlist",
    ),
    (at(0x7, 1, Ebx), "intel_ppin"),
    (at(0x7, 1, Ecx), "- - - - - msr_imm"),
    (
        at(0x7, 1, Edx),
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti user_msr - uiret_uif \
         cet_sss avx10 - apx",
    ),
    (at(0x7, 2, Edx), "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no uclock_disable"),
    (
        at(xstate::FUNCTION, 0, Eax),
        "xcr0.x87 xcr0.sse xcr0.avx xcr0.bndregs xcr0.bndcsr xcr0.opmask xcr0.zmm_hi256 xcr0.hi16_zmm - xcr0.pkru - - \
         - - - - - xcr0.tilecfg xcr0.tiledata xcr0.apx",
    ),
    (at(xstate::FUNCTION, 0, Edx), "- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - xcr0.lwp"),
    (at(xstate::FUNCTION, 1, Eax), "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        at(xstate::FUNCTION, 1, Ecx),
        "- - - - - - - - xss.pt - xss.pasid xss.cet_u xss.cet_s xss.hdc xss.uintr xss.lbr xss.hwp",
    ),
    (at(xstate::FUNCTION, 1, Edx), ""),
    (at(0x24, 0, Ebx), ". . . . . . . . - - - - - - - - avx10_128 avx10_256 avx10_512"),
    (
        at(KVM, 0, Eax),
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield \
         kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - \
         kvm_clocksource_stable",
    ),
    (
        at(0x8000_0001, 0, Ecx),
        "lahf_lm . svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - \
         nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx addr_mask_ext",
    ),
    (
        at(0x8000_0001, 0, Edx),
        ". . . . . . . . . . - syscall . . . . . . - mp nx - mmxext . . fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (at(0x8000_0007, 0, Ebx), "overflow_recov succor hw_assert smca"),
    (
        at(0x8000_0007, 0, Edx),
        "digital_temp fid vid ttp hw_tm sw_tm 100mhz_steps hw_pstate constant_tsc cpb eff_freq_ro proc_feedback \
         acc_power connected_standby rapl",
    ),
    (
        at(0x8000_0008, 0, Ebx),
        "clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - amd_ibpb wbinvd_int amd_ibrs amd_stibp \
         ibrs_always_on amd_stibp_always_on ibrs_fast ibrs_same_mode no_efer_lmsle tlb_flush_nested - amd_ppin \
         amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret brs",
    ),
    (
        at(0x8000_001f, 0, Eax),
        "sme sev vm_page_flush sev_es sev_snp vmpl rmpquery vmpl_sss secure_tsc v_tsc_aux",
    ),
    (
        at(0x8000_0021, 0, Eax),
        "no_nested_data_bp fsgs_non_serializing lfence_rdtsc smm_page_cfg_lock - verw_clear null_sel_clr_base \
         upper_addr_ignore autoibrs no_smm_ctl_msr amd_fsrs amd_fsrc - prefetch_ctl_msr - - - user_cpuid_disable epsf \
         - prefetchi - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no",
    ),
    (at(0x8000_0021, 0, Ecx), "- tsa_sq_no tsa_l1_no"),
    (at(0x8000_0022, 0, Eax), "perfmon_v2 lbr_v2 lbr_pmc_freeze"),
];

/// Bits of IA32_ARCH_CAPABILITIES from bit 0 on.
const ARCH_CAPABILITIES: &str = "rdcl_no ibrs_all rsba skip_l1dfl_vmentry ssb_no mds_no if_pschange_mc_no tsx_ctrl \
    taa_no mcu_control misc_package_ctls energy_filtering_ctl doitm sbdr_ssdp_no fbsdp_no psdp_no mcu_enumeration \
    fb_clear fb_clear_ctrl rrsba bhi_no xapic_disable mcu_extended - pbrsb_no gds_ctrl gds_no rfds_no rfds_clear - - - \
    - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - its_no";

/// Those of them that say that the processor has a flaw (RSBA, RRSBA), not that it has something.
pub const ARCH_FLAWS: u64 = 1 << 2 | 1 << 19;

/// KVM's own features.
const KVM: u32 = 0x4000_0001;

/// The numbers that CPUID shows and by which a guest acts.
pub const NUMBERS: &[Number] = &[
    number(PHYSICAL_ADDRESS_BITS, at(0x8000_0008, 0, Eax), 0, 8),
    number(LINEAR_ADDRESS_BITS, at(0x8000_0008, 0, Eax), 8, 8),
    number("PMU version", at(0xa, 0, Eax), 0, 8),
    number("PMU counters", at(0xa, 0, Eax), 8, 8),
    number("PMU counter bits", at(0xa, 0, Eax), 16, 8),
    number("PMU fixed counters", at(0xa, 0, Edx), 0, 5),
    number("PMU fixed counter bits", at(0xa, 0, Edx), 5, 8),
    number("PMU core counters", at(0x8000_0022, 0, Ebx), 0, 4),
    number("AVX10 version", at(0x24, 0, Ebx), 0, 8),
];

/// Name of the number that says how long a guest-physical address may be.
pub const PHYSICAL_ADDRESS_BITS: &str = "physical address bits";

/// Name of the number that says how long a virtual address may be.
pub const LINEAR_ADDRESS_BITS: &str = "linear address bits";

/// The bits of each word that are features.
static MASKS: LazyLock<BTreeMap<Word, u32>> = LazyLock::new(|| {
    let mask = |names: &str| {
        let bits = (0..u32::BITS).zip(names.split_ascii_whitespace()).filter(|(_, name)| *name == NO_FEATURE);
        bits.fold(u32::MAX, |mask, (bit, _)| mask & !(1 << bit))
    };
    WORDS.iter().map(|(word, names)| (*word, mask(names))).collect()
});

/// All features by name.
static BY_NAME: LazyLock<BTreeMap<String, Feature>> =
    LazyLock::new(|| all().map(|feature| (feature.to_string(), feature)).collect());

const fn at(function: u32, index: u32, register: Register) -> Word {
    Word::new(function, index, register)
}

const fn number(name: &'static str, word: Word, shift: u32, bits: u32) -> Number {
    Number { name, word, shift, bits }
}

/// A feature: a bit of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Feature {
    word: Word,
    bit: u32,
}

/// A name that no feature has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no CPU feature that this program knows")]
pub struct UnknownFeature(String);

impl Feature {
    /// Where it is shown.
    pub fn word(self) -> Word {
        self.word
    }

    /// The word with this bit alone.
    pub fn mask(self) -> u32 {
        1 << self.bit
    }

    /// Its name, where it has one.
    pub fn name(self) -> Option<&'static str> {
        let (_, names) = WORDS.iter().find(|(word, _)| *word == self.word)?;
        let name = names.split_ascii_whitespace().nth(usize::try_from(self.bit).ok()?);
        name.filter(|name| *name != NAMELESS)
    }

    /// Has the leaves no longer show it.
    pub fn hide(self, leaves: &mut [Leaf]) {
        let Word { function, index, register } = self.word;
        for leaf in leaves.iter_mut().filter(|leaf| (leaf.function, leaf.index) == (function, index)) {
            leaf.set(register, leaf.get(register) & !self.mask());
        }
    }

    /// Whether these leaves show it.
    pub fn is_shown(self, leaves: &[Leaf]) -> bool {
        leaf::word(leaves, self.word) & self.mask() != 0
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "cpuid {} bit {}", self.word, self.bit),
        }
    }
}

impl FromStr for Feature {
    type Err = UnknownFeature;

    fn from_str(text: &str) -> Result<Self, UnknownFeature> {
        BY_NAME.get(text).copied().ok_or_else(|| UnknownFeature(text.to_owned()))
    }
}

/// The words that hold features.
pub fn words() -> impl Iterator<Item = Word> {
    WORDS.iter().map(|(word, _)| *word)
}

/// All features.
pub fn all() -> impl Iterator<Item = Feature> {
    words().flat_map(|word| of(word, u32::MAX))
}

/// The features among these bits of a word.
pub fn of(word: Word, bits: u32) -> impl Iterator<Item = Feature> {
    let bits = bits & mask(word);
    (0..u32::BITS).map(move |bit| Feature { word, bit }).filter(move |feature| bits & feature.mask() != 0)
}

/// KVM's own features.
pub fn of_kvm() -> impl Iterator<Item = Feature> {
    of(at(KVM, 0, Eax), u32::MAX)
}

/// The features whose names begin like this.
pub fn beginning(start: &str) -> impl Iterator<Item = Feature> {
    BY_NAME
        .range(start.to_owned()..)
        .take_while(move |(name, _)| name.starts_with(start))
        .map(|(_, feature)| *feature)
}

/// The bits of a word that are features.
pub fn mask(word: Word) -> u32 {
    MASKS.get(&word).copied().unwrap_or(0)
}

/// Whether a guest that sees these leaves can take note of a model-specific register: of those that describe
/// the CPU, not all are shown.
pub fn is_msr_shown(index: u32, leaves: &[Leaf]) -> bool {
    let shown_by =
        DESCRIBING_MSRS.iter().find(|(known, _)| *known == index).and_then(|(_, name)| name.parse().ok());
    shown_by.is_none_or(|feature: Feature| feature.is_shown(leaves))
}

/// Name of a bit of IA32_ARCH_CAPABILITIES.
pub fn arch_capability(bit: u32) -> String {
    let name = usize::try_from(bit).ok().and_then(|bit| ARCH_CAPABILITIES.split_ascii_whitespace().nth(bit));
    name.filter(|name| *name != NAMELESS)
        .map_or_else(|| format!("IA32_ARCH_CAPABILITIES bit {bit}"), str::to_owned)
}

/// A part of a word that is a number: of what it counts, a guest must not have been shown more than there is.
#[derive(Debug, PartialEq, Eq)]
pub struct Number {
    /// What it counts.
    pub name: &'static str,
    word: Word,
    shift: u32,
    bits: u32,
}

impl Number {
    /// What a guest sees; zero where there is no such leaf.
    pub fn shown(&self, leaves: &[Leaf]) -> u32 {
        leaf::word(leaves, self.word) >> self.shift & self.most()
    }

    /// Has a leaf show no more than `most`, where it is the one that shows this number.
    pub fn limit(&self, leaf: &mut Leaf, most: u32) {
        let Word { function, index, register } = self.word;
        if (leaf.function, leaf.index) != (function, index) {
            return;
        }
        let word = leaf.get(register);
        let limited = (word >> self.shift & self.most()).min(most);
        leaf.set(register, word & !(self.most() << self.shift) | limited << self.shift);
    }

    fn most(&self) -> u32 {
        (1 << self.bits) - 1
    }
}

/// What a leaf is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Features and numbers.
    Known,
    /// The state that XSAVE saves.
    State,
    /// The shape of AMX's tiles: whoever uses them needs the same one.
    Tiles,
    /// Names, topology, caches, the doorbell, and leaves of features that are never shown: no guest needs
    /// them to be the same.
    Free,
    /// Nobody here knows.
    Unknown,
}

/// What a leaf is about.
pub fn kind(leaf: &Leaf) -> Kind {
    let is_its = |word: Word| (word.function, word.index) == (leaf.function, leaf.index);
    match leaf.function {
        xstate::FUNCTION => Kind::State,
        0x1d | 0x1e => Kind::Tiles,
        // Vendor, caches, MONITOR, DCA, topology, SGX, frequencies, core types.
        0 | 0x2 | 0x4 | 0x5 | 0x9 | 0xb | 0x12 | 0x15 | 0x16 | 0x1a | 0x1f => Kind::Free,
        // Signatures of KVM and of this VMM. No image is refused for what a VMM has promised: where a guest
        // goes on, the control page says what there is.
        0x4000_0000 | 0x4000_0100..=0x4000_01ff => Kind::Free,
        // Vendor, brand, caches, SVM, TLBs, optimisations, caches, topology.
        0x8000_0000 | 0x8000_0002..=0x8000_0006 | 0x8000_000a | 0x8000_0019 | 0x8000_001a => Kind::Free,
        0x8000_001d | 0x8000_001e | 0x8000_0026 => Kind::Free,
        _ if words().chain(NUMBERS.iter().map(|number| number.word)).any(is_its) => Kind::Known,
        _ => Kind::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_feature_has_a_name_of_its_own() {
        for (word, names) in WORDS {
            assert!(names.split_ascii_whitespace().count() <= 32, "{word}");
        }
        assert_eq!(BY_NAME.len(), all().count());
        assert_eq!(words().collect::<BTreeSet<_>>().len(), WORDS.len());
        for feature in all() {
            assert_eq!(feature.to_string().parse(), Ok(feature));
        }
        assert_eq!("avx513".parse::<Feature>(), Err(UnknownFeature("avx513".to_owned())));
    }

    #[test]
    fn names_stand_at_their_bits() {
        for (name, word, bit) in [
            ("hypervisor", at(1, 0, Ecx), 31),
            ("pbe", at(1, 0, Edx), 31),
            ("sse2", at(1, 0, Edx), 26),
            ("arat", at(6, 0, Eax), 2),
            ("avx512f", at(7, 0, Ebx), 16),
            ("avx512vl", at(7, 0, Ebx), 31),
            ("la57", at(7, 0, Ecx), 16),
            ("pks", at(7, 0, Ecx), 31),
            ("spec_ctrl_ssbd", at(7, 0, Edx), 31),
            ("amx_tile", at(7, 0, Edx), 24),
            ("lam", at(7, 1, Eax), 26),
            ("apx", at(7, 1, Edx), 21),
            ("mcdt_no", at(7, 2, Edx), 5),
            ("xcr0.pkru", at(0xd, 0, Eax), 9),
            ("xcr0.tiledata", at(0xd, 0, Eax), 18),
            ("xcr0.lwp", at(0xd, 0, Edx), 30),
            ("xsaves", at(0xd, 1, Eax), 3),
            ("xss.cet_u", at(0xd, 1, Ecx), 11),
            ("avx10_512", at(0x24, 0, Ebx), 18),
            ("kvm_clocksource_stable", at(KVM, 0, Eax), 24),
            ("kvm_migration_control", at(KVM, 0, Eax), 17),
            ("abm", at(0x8000_0001, 0, Ecx), 5),
            ("topoext", at(0x8000_0001, 0, Ecx), 22),
            ("mwaitx", at(0x8000_0001, 0, Ecx), 29),
            ("nx", at(0x8000_0001, 0, Edx), 20),
            ("lm", at(0x8000_0001, 0, Edx), 29),
            ("constant_tsc", at(0x8000_0007, 0, Edx), 8),
            ("amd_ibpb", at(0x8000_0008, 0, Ebx), 12),
            ("brs", at(0x8000_0008, 0, Ebx), 31),
            ("autoibrs", at(0x8000_0021, 0, Eax), 8),
            ("srso_no", at(0x8000_0021, 0, Eax), 29),
            ("cpuid 7.0:ebx bit 22", at(7, 0, Ebx), 22),
        ] {
            assert_eq!(name.parse(), Ok(Feature { word, bit }), "{name}");
        }
        assert_eq!(arch_capability(0), "rdcl_no");
        assert_eq!(arch_capability(28), "rfds_clear");
        assert_eq!(arch_capability(62), "its_no");
        assert_eq!(arch_capability(63), "IA32_ARCH_CAPABILITIES bit 63");
        assert_eq!((arch_capability(2), arch_capability(19)), ("rsba".to_owned(), "rrsba".to_owned()));
    }

    #[test]
    fn registers_that_describe_the_cpu_are_hidden_with_their_features() {
        let shows = |edx| vec![Leaf { function: 7, index: 0, registers: [0, 0, 0, edx] }];
        assert!(!is_msr_shown(ARCH_CAPABILITIES_MSR, &shows(!(1 << 29))));
        assert!(is_msr_shown(ARCH_CAPABILITIES_MSR, &shows(1 << 29)));
        assert!(is_msr_shown(0x10, &[]));
        assert!(
            DESCRIBING_MSRS
                .iter()
                .all(|(index, name)| name.parse::<Feature>().is_ok() && !is_msr_shown(*index, &[]))
        );
    }

    #[test]
    fn what_a_guest_switches_on_is_no_feature() {
        assert_eq!(mask(at(1, 0, Ecx)), !(1 << 27), "OSXSAVE");
        assert_eq!(mask(at(1, 0, Edx)), !(1 << 28), "HTT");
        assert_eq!(mask(at(1, 0, Ebx)), 0);
        assert_eq!(
            of(at(7, 0, Ecx), 1 << 4 | 1 << 3).map(|feature| feature.to_string()).collect::<Vec<_>>(),
            ["pku"]
        );
    }

    #[test]
    fn a_number_is_limited_and_its_neighbours_stay() {
        let mut leaf = Leaf { function: 0x8000_0008, index: 0, registers: [0x12_39_34, 1, 2, 3] };
        let [physical, linear, ..] = NUMBERS else { panic!("there are numbers") };
        assert_eq!((physical.shown(&[leaf]), linear.shown(&[leaf])), (0x34, 0x39));
        linear.limit(&mut leaf, 48);
        physical.limit(&mut leaf, 60);
        assert_eq!(leaf.registers, [0x12_30_34, 1, 2, 3]);
        assert_eq!(physical.shown(&[]), 0);
    }

    #[test]
    fn leaves_have_their_kinds() {
        for (function, index, expected) in [
            (0x7, 0, Kind::Known),
            (0x7, 2, Kind::Known),
            (0x7, 3, Kind::Unknown),
            (0xa, 0, Kind::Known),
            (0xd, 9, Kind::State),
            (0x1d, 1, Kind::Tiles),
            (0xb, 1, Kind::Free),
            (0x4000_0101, 0, Kind::Free),
            (0x4000_0102, 0, Kind::Free),
            (0x14, 0, Kind::Unknown),
            (0x8000_0008, 0, Kind::Known),
        ] {
            assert_eq!(kind(&Leaf { function, index, registers: [0; 4] }), expected, "{function:#x}.{index}");
        }
    }
}
