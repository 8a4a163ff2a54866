//! CPUs for tests: one that has everything, and random ones.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{
    features,
    leaf::{Leaf, Register, Word},
    xstate,
};
use crate::arch::CpuidEntry;

/// Components as Intel's processors have them: number, size, offset, flags.
const COMPONENTS: [[u32; 4]; 12] = [
    [2, 256, 576, 0],
    [3, 64, 960, 0],
    [4, 64, 1024, 0],
    [5, 64, 1088, 0],
    [6, 512, 1152, 0],
    [7, 1024, 1664, 0],
    [9, 8, 2688, 0],
    [11, 16, 0, 1],
    [12, 24, 0, 1],
    [17, 64, 2752, 2],
    [18, 8192, 2816, 2],
    [19, 128, 960, 0],
];

/// A CPU with all features that have a name.
pub fn everything() -> Vec<Leaf> {
    let mut words: BTreeMap<Word, u32> = BTreeMap::new();
    for feature in features::all().filter(|feature| feature.name().is_some()) {
        *words.entry(feature.word()).or_default() |= feature.mask();
    }
    words.insert(Word::new(0x8000_0008, 0, Register::Eax), 0x39_2e);
    words.insert(Word::new(0xa, 0, Register::Eax), 0x0730_0802);
    words.insert(Word::new(0x24, 0, Register::Ebx), 0x7_0001);
    words.insert(Word::new(xstate::FUNCTION, 0, Register::Ebx), 11008);
    words.insert(Word::new(xstate::FUNCTION, 0, Register::Ecx), 11008);
    words.insert(Word::new(xstate::FUNCTION, 1, Register::Ebx), 11008);
    cpu(words, u64::MAX, 0)
}

/// A CPU with any features. What its components are follows neither from these nor from one place alone.
pub fn any_cpu() -> impl Strategy<Value = Vec<Leaf>> {
    let words: Vec<Word> = features::words().collect();
    let bits = proptest::collection::vec(any::<u32>(), words.len());
    let numbers = (36..=52u32, prop_oneof![Just(48u32), Just(57)], any::<u32>(), any::<u32>());
    let shift = prop_oneof![4 => Just(0u32), 1 => Just(64)];
    (bits, numbers, any::<u64>(), shift).prop_map(
        move |(bits, (physical, linear, pmu, fixed), components, shift)| {
            let mut words: BTreeMap<Word, u32> = words.iter().copied().zip(bits).collect();
            words.insert(Word::new(0x8000_0008, 0, Register::Eax), linear << 8 | physical);
            words.insert(Word::new(0xa, 0, Register::Eax), pmu);
            words.insert(Word::new(0xa, 0, Register::Edx), fixed);
            cpu(words, components, shift)
        },
    )
}

/// The entries that KVM would have for these leaves.
pub fn entries(leaves: &[Leaf]) -> Vec<CpuidEntry> {
    leaves.iter().map(|leaf| leaf.into_entry(CpuidEntry::default())).collect()
}

/// A CPU with these words, but for the components: those of `mask` that are known, as far behind their usual
/// places as `shift` says.
fn cpu(mut words: BTreeMap<Word, u32>, mask: u64, shift: u32) -> Vec<Leaf> {
    let intel =
        [0x24, u32::from_le_bytes(*b"Genu"), u32::from_le_bytes(*b"ntel"), u32::from_le_bytes(*b"ineI")];
    let mut leaves = vec![
        Leaf { function: 0, index: 0, registers: intel },
        Leaf {
            function: 0xb,
            index: 0,
            registers: [words.len().try_into().unwrap_or(u32::MAX), shift, 3, 4],
        },
    ];
    let (mut user, mut supervisor) = (0b11, 0);
    for [number, bytes, offset, flags] in
        COMPONENTS.into_iter().filter(|[number, ..]| mask >> number & 1 != 0)
    {
        let is_supervisors = flags & 1 != 0;
        *(if is_supervisors { &mut supervisor } else { &mut user }) |= 1 << number;
        let offset = if is_supervisors { 0 } else { offset + shift };
        leaves.push(Leaf { function: xstate::FUNCTION, index: number, registers: [bytes, offset, flags, 0] });
    }
    words.insert(Word::new(xstate::FUNCTION, 0, Register::Eax), user);
    words.insert(Word::new(xstate::FUNCTION, 0, Register::Edx), 0);
    words.insert(Word::new(xstate::FUNCTION, 1, Register::Ecx), supervisor);
    words.insert(Word::new(xstate::FUNCTION, 1, Register::Edx), 0);
    let mut of_words: BTreeMap<(u32, u32), Leaf> = BTreeMap::new();
    for (Word { function, index, register }, bits) in words {
        let leaf = of_words.entry((function, index)).or_insert(Leaf { function, index, registers: [0; 4] });
        leaf.set(register, bits);
    }
    leaves.extend(of_words.into_values());
    leaves
}
