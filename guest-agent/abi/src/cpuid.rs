//! How a guest finds the VMM: CPUID leaves that need no privilege to read.
//!
//! KVM keeps 0x4000_0000 to 0x4000_00ff for itself; leaves from 0x4000_0100 up are a VMM's own (kernel
//! documentation, virt/kvm/x86/cpuid.rst, and the hypervisor convention of a new signature every 0x100
//! leaves).

/// Leaf with the signature: EAX is the highest leaf of the range, EBX, ECX and EDX hold [`SIGNATURE`].
pub const LEAF_SIGNATURE: u32 = 0x4000_0100;

/// Leaf with the interface: EAX is the ABI version, EBX and ECX the low and high half of the control page's
/// guest-physical address, EDX the doorbell port.
pub const LEAF_INTERFACE: u32 = 0x4000_0101;

/// Leaf with the [`features`](crate::features): EAX and EBX are the word's low and high half, ECX and EDX
/// are zero. VMMs of before this leaf end with [`LEAF_INTERFACE`].
pub const LEAF_FEATURES: u32 = 0x4000_0102;

/// What EBX, ECX and EDX of [`LEAF_SIGNATURE`] spell.
pub const SIGNATURE: [u8; 12] = *b"VMforkVMfork";

/// EAX, EBX, ECX and EDX of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Registers {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Where the interface is to be found in this VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interface {
    /// ABI version that the VMM speaks.
    pub abi_version: u32,
    /// Guest-physical address of the control page.
    pub control_page_gpa: u64,
    /// Port of the doorbell.
    pub doorbell_port: u16,
    /// The [`features`](crate::features) of the VMM on which the guest was booted; zero where that VMM does
    /// not say. The control page's header has those of the VMM of now.
    pub features: u64,
}

impl Interface {
    /// The leaves that announce this interface, from [`LEAF_SIGNATURE`] on.
    pub fn to_leaves(self) -> [Registers; 3] {
        let word = |at: usize| {
            u32::from_le_bytes([SIGNATURE[at], SIGNATURE[at + 1], SIGNATURE[at + 2], SIGNATURE[at + 3]])
        };
        let (gpa_low, gpa_high) = halves(self.control_page_gpa);
        let (features_low, features_high) = halves(self.features);
        [
            Registers { eax: LEAF_FEATURES, ebx: word(0), ecx: word(4), edx: word(8) },
            Registers {
                eax: self.abi_version,
                ebx: gpa_low,
                ecx: gpa_high,
                edx: u32::from(self.doorbell_port),
            },
            Registers { eax: features_low, ebx: features_high, ecx: 0, edx: 0 },
        ]
    }

    /// The interface that CPUID announces, where `cpuid` answers for each leaf; `None` where it is not this
    /// VMM's.
    pub fn read(cpuid: impl Fn(u32) -> Registers) -> Option<Self> {
        let signature = cpuid(LEAF_SIGNATURE);
        let ours = signature.eax >= LEAF_INTERFACE
            && signature.ebx.to_le_bytes() == SIGNATURE[0..4]
            && signature.ecx.to_le_bytes() == SIGNATURE[4..8]
            && signature.edx.to_le_bytes() == SIGNATURE[8..12];
        if !ours {
            return None;
        }
        let interface = cpuid(LEAF_INTERFACE);
        // For leaves behind the highest one, Intel's processors show another leaf's content, and so does KVM.
        let features = if signature.eax >= LEAF_FEATURES {
            let Registers { eax, ebx, .. } = cpuid(LEAF_FEATURES);
            whole(eax, ebx)
        } else {
            0
        };
        Some(Self {
            abi_version: interface.eax,
            control_page_gpa: whole(interface.ebx, interface.ecx),
            doorbell_port: u16::try_from(interface.edx).ok()?,
            features,
        })
    }
}

/// Low and high half of a word.
fn halves(word: u64) -> (u32, u32) {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = word.to_le_bytes();
    (u32::from_le_bytes([b0, b1, b2, b3]), u32::from_le_bytes([b4, b5, b6, b7]))
}

/// The word of these halves.
fn whole(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERFACE: Interface = Interface {
        abi_version: 1,
        control_page_gpa: 0x12_d000_0000,
        doorbell_port: 0x560,
        features: 0x8000_0001_4000_0002,
    };

    /// What is read where CPUID has these leaves, and behind them, as KVM does, something else.
    fn read(leaves: &[Registers]) -> Option<Interface> {
        let garbage = Registers { eax: 7, ebx: 7, ecx: 7, edx: 7 };
        let index = |leaf| usize::try_from(leaf - LEAF_SIGNATURE).unwrap();
        Interface::read(|leaf| leaves.get(index(leaf)).copied().unwrap_or(garbage))
    }

    #[test]
    fn leaves_carry_the_interface() {
        assert_eq!(read(&INTERFACE.to_leaves()), Some(INTERFACE));
    }

    #[test]
    fn a_vmm_of_before_the_features_says_nothing_of_them() {
        let [signature, interface, _] = INTERFACE.to_leaves();
        let two = [Registers { eax: LEAF_INTERFACE, ..signature }, interface];
        assert_eq!(read(&two), Some(Interface { features: 0, ..INTERFACE }));
    }

    #[test]
    fn what_a_later_vmm_shows_more_is_ignored() {
        let [signature, interface, features] = INTERFACE.to_leaves();
        let more = Registers { eax: 5, ebx: 5, ecx: 5, edx: 5 };
        let signature = Registers { eax: LEAF_FEATURES + 1, ..signature };
        let features = Registers { ecx: 1, edx: 1, ..features };
        assert_eq!(read(&[signature, interface, features, more]), Some(INTERFACE));
    }

    #[test]
    fn foreign_leaves_are_not_ours() {
        let [signature, interface, features] = INTERFACE.to_leaves();
        let foreign = Registers { ebx: 0, ..signature };
        assert_eq!(read(&[foreign, interface, features]), None);
        let port_too_large = Registers { edx: 0x1_0000, ..interface };
        assert_eq!(read(&[signature, port_too_large, features]), None);
        assert_eq!(read(&[Registers { eax: LEAF_SIGNATURE, ..signature }]), None);
    }
}
