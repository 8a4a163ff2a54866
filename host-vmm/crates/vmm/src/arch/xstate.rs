//! The processor state that XSAVE saves: its components, and where each lies in the area (CPUID leaf 0xd;
//! Intel SDM, volume 1, chapter 13).
//!
//! A guest's kernel asks for places and sizes once, and so does KVM for what it saves of the guest: they have
//! to be the same where the guest goes on.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{
    features::{self, Feature},
    leaf::{
        self, Leaf,
        Register::{Eax, Ebx, Ecx, Edx},
        Word,
    },
};

/// The leaf that tells of the state.
pub const FUNCTION: u32 = 0xd;

/// The components that lie in the head of every area: x87 and SSE.
const HEAD: u64 = 0b11;

/// Size of that head in bytes.
const HEAD_BYTES: u32 = 576;

/// Components that are numbered by a bit of a 64-bit mask.
const COMPONENTS: u32 = 64;

/// What of ECX tells where a component lies: it is the supervisor's; it is aligned in the compact format.
const PLACE: u32 = 0b11;
const ALIGNED: u32 = 1 << 1;

/// Alignment of components in the compact format, in bytes.
const ALIGNMENT_BYTES: u32 = 64;

/// Where CPUID shows that there is XSAVE.
const XSAVE: (Word, u32) = (Word::new(1, 0, Ecx), 1 << 26);

/// XSAVEC and XSAVES, which write the compact format.
const COMPACT: u32 = 1 << 1 | 1 << 3;

/// The words that say which components there are, lower half first: the user's (XCR0), and the supervisor's
/// (IA32_XSS).
const USER: [Word; 2] = [Word::new(FUNCTION, 0, Eax), Word::new(FUNCTION, 0, Edx)];
const SUPERVISOR: [Word; 2] = [Word::new(FUNCTION, 1, Ecx), Word::new(FUNCTION, 1, Edx)];

/// Components, and the features whose state they hold, by how the names of these begin. Neither is of use
/// without the other.
const OWNERS: &[(u64, &[&str])] = &[
    (1 << 2, &["avx", "f16c", "fma", "sha512", "sm3", "sm4", "vaes", "vpclmulqdq", "xop"]),
    (0b11 << 3, &["mpx"]),
    (0b111 << 5, &["avx512"]),
    (1 << 9, &["pku"]),
    (0b11 << 11, &["shstk", "ibt"]),
    (0b11 << 17, &["amx_"]),
    (1 << 19, &["apx"]),
];

/// One component, as its subleaf shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Its size in bytes.
    pub bytes: u32,
    /// Where it begins in the area of the standard format, in bytes; 0 for the supervisor's.
    pub offset: u32,
    /// Bit 0: it is the supervisor's. Bit 1: in the compact format it is aligned to 64 bytes.
    pub flags: u32,
}

/// The user's components that these leaves show: what XCR0 may hold.
pub fn user(leaves: &[Leaf]) -> u64 {
    mask(leaves, USER)
}

/// All components that these leaves show.
pub fn shown(leaves: &[Leaf]) -> u64 {
    user(leaves) | mask(leaves, SUPERVISOR)
}

/// The numbers of the components of a mask that have a subleaf of their own.
pub fn numbers(mask: u64) -> impl Iterator<Item = u32> {
    (0..COMPONENTS).filter(move |number| (mask & !HEAD) >> number & 1 != 0)
}

/// A component that has a subleaf of its own.
pub fn component(leaves: &[Leaf], number: u32) -> Option<Component> {
    let [bytes, offset, flags, _] =
        leaf::find(leaves, FUNCTION, number).filter(|leaf| leaf.index > 1)?.registers;
    Some(Component { bytes, offset, flags: flags & PLACE })
}

/// The features that say that a component is there.
pub fn features_of(number: u32) -> impl Iterator<Item = Feature> {
    let word = usize::from(number >= u32::BITS);
    [USER, SUPERVISOR].into_iter().flat_map(move |words| features::of(words[word], 1 << (number % u32::BITS)))
}

/// Has the leaves no longer show `components`.
pub fn hide(leaves: &mut [Leaf], components: u64) {
    let halves = [components & u64::from(u32::MAX), components >> u32::BITS];
    for (words, half) in [[USER[0], SUPERVISOR[0]], [USER[1], SUPERVISOR[1]]].into_iter().zip(halves) {
        let half = u32::try_from(half).unwrap_or(u32::MAX);
        words.into_iter().for_each(|word| hide_bits(leaves, word, half));
    }
}

/// Takes components out that no feature uses, and features whose components are not all there: what a guest
/// may conclude from a part of such a set holds for all of it.
pub fn keep_together(features: &mut BTreeSet<Feature>) {
    loop {
        let before = features.len();
        if !features.iter().any(|feature| feature.word() == XSAVE.0 && feature.mask() == XSAVE.1) {
            features.retain(|feature| feature.word().function != FUNCTION);
        }
        for (components, starts) in OWNERS {
            let owners = || starts.iter().flat_map(|start| features::beginning(start));
            let is_there = |number| features_of(number).any(|feature| features.contains(&feature));
            if !numbers(*components).all(is_there) {
                for owner in owners() {
                    features.remove(&owner);
                }
            }
            if !owners().any(|owner| features.contains(&owner)) {
                for state in numbers(*components).flat_map(features_of) {
                    features.remove(&state);
                }
            }
        }
        if features.len() == before {
            break;
        }
    }
}

