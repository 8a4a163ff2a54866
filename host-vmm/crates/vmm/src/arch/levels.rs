//! The levels of x86-64 by which distributions build their programs (System V ABI, AMD64 supplement,
//! "Micro-architecture levels").
//!
//! A guest of a level is shown the features that the level defines, those that every kernel counts on, and
//! those by which kernels guard themselves, where the host has them; and no others. So it goes on, with all
//! that it was shown, on whatever host has the level and these guards. AES, for one, belongs to no level: for
//! what a cluster has beyond a level, there are profiles in files.

use std::{collections::BTreeSet, fmt};

use super::features::{self, Feature};

/// A level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// x86-64-v2: about what Nehalem had.
    V2,
    /// x86-64-v3: about what Haswell had.
    V3,
    /// x86-64-v4: AVX-512.
    V4,
}

/// What all 64-bit processors have (x86-64, the level below v2). OSFXSR, which it counts among them, is up to
/// the guest's kernel.
const BASE: &[&str] = &["cmov", "cx8", "fpu", "fxsr", "mmx", "sse", "sse2", "syscall"];

/// What each level has and the one below has not. v3 asks for OSXSAVE, which is what the guest's kernel makes
/// of `xsave`.
const V2: &[&str] = &["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"];
const V3: &[&str] = &["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"];
const V4: &[&str] = &["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"];

/// The state that goes with them: XSAVE keeps no more.
const V3_STATE: &[&str] = &["xcr0.avx", "xcr0.sse", "xcr0.x87"];
const V4_STATE: &[&str] = &["xcr0.hi16_zmm", "xcr0.opmask", "xcr0.zmm_hi256"];

/// What Linux counts on in a guest of KVM, and every such host has: paging, interrupts, time, topology.
const ALWAYS: &[&str] = &[
    "apic",
    "arat",
    "clflush",
    "constant_tsc",
    "de",
    "lm",
    "mca",
    "mce",
    "msr",
    "mtrr",
    "nx",
    "pae",
    "pat",
    "pge",
    "pse",
    "pse36",
    "rdtscp",
    "sep",
    "topoext",
    "tsc",
    "tsc_adjust",
    "vme",
];

/// What a kernel guards itself and its programs by. A guest from which it were hidden would be less safe than
/// the host allows.
const GUARDS: &[&str] = &[
    "amd_ibpb",
    "amd_ibrs",
    "amd_ssbd",
    "amd_stibp",
    "amd_stibp_always_on",
    "flush_l1d",
    "intel_stibp",
    "lfence_rdtsc",
    "md_clear",
    "null_sel_clr_base",
    "smap",
    "smep",
    "spec_ctrl",
    "spec_ctrl_ssbd",
    "umip",
    "verw_clear",
    "virt_ssbd",
];

impl Level {
    /// All of them, lowest first.
    pub const ALL: [Self; 3] = [Self::V2, Self::V3, Self::V4];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// The features that it defines: a host that lacks one has not got this level.
    pub fn defined(self) -> BTreeSet<Feature> {
        let parts: &[&[&str]] = match self {
            Self::V2 => &[BASE, V2],
            Self::V3 => &[BASE, V2, V3, V3_STATE],
            Self::V4 => &[BASE, V2, V3, V3_STATE, V4, V4_STATE],
        };
        named(parts)
    }

    /// The features that its guests are shown where the host has them. KVM's own are the kernel's, not the
    /// processor's: they all stay.
    pub fn shown(self) -> BTreeSet<Feature> {
        self.defined().into_iter().chain(named(&[ALWAYS, GUARDS])).chain(features::of_kvm()).collect()
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The features of these names, all of which there are (see the tests).
fn named(parts: &[&[&str]]) -> BTreeSet<Feature> {
    parts.iter().copied().flatten().filter_map(|name| name.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_are_those_of_features() {
        for name in [BASE, V2, V3, V4, V3_STATE, V4_STATE, ALWAYS, GUARDS].into_iter().flatten() {
            assert!(name.parse::<Feature>().is_ok(), "{name}");
        }
    }

    #[test]
    fn levels_are_nested() {
        for pair in Level::ALL.windows(2) {
            let [lower, upper] = pair else { panic!("a window of two") };
            assert!(lower.defined().is_subset(&upper.defined()) && lower.defined() != upper.defined());
            assert!(lower.shown().is_subset(&upper.shown()) && lower.shown() != upper.shown());
        }
        assert!(Level::ALL.iter().all(|level| level.defined().is_subset(&level.shown())));
    }
}
