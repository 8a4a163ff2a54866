//! A leaf of CPUID as a value, and the words that it consists of.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::arch::CpuidEntry;

/// A register in which CPUID answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// Where CPUID shows 32 bits: one register of one subleaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Word {
    /// The leaf: EAX before the instruction.
    pub function: u32,
    /// The subleaf: ECX before the instruction; 0 where the leaf has none.
    pub index: u32,
    /// The register.
    pub register: Register,
}

impl Word {
    /// The word that `register` of this subleaf is.
    pub const fn new(function: u32, index: u32, register: Register) -> Self {
        Self { function, index, register }
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = match self.register {
            Register::Eax => "eax",
            Register::Ebx => "ebx",
            Register::Ecx => "ecx",
            Register::Edx => "edx",
        };
        write!(f, "{:x}.{:x}:{register}", self.function, self.index)
    }
}

/// What CPUID shows for one subleaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// The leaf: EAX before the instruction.
    pub function: u32,
    /// The subleaf: ECX before the instruction; 0 where the leaf has none.
    pub index: u32,
    /// EAX, EBX, ECX and EDX behind the instruction.
    pub registers: [u32; 4],
}

impl Leaf {
    /// What a register holds.
    pub fn get(&self, register: Register) -> u32 {
        self.registers[register as usize]
    }

    /// Has a register hold `value`.
    pub fn set(&mut self, register: Register, value: u32) {
        self.registers[register as usize] = value;
    }

    /// This leaf where `entry` stood, with the flags that KVM has for it.
    pub fn into_entry(self, entry: CpuidEntry) -> CpuidEntry {
        let Self { function, index, registers: [eax, ebx, ecx, edx] } = self;
        CpuidEntry { function, index, eax, ebx, ecx, edx, ..entry }
    }
}

impl From<&CpuidEntry> for Leaf {
    fn from(entry: &CpuidEntry) -> Self {
        let &CpuidEntry { function, index, eax, ebx, ecx, edx, .. } = entry;
        Self { function, index, registers: [eax, ebx, ecx, edx] }
    }
}

/// The leaves that KVM's entries are.
pub fn leaves(entries: &[CpuidEntry]) -> Vec<Leaf> {
    entries.iter().map(Leaf::from).collect()
}

/// What a guest sees that asks for a subleaf: the first one that fits.
pub fn find(leaves: &[Leaf], function: u32, index: u32) -> Option<&Leaf> {
    leaves.iter().find(|leaf| leaf.function == function && leaf.index == index)
}

/// What a guest sees of a word; zero where there is no such leaf.
pub fn word(leaves: &[Leaf], word: Word) -> u32 {
    find(leaves, word.function, word.index).map_or(0, |leaf| leaf.get(word.register))
}

/// Who made the processor, as its 12 letters; others than ASCII are escaped.
pub fn vendor(leaves: &[Leaf]) -> String {
    let [_, ebx, ecx, edx] = find(leaves, 0, 0).map_or([0; 4], |leaf| leaf.registers);
    [ebx, edx, ecx].map(u32::to_le_bytes).concat().escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_is_what_kvm_has() {
        let entry = CpuidEntry {
            function: 7,
            index: 1,
            flags: 1,
            eax: 1,
            ebx: 2,
            ecx: 3,
            edx: 4,
            ..Default::default()
        };
        let mut leaf = Leaf::from(&entry);
        assert_eq!(leaf.into_entry(entry), entry);
        assert_eq!(leaf.get(Register::Ecx), 3);
        leaf.set(Register::Edx, 5);
        assert_eq!(leaf.into_entry(entry), CpuidEntry { edx: 5, ..entry });
        assert_eq!(word(&[leaf], Word::new(7, 1, Register::Ebx)), 2);
        assert_eq!(word(&[leaf], Word::new(7, 0, Register::Ebx)), 0);
    }

    #[test]
    fn the_vendor_is_spelled() {
        let of = |ebx: &[u8; 4], edx: &[u8; 4], ecx: &[u8; 4]| {
            let [ebx, ecx, edx] = [ebx, ecx, edx].map(|part| u32::from_le_bytes(*part));
            vendor(&[Leaf { function: 0, index: 0, registers: [0, ebx, ecx, edx] }])
        };
        assert_eq!(of(b"Genu", b"ineI", b"ntel"), "GenuineIntel");
        assert_eq!(of(b"\x1b[2J", b"\0\0\0\0", b"\n\n\n\n"), "\\x1b[2J\\x00\\x00\\x00\\x00\\n\\n\\n\\n");
        assert_eq!(vendor(&[]), "\\x00".repeat(12));
    }
}
