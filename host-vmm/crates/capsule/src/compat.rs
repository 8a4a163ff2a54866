//! Whether a platform can run a captured VM: what the VM needs, what the platform has, and how they differ.
//!
//! A guest has looked at its CPU once, when it booted. What it was shown then has to be there wherever it
//! goes on: it will use it without asking again. So a platform checks the [`Requirements`] that came with a
//! capsule against its [`HostCapabilities`] before it builds anything, and tells all differences at once, so
//! that whoever plans a cluster need not find them one by one.
//!
//! More than a guest was shown is no difference. What only describes the CPU (its model, its caches, its
//! topology) is not compared.
//!
//! The requirements are the word of whoever sent them. One who lies gets an error of KVM's later, or a guest
//! that fails: his own.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use types::PAGE_BYTES;
use vmm::{
    arch::{
        CpuidEntry, MAX_CPUID_LEAVES, VcpuId,
        cpuid::{self, Shape},
        features::{self, ARCH_CAPABILITIES_MSR, ARCH_FLAWS, Kind, NUMBERS},
        leaf::{self, Leaf, Register, Word},
        xstate,
    },
    devices,
    kvm::{HostModel, VcpuState},
    machine::MachineState,
};

use super::{Incompatibility, Incompatible};

/// Version of the state in a capsule: another one with each change of [`MachineState`], of guest-physical
/// addresses, or of the interface between VMMs; but for what only some states have, in a part of its own,
/// which programs refuse that do not know it.
pub const STATE_VERSION: u32 = 2;

/// Versions of the state that this program can restore.
pub const READABLE_STATE_VERSIONS: RangeInclusive<u32> = 1..=STATE_VERSION;

/// How far frequencies of time-stamp counters may be apart, in millionths: what KVM itself takes for the same
/// one (kernel source, tsc_tolerance_ppm), half of what NTP can correct. A guest's clock then drifts by no
/// more than that until it is disciplined.
const TSC_TOLERANCE_PPM: u64 = 250;

/// Most registers that a state has: KVM's two lists have at most 256 each.
const MAX_MSRS: usize = 512;

/// Most devices, and most capabilities.
const MAX_NAMES: usize = 64;

/// Longest name of one in bytes.
const MAX_NAME_BYTES: usize = 64;

/// What a captured VM needs of the platform that is to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Needs")]
pub struct Requirements(Needs);

/// Its content, which is checked before it becomes requirements.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Needs {
    /// What CPUID has shown on vCPU 0. The others differ in topology alone.
    leaves: Vec<Leaf>,
    /// XCR0 of all vCPUs: the components of the state that are in use.
    xcr0: u64,
    /// Size of each vCPU's XSAVE area in bytes.
    xsave_bytes: u64,
    /// IA32_ARCH_CAPABILITIES, where the guest could read it.
    arch_capabilities: Option<u64>,
    /// The model-specific registers that hold something.
    msrs: Vec<u32>,
    /// Frequency of the guest's time-stamp counter in kHz.
    tsc_khz: Option<u32>,
    /// Capabilities of KVM that the guest, or its state, uses; those that every platform needs are not among
    /// them.
    capabilities: Vec<String>,
    /// Size of a page in bytes.
    page_bytes: u64,
    /// The devices, and the version of each one's state.
    devices: Vec<(String, u32)>,
    /// Version of the state as a whole.
    state_version: u32,
}

/// Why requirements are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no VM has such requirements: {0}")]
pub struct Invalid(&'static str);

/// Check of the names of capabilities or of devices: not too many, and none too long.
pub(super) fn are_names<'n>(mut names: impl ExactSizeIterator<Item = &'n String>) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let is_name = |name: &String| (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(is_letter);
    names.len() <= MAX_NAMES && names.all(is_name)
}

impl TryFrom<Needs> for Requirements {
    type Error = Invalid;

    fn try_from(needs: Needs) -> Result<Self, Invalid> {
        if needs.leaves.len() > MAX_CPUID_LEAVES || needs.msrs.len() > MAX_MSRS {
            return Err(Invalid("too many leaves of CPUID or registers"));
        }
        if !are_names(needs.capabilities.iter()) || !are_names(needs.devices.iter().map(|(name, _)| name)) {
            return Err(Invalid("too many capabilities or devices, or one without a proper name"));
        }
        Ok(Self(needs))
    }
}

impl Requirements {
    /// Those of a captured machine.
    ///
    /// A register that is zero in the state needs nothing: KVM lets registers be read as zero that the guest
    /// can't use.
    pub fn of(state: &MachineState) -> Self {
        Self::of_vcpus(&state.vcpus, &state.capabilities, state.tsc_khz)
    }

