//! What CPUID shows to a guest: what KVM supports, the topology of this VM, and the leaves by which guests
//! find the VMM.

use vmfork_abi::{
    ABI_VERSION,
    cpuid::{Interface, LEAF_SIGNATURE, Registers},
    features,
};

use super::layout::{CONTROL_PAGE, DOORBELL_PORT};
use crate::arch::{CpuidEntry, VcpuId};

const FEATURES: u32 = 0x1;
const CACHES_INTEL: u32 = 0x4;
const EXTENDED_FEATURES: u32 = 0x7;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

const FEATURES_ECX_VMX: u32 = 1 << 5;
const FEATURES_ECX_X2APIC: u32 = 1 << 21;
const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_HTT: u32 = 1 << 28;
const EXTENDED_EBX_SGX: u32 = 1 << 2;
const AMD_ECX_SVM: u32 = 1 << 2;

/// The entry's subleaf (ECX) matters (KVM_CPUID_FLAG_SIGNIFCANT_INDEX).
const SUBLEAF_MATTERS: u32 = 1;

/// What this VMM promises its guests, as a word of [`features`]: in CPUID to those that boot here, and in
/// the control page's header to all.
pub const ABI_FEATURES: u64 =
    features::LOCATION | features::COPIES | features::GENERATION_PAGE | features::ASKER;

/// What differs from what KVM supports.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// vCPUs of the VM: one thread a core, one package.
    pub vcpus: u8,
    /// KVM has a TSC deadline timer.
    pub tsc_deadline_timer: bool,
}

/// The leaves that the vCPU `vcpu` shows, made from those that KVM supports.
///
/// Hidden is what a fork could not copy: nested virtualisation and SGX enclaves.
pub fn for_vcpu(supported: &[CpuidEntry], shape: Shape, vcpu: VcpuId) -> Vec<CpuidEntry> {
    let mut entries: Vec<CpuidEntry> = supported
        .iter()
        .copied()
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2))
        .map(|entry| adapt(entry, shape, vcpu))
        .collect();
    if supported.iter().any(|entry| entry.function == TOPOLOGY) {
        entries.extend(topology(shape, vcpu));
    }
    let interface = Interface {
        abi_version: ABI_VERSION,
        control_page_gpa: CONTROL_PAGE.0,
        doorbell_port: DOORBELL_PORT,
        features: ABI_FEATURES,
    };
    entries
        .extend((LEAF_SIGNATURE..).zip(interface.to_leaves()).map(|(function, leaf)| entry(function, leaf)));
    entries
}

fn adapt(mut entry: CpuidEntry, shape: Shape, vcpu: VcpuId) -> CpuidEntry {
    let apic_id = u32::from(vcpu.0);
    let others = u32::from(shape.vcpus) - 1;
    match entry.function {
        FEATURES => {
            entry.ebx = entry.ebx & 0xffff | u32::from(shape.vcpus) << 16 | apic_id << 24;
            entry.ecx &= !(FEATURES_ECX_VMX | FEATURES_ECX_TSC_DEADLINE);
            entry.ecx |= FEATURES_ECX_HYPERVISOR | FEATURES_ECX_X2APIC;
            if shape.tsc_deadline_timer {
                entry.ecx |= FEATURES_ECX_TSC_DEADLINE;
            }
            entry.edx = set(entry.edx, FEATURES_EDX_HTT, others > 0);
        }
        // EAX: bits 31-26 are the other cores of the package; bits 25-14 the other threads that share the
        // cache.
        CACHES_INTEL if entry.eax & 0x1f != 0 => {
            let sharers = if entry.eax >> 5 & 7 < 3 { 0 } else { others };
            entry.eax = entry.eax & 0x3fff | sharers << 14 | others.min(63) << 26;
        }
        EXTENDED_FEATURES if entry.index == 0 => entry.ebx &= !EXTENDED_EBX_SGX,
        AMD_FEATURES => entry.ecx &= !AMD_ECX_SVM,
        // ECX: bits 15-12 are the bits of an APIC ID that number the core; bits 7-0 the other cores.
        AMD_SIZES => entry.ecx = entry.ecx & !0xf0ff | core_bits(shape) << 12 | others,
        AMD_CACHES if entry.eax & 0x1f != 0 => {
            let sharers = if entry.eax >> 5 & 7 < 3 { 0 } else { others };
            entry.eax = entry.eax & !(0xfff << 14) | sharers << 14;
        }
        AMD_TOPOLOGY => (entry.eax, entry.ebx, entry.ecx) = (apic_id, apic_id & 0xff, 0),
        _ => {}
    }
    entry
}