/// Has the leaves show such a set, and the sizes of areas that come of it.
pub fn settle(leaves: &mut [Leaf]) {
    let shown: BTreeSet<Feature> = features::all().filter(|feature| feature.is_shown(leaves)).collect();
    let mut kept = shown.clone();
    keep_together(&mut kept);
    for feature in shown.difference(&kept) {
        hide_bits(leaves, feature.word(), feature.mask());
    }
    if has_xsave(leaves) {
        resize(leaves);
    } else {
        leaves.iter_mut().filter(|leaf| leaf.function == FUNCTION).for_each(|leaf| leaf.registers = [0; 4]);
    }
}

/// Whether these leaves show that there is state for XSAVE at all.
pub fn has_xsave(leaves: &[Leaf]) -> bool {
    let (word, mask) = XSAVE;
    leaf::word(leaves, word) & mask != 0
}

/// Has the leaves show the sizes of areas that hold all that they show. (KVM keeps those that depend on XCR0
/// up to date by itself.)
fn resize(leaves: &mut [Leaf]) {
    let bytes = standard_bytes(leaves, user(leaves));
    let compact = leaf::word(leaves, Word::new(FUNCTION, 1, Eax)) & COMPACT != 0;
    let compact_bytes = if compact { compact_bytes(leaves, shown(leaves)) } else { 0 };
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == FUNCTION) {
        match leaf.index {
            0 => {
                leaf.set(Ebx, bytes);
                leaf.set(Ecx, bytes);
            }
            1 => leaf.set(Ebx, compact_bytes),
            _ => {}
        }
    }
}

/// Size of an area of the standard format that holds these of the user's components, in bytes.
pub fn standard_bytes(leaves: &[Leaf], components: u64) -> u32 {
    let ends = numbers(components).filter_map(|number| component(leaves, number));
    ends.map(|Component { bytes, offset, .. }| offset.saturating_add(bytes)).fold(HEAD_BYTES, u32::max)
}

/// Size of an area of the compact format that holds these components, in bytes.
fn compact_bytes(leaves: &[Leaf], components: u64) -> u32 {
    let components = numbers(components).filter_map(|number| component(leaves, number));
    components.fold(HEAD_BYTES, |end, Component { bytes, flags, .. }| {
        let aligned = flags & ALIGNED != 0;
        let start =
            if aligned { end.checked_next_multiple_of(ALIGNMENT_BYTES).unwrap_or(u32::MAX) } else { end };
        start.saturating_add(bytes)
    })
}

fn mask(leaves: &[Leaf], [low, high]: [Word; 2]) -> u64 {
    u64::from(leaf::word(leaves, low)) | u64::from(leaf::word(leaves, high)) << u32::BITS
}

fn hide_bits(leaves: &mut [Leaf], Word { function, index, register }: Word, bits: u32) {
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == function && leaf.index == index) {
        leaf.set(register, leaf.get(register) & !bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::samples;

    const AVX: u64 = 1 << 2;
    const AVX512: u64 = 0b111 << 5;
    const PKRU: u64 = 1 << 9;
    const TILES: u64 = 0b11 << 17;

    #[test]
    fn an_area_ends_behind_its_last_component() {
        let leaves = samples::everything();
        assert_eq!(standard_bytes(&leaves, HEAD), 576);
        assert_eq!(standard_bytes(&leaves, HEAD | AVX), 832);
        assert_eq!(standard_bytes(&leaves, HEAD | AVX | AVX512), 2688);
        assert_eq!(standard_bytes(&leaves, user(&leaves)), 11008);
        assert_eq!(compact_bytes(&leaves, HEAD | PKRU), 584);
        assert_eq!(compact_bytes(&leaves, HEAD | PKRU | TILES), 640 + 64 + 8192);
    }

    #[test]
    fn features_and_their_state_go_together() {
        let mut leaves = samples::everything();
        hide(&mut leaves, 1 << 6);
        settle(&mut leaves);
        assert_eq!(user(&leaves) & (AVX | AVX512), AVX);
        assert!(!features::beginning("avx512").any(|feature| feature.is_shown(&leaves)));
        assert!(features::beginning("avx2").all(|feature| feature.is_shown(&leaves)));
        assert_eq!(leaf::word(&leaves, Word::new(FUNCTION, 0, Ecx)), 11008, "behind it are the tiles");
    }

    #[test]
    fn without_xsave_there_is_no_state() {
        let mut leaves = samples::everything();
        hide_bits(&mut leaves, XSAVE.0, XSAVE.1);
        settle(&mut leaves);
        assert!(leaves.iter().filter(|leaf| leaf.function == FUNCTION).all(|leaf| leaf.registers == [0; 4]));
        assert!(!features::beginning("avx").any(|feature| feature.is_shown(&leaves)));
        assert!(features::beginning("sse").all(|feature| feature.is_shown(&leaves)));
    }

    #[test]
    fn what_fits_together_stays() {
        let mut leaves = samples::everything();
        let before = leaves.clone();
        settle(&mut leaves);
        assert_eq!(leaves, before);
    }

    #[test]
    fn a_component_has_its_features() {
        let names = |number| features_of(number).map(|feature| feature.to_string()).collect::<Vec<_>>();
        assert_eq!(names(9), ["xcr0.pkru", "cpuid d.1:ecx bit 9"]);
        assert_eq!(names(62), ["xcr0.lwp", "cpuid d.1:edx bit 30"]);
    }
}