    fn of_vcpus(vcpus: &[VcpuState], capabilities: &[String], tsc_khz: Option<u32>) -> Self {
        let registers = || vcpus.iter().flat_map(|vcpu| vcpu.msrs());
        let mut msrs: Vec<u32> = registers().filter(|msr| msr.value != 0).map(|msr| msr.index).collect();
        msrs.sort_unstable();
        msrs.dedup();
        let leaves = vcpus.first().map(|vcpu| leaf::leaves(vcpu.cpuid())).unwrap_or_default();
        let is_shown = features::is_msr_shown(ARCH_CAPABILITIES_MSR, &leaves);
        let arch_capabilities = registers().find(|msr| is_shown && msr.index == ARCH_CAPABILITIES_MSR);
        Self(Needs {
            xcr0: vcpus.iter().filter_map(VcpuState::xcr0).fold(0, |all, xcr0| all | xcr0),
            xsave_bytes: vcpus.first().map_or(0, |vcpu| vcpu.xsave_bytes() as u64),
            arch_capabilities: arch_capabilities.map(|msr| msr.value),
            leaves,
            msrs,
            tsc_khz,
            capabilities: capabilities.to_vec(),
            page_bytes: PAGE_BYTES,
            devices: devices::VERSIONS.iter().map(|&(name, version)| (name.to_owned(), version)).collect(),
            state_version: STATE_VERSION,
        })
    }

    /// Frequency of the guest's time-stamp counter in kHz, where it is known.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.0.tsc_khz
    }
}

/// Capabilities of a host, for VMs that come to it.
#[derive(Debug, Clone)]
pub struct HostCapabilities {
    /// What CPUID can show on a vCPU, whatever profile the platform's own guests have.
    leaves: Vec<Leaf>,
    /// What the platform's own guests are shown, before it is made for a certain vCPU.
    shown: Vec<CpuidEntry>,
    tsc_deadline_timer: bool,
    xsave_bytes: u64,
    arch_capabilities: u64,
    /// Sorted.
    msrs: Vec<u32>,
    tsc_khz: Option<u32>,
    tsc_scaling: bool,
    capabilities: Vec<String>,
    page_bytes: u64,
    /// The devices, and the versions of each one's state that can be restored.
    devices: Vec<(String, RangeInclusive<u32>)>,
    state_versions: RangeInclusive<u32>,
}

impl HostCapabilities {
    /// That of a host of this model.
    pub fn of(model: &HostModel) -> Self {
        let shape = Shape { vcpus: 1, tsc_deadline_timer: model.tsc_deadline_timer };
        Self {
            leaves: leaf::leaves(&cpuid::for_vcpu(&model.cpuid, shape, VcpuId(0))),
            shown: model.shown.clone(),
            tsc_deadline_timer: model.tsc_deadline_timer,
            xsave_bytes: model.xsave_bytes as u64,
            arch_capabilities: model.arch_capabilities,
            msrs: model.msrs.clone(),
            tsc_khz: model.tsc_khz,
            tsc_scaling: model.tsc_scaling,
            capabilities: model.capabilities.clone(),
            page_bytes: PAGE_BYTES,
            devices: devices::VERSIONS
                .iter()
                .map(|&(name, version)| (name.to_owned(), version..=version))
                .collect(),
            state_versions: READABLE_STATE_VERSIONS,
        }
    }

    /// Whether a VM of so many vCPUs was shown another CPU than the platform's own guests are: a vCPU that
    /// has run can't become such a one any more (KVM_SET_CPUID2).
    pub fn has_foreign_cpu(&self, requirements: &Requirements, vcpus: u8) -> bool {
        let shape = Shape { vcpus: vcpus.max(1), tsc_deadline_timer: self.tsc_deadline_timer };
        requirements.0.leaves != leaf::leaves(&cpuid::for_vcpu(&self.shown, shape, VcpuId(0)))
    }
}

/// Checks whether a platform can run a VM.
///
/// # Errors
/// [`Incompatible`], with every difference.
pub fn check(requirements: &Requirements, host: &HostCapabilities) -> Result<(), Incompatible> {
    let needs = &requirements.0;
    let mut differences = Vec::new();
    differences.extend(vendor(needs, host));
    differences.extend(missing_features(needs, host));
    differences.extend(arch_capabilities(needs, host));
    differences.extend(numbers(needs, host));
    differences.extend(unknown_leaves(needs, host));
    differences.extend(components(needs, host));
    differences.extend(registers(needs, host));
    differences.extend(versions_and_sizes(needs, host));
    if differences.is_empty() { Ok(()) } else { Err(Incompatible(differences)) }
}

fn vendor(needs: &Needs, host: &HostCapabilities) -> Option<Incompatibility> {
    let (needed, offered) = (leaf::vendor(&needs.leaves), leaf::vendor(&host.leaves));
    (needed != offered).then_some(Incompatibility::Vendor { needed, offered })
}

