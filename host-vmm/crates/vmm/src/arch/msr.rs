//! Model-specific registers that are part of a vCPU's state and that KVM's list (KVM_GET_MSR_INDEX_LIST)
//! leaves out, or may leave out.
//!
//! That the list is not all is known of other VMMs, which add registers by hand. Here a test looks at each
//! register that KVM lets be written, and finds it in a list, in these, or in another part of the state.

use kvm_bindings::kvm_msr_entry;
use serde::{Deserialize, Serialize};
pub use x86::msr::{IA32_TSC_DEADLINE as TSC_DEADLINE, TSC};

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Which register.
    pub index: u32,
    /// Its content.
    pub value: u64,
}

impl From<Msr> for kvm_msr_entry {
    fn from(msr: Msr) -> Self {
        Self { index: msr.index, data: msr.value, ..Default::default() }
    }
}

/// IA32_MTRR_DEF_TYPE, and its value for "enabled, write-back everywhere": what firmware leaves on each
/// processor.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// As firmware leaves it on each processor, the later ones too.
pub const MTRR_AT_BOOT: Msr = Msr { index: MTRR_DEF_TYPE, value: MTRR_ENABLED_WRITE_BACK };

/// Ranges of the memory types: eight variable ones of two registers each, and eleven fixed ones.
/// IA32_MTRRCAP, which says so, can't be written.
const MTRR_VARIABLE: std::ops::RangeInclusive<u32> = 0x200..=0x20f;
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];

/// IA32_MCG_CAP: how many banks of machine-check registers there are, and what they can do.
pub const MCG_CAP: u32 = 0x179;

/// Ten banks, as other VMMs give their guests, and nothing beyond what each processor can do. KVM has 32 by
/// itself.
pub const MCG_CAP_AT_BOOT: u64 = 10;

/// What KVM has by itself, and what guests were given before banks were part of the state.
pub const MCG_CAP_OF_KVM: u64 = 32;

/// Bits of IA32_MCG_CAP that count the banks.
const BANKS_MASK: u64 = 0xff;

/// First register of the banks, of which each has four: control, status, address and more.
const MCE_BANKS: u32 = 0x400;
const MCE_REGISTERS: u32 = 4;

/// IA32_TSC_AUX; AMD's VM_CR (KVM keeps its lock bits for a guest that is shown no SVM too), OSVW_ID_LENGTH
/// and OSVW_STATUS: listed by some kernels, or for some hosts.
const OTHERS: [u32; 4] = [0xc000_0103, 0xc001_0114, 0xc001_0140, 0xc001_0141];

/// The registers, sorted; of a vCPU that has as many banks as KVM has.
pub fn unlisted() -> Vec<u32> {
    let banks = MCE_BANKS..MCE_BANKS + MCE_REGISTERS * banks(MCG_CAP_OF_KVM);
    let all = [MCG_CAP, MTRR_DEF_TYPE]
        .into_iter()
        .chain(MTRR_VARIABLE)
        .chain(MTRR_FIXED)
        .chain(banks)
        .chain(OTHERS);
    let mut all: Vec<u32> = all.collect();
    all.sort_unstable();
    all
}

/// Whether a vCPU with this IA32_MCG_CAP has a register, as far as that decides on it.
pub fn is_in_banks(index: u32, mcg_cap: u64) -> bool {
    let of_banks = MCE_BANKS..MCE_BANKS + MCE_REGISTERS * banks(MCG_CAP_OF_KVM);
    !of_banks.contains(&index) || index < MCE_BANKS + MCE_REGISTERS * banks(mcg_cap)
}

/// The value of a register of [`unlisted`] in a state that was saved when only listed ones were: that at
/// boot, which every copy should have had.
pub fn at_boot(index: u32) -> Msr {
    match index {
        MTRR_DEF_TYPE => MTRR_AT_BOOT,
        MCG_CAP => Msr { index, value: MCG_CAP_OF_KVM },
        _ => Msr { index, value: 0 },
    }
}

fn banks(mcg_cap: u64) -> u32 {
    u32::try_from(mcg_cap & BANKS_MASK).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_has_the_registers_of_its_banks_and_of_no_more() {
        let all = unlisted();
        assert!(all.is_sorted() && all.windows(2).all(|pair| pair[0] != pair[1]));
        let of = |mcg_cap| all.iter().filter(|index| is_in_banks(**index, mcg_cap)).count();
        assert_eq!((of(MCG_CAP_OF_KVM), of(MCG_CAP_AT_BOOT)), (all.len(), all.len() - 22 * 4));
        assert!(is_in_banks(0x427, 10) && !is_in_banks(0x428, 10) && is_in_banks(TSC, 0));
    }

    #[test]
    fn what_was_not_saved_is_as_at_boot() {
        assert_eq!(at_boot(MTRR_DEF_TYPE).value, 0x806);
        assert_eq!(at_boot(MCG_CAP).value, 32);
        assert_eq!(at_boot(0x401), Msr { index: 0x401, value: 0 });
    }
}