/// The extended topology leaf: a thread level of one, a core level of all, and the end.
fn topology(shape: Shape, vcpu: VcpuId) -> impl Iterator<Item = CpuidEntry> {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let edx = u32::from(vcpu.0);
    let levels = [
        Registers { eax: 0, ebx: 1, ecx: THREAD, edx },
        Registers { eax: core_bits(shape), ebx: u32::from(shape.vcpus), ecx: CORE, edx },
        Registers { eax: 0, ebx: 0, ecx: 0, edx },
    ];
    (0..).zip(levels).map(|(index, level)| {
        let ecx = level.ecx | index;
        CpuidEntry { index, flags: SUBLEAF_MATTERS, ..entry(TOPOLOGY, Registers { ecx, ..level }) }
    })
}

/// Bits of an APIC ID that number the core.
fn core_bits(shape: Shape) -> u32 {
    u32::from(shape.vcpus).next_power_of_two().trailing_zeros()
}

fn set(word: u32, bit: u32, value: bool) -> u32 {
    if value { word | bit } else { word & !bit }
}

fn entry(function: u32, leaf: Registers) -> CpuidEntry {
    let Registers { eax, ebx, ecx, edx } = leaf;
    CpuidEntry { function, eax, ebx, ecx, edx, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Registers = Registers { eax: 0, ebx: 0, ecx: 0, edx: 0 };

    fn find(entries: &[CpuidEntry], function: u32, index: u32) -> CpuidEntry {
        *entries.iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn a_guest_finds_the_vmm() {
        let shown = for_vcpu(&[], Shape { vcpus: 1, tsc_deadline_timer: true }, VcpuId(0));
        let interface = Interface::read(|leaf| {
            let CpuidEntry { eax, ebx, ecx, edx, .. } = find(&shown, leaf, 0);
            Registers { eax, ebx, ecx, edx }
        });
        let interface = interface.unwrap();
        assert_eq!(interface.control_page_gpa, CONTROL_PAGE.0);
        assert_eq!(interface.doorbell_port, DOORBELL_PORT);
        assert_eq!(interface.features, ABI_FEATURES);
        assert!(find(&shown, 0x4000_0100, 0).eax == 0x4000_0102 && shown.len() == 3);
    }

    #[test]
    fn each_vcpu_has_its_apic_id() {
        let supported =
            [entry(FEATURES, Registers { ebx: 0x1234_5678, ..NOTHING }), entry(TOPOLOGY, NOTHING)];
        let shown = for_vcpu(&supported, Shape { vcpus: 3, tsc_deadline_timer: false }, VcpuId(2));
        assert_eq!(find(&shown, FEATURES, 0).ebx, 0x0203_5678);
        assert_eq!(find(&shown, FEATURES, 0).ecx & FEATURES_ECX_TSC_DEADLINE, 0);
        assert_eq!(find(&shown, TOPOLOGY, 0).edx, 2);
        let cores = find(&shown, TOPOLOGY, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (2, 3, 0x201));
        assert_eq!(shown.iter().filter(|entry| entry.function == TOPOLOGY).count(), 3);
    }

    #[test]
    fn what_can_not_be_copied_is_hidden() {
        let all = Registers { eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, edx: u32::MAX };
        let supported = [entry(FEATURES, all), entry(EXTENDED_FEATURES, all), entry(AMD_FEATURES, all)];
        let shown = for_vcpu(&supported, Shape { vcpus: 1, tsc_deadline_timer: true }, VcpuId(0));
        assert_eq!(find(&shown, FEATURES, 0).ecx & FEATURES_ECX_VMX, 0);
        assert_eq!(find(&shown, EXTENDED_FEATURES, 0).ebx & EXTENDED_EBX_SGX, 0);
        assert_eq!(find(&shown, AMD_FEATURES, 0).ecx & AMD_ECX_SVM, 0);
    }
}