/// Features that the guest was shown, and components of the state that it uses.
fn missing_features(needs: &Needs, host: &HostCapabilities) -> impl Iterator<Item = Incompatibility> {
    let in_use = move |word: Word| match (word.function, word.index, word.register) {
        (xstate::FUNCTION, 0, Register::Eax) => needs.xcr0,
        (xstate::FUNCTION, 0, Register::Edx) => needs.xcr0 >> u32::BITS,
        _ => 0,
    };
    features::words().flat_map(move |word| {
        let used = u32::try_from(in_use(word) & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        let needed = leaf::word(&needs.leaves, word) | used;
        features::of(word, needed & !leaf::word(&host.leaves, word)).map(Incompatibility::Feature)
    })
}

/// What the guest relies on by IA32_ARCH_CAPABILITIES: that the CPU has what it says, and no flaw that it
/// does not tell of.
fn arch_capabilities(needs: &Needs, host: &HostCapabilities) -> impl Iterator<Item = Incompatibility> {
    let promised = |value: u64| value ^ ARCH_FLAWS;
    let broken =
        needs.arch_capabilities.map_or(0, |needed| promised(needed) & !promised(host.arch_capabilities));
    (0..u64::BITS).filter(move |bit| broken >> bit & 1 != 0).map(Incompatibility::ArchCapability)
}

fn numbers(needs: &Needs, host: &HostCapabilities) -> impl Iterator<Item = Incompatibility> {
    NUMBERS.iter().filter_map(move |number| {
        let (needed, offered) = (number.shown(&needs.leaves), number.shown(&host.leaves));
        (needed > offered).then_some(Incompatibility::Number { name: number.name, needed, offered })
    })
}

/// Leaves that hold something of which this program does not know what it is: they have to be the same.
fn unknown_leaves(needs: &Needs, host: &HostCapabilities) -> impl Iterator<Item = Incompatibility> {
    let is_seen = move |leaf: &&Leaf| leaf::find(&needs.leaves, leaf.function, leaf.index) == Some(*leaf);
    let unknown = needs
        .leaves
        .iter()
        .filter(is_seen)
        .filter(|leaf| matches!(features::kind(leaf), Kind::Unknown | Kind::Tiles));
    let differ = unknown.filter(move |leaf| {
        let offered =
            leaf::find(&host.leaves, leaf.function, leaf.index).map_or([0; 4], |leaf| leaf.registers);
        leaf.registers != [0; 4] && leaf.registers != offered
    });
    differ.map(|&Leaf { function, index, .. }| Incompatibility::Leaf { function, index })
}

/// Components of the state that are there on both sides, but not alike. Those that are missing are missing
/// features.
fn components(needs: &Needs, host: &HostCapabilities) -> impl Iterator<Item = Incompatibility> {
    let both = xstate::shown(&needs.leaves) & xstate::shown(&host.leaves);
    let differ = xstate::numbers(both).filter_map(move |number| {
        let [needed, offered] = [&needs.leaves, &host.leaves].map(|leaves| xstate::component(leaves, number));
        (needed != offered).then_some(Incompatibility::Component { number, needed, offered })
    });
    let (needed, offered) = (needs.xsave_bytes, host.xsave_bytes);
    differ.chain((needed != offered).then_some(Incompatibility::XsaveArea { needed, offered }))
}

/// Registers that hold something, and the frequency of the one that counts time.
fn registers(needs: &Needs, host: &HostCapabilities) -> impl Iterator<Item = Incompatibility> {
    let missing = needs.msrs.iter().filter(move |index| host.msrs.binary_search(index).is_err());
    let (needed, offered) = (needs.tsc_khz, host.tsc_khz);
    let same = match (needed, offered) {
        (Some(_), _) if host.tsc_scaling => true,
        (Some(needed), Some(offered)) => is_same_frequency(needed, offered),
        _ => false,
    };
    missing
        .map(|index| Incompatibility::Msr(*index))
        .chain((!same).then_some(Incompatibility::Tsc { needed, offered }))
}

/// Whether a guest that counts on `needed` kHz can do with `offered`.
fn is_same_frequency(needed: u32, offered: u32) -> bool {
    u64::from(needed.abs_diff(offered)) * 1_000_000 <= u64::from(needed) * TSC_TOLERANCE_PPM
}

/// Capabilities, pages, devices, and the state as a whole.
fn versions_and_sizes(needs: &Needs, host: &HostCapabilities) -> impl Iterator<Item = Incompatibility> {
    let capabilities = needs.capabilities.iter().filter(move |name| !host.capabilities.contains(name));
    let devices = needs.devices.iter().filter_map(move |(name, needed)| {
        let offered =
            host.devices.iter().find(|(known, _)| known == name).map(|(_, versions)| versions.clone());
        let fits = offered.as_ref().is_some_and(|versions| versions.contains(needed));
        (!fits).then(|| Incompatibility::Device { name: name.clone(), needed: *needed, offered })
    });
    let (needed, offered) = (needs.page_bytes, host.page_bytes);
    let pages = (needed != offered).then_some(Incompatibility::PageSize { needed, offered });
    let (needed, offered) = (needs.state_version, host.state_versions.clone());
    let state = (!offered.contains(&needed)).then_some(Incompatibility::StateVersion { needed, offered });
    capabilities.cloned().map(Incompatibility::Capability).chain(devices).chain(pages).chain(state)
}

#[cfg(test)]
#[path = "compat_test.rs"]
mod tests;
