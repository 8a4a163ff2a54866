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
}

impl Interface {
    /// The two leaves, in order, that announce this interface.
    pub fn to_leaves(self) -> [Registers; 2] {
        let word = |at: usize| {
            u32::from_le_bytes([SIGNATURE[at], SIGNATURE[at + 1], SIGNATURE[at + 2], SIGNATURE[at + 3]])
        };
        let [b0, b1, b2, b3, b4, b5, b6, b7] = self.control_page_gpa.to_le_bytes();
        [
            Registers { eax: LEAF_INTERFACE, ebx: word(0), ecx: word(4), edx: word(8) },
            Registers {
                eax: self.abi_version,
                ebx: u32::from_le_bytes([b0, b1, b2, b3]),
                ecx: u32::from_le_bytes([b4, b5, b6, b7]),
                edx: u32::from(self.doorbell_port),
            },
        ]
    }

    /// The interface that two leaves announce, or `None` where they are not this VMM's.
    pub fn from_leaves(leaves: [Registers; 2]) -> Option<Self> {
        let [signature, interface] = leaves;
        let ours = signature.eax >= LEAF_INTERFACE
            && signature.ebx.to_le_bytes() == SIGNATURE[0..4]
            && signature.ecx.to_le_bytes() == SIGNATURE[4..8]
            && signature.edx.to_le_bytes() == SIGNATURE[8..12];
        if !ours {
            return None;
        }
        Some(Self {
            abi_version: interface.eax,
            control_page_gpa: u64::from(interface.ebx) | u64::from(interface.ecx) << 32,
            doorbell_port: u16::try_from(interface.edx).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_carry_the_interface() {
        let interface = Interface { abi_version: 1, control_page_gpa: 0x12_d000_0000, doorbell_port: 0x560 };
        assert_eq!(Interface::from_leaves(interface.to_leaves()), Some(interface));
    }

    #[test]
    fn foreign_leaves_are_not_ours() {
        let [signature, interface] =
            Interface { abi_version: 1, control_page_gpa: 0xd000_0000, doorbell_port: 0x560 }.to_leaves();
        let foreign = Registers { ebx: 0, ..signature };
        assert_eq!(Interface::from_leaves([foreign, interface]), None);
        let port_too_large = Registers { edx: 0x1_0000, ..interface };
        assert_eq!(Interface::from_leaves([signature, port_too_large]), None);
    }
}
