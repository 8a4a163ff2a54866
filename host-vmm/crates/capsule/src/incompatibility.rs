//! Incompatibilities of a captured VM with a platform, in words.

use std::{fmt, ops::RangeInclusive};

use vmm::arch::{
    features::{self, ARCH_FLAWS, Feature},
    xstate::Component,
};

/// A platform can't run a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this platform can't run the VM: {}", list(.0))]
pub struct Incompatible(pub Vec<Incompatibility>);

fn list(differences: &[Incompatibility]) -> String {
    differences.iter().map(Incompatibility::to_string).collect::<Vec<_>>().join("; ")
}

/// One thing that a VM needs and a platform has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incompatibility {
    /// Another maker's CPU: its instructions for hypercalls, its registers and its flaws are others.
    Vendor {
        /// Who made the one that the guest has seen.
        needed: String,
        /// Who made this one.
        offered: String,
    },
    /// A feature that the guest was shown is missing.
    Feature(Feature),
    /// A bit of IA32_ARCH_CAPABILITIES: it is missing, or where it tells of a flaw, the guest does not know
    /// that.
    ArchCapability(u32),
    /// There is less of something that is counted.
    Number {
        /// What is counted.
        name: &'static str,
        /// What the guest was shown.
        needed: u32,
        /// What there is.
        offered: u32,
    },
    /// A leaf of which nobody here knows what it promises shows something else.
    Leaf {
        /// The leaf.
        function: u32,
        /// The subleaf.
        index: u32,
    },
    /// A component of the state has another size or place.
    Component {
        /// Its number.
        number: u32,
        /// As the guest was shown it.
        needed: Option<Component>,
        /// As it is.
        offered: Option<Component>,
    },
    /// The XSAVE area has another size.
    XsaveArea {
        /// The state's, in bytes.
        needed: u64,
        /// A vCPU's here, in bytes.
        offered: u64,
    },
    /// The time-stamp counter has another frequency, and can't be given the guest's.
    Tsc {
        /// The guest's in kHz, where it is known.
        needed: Option<u32>,
        /// This host's in kHz, where it is known.
        offered: Option<u32>,
    },
    /// A model-specific register that holds something is not there.
    Msr(u32),
    /// A capability of KVM is missing.
    Capability(String),
    /// Pages have another size.
    PageSize {
        /// The VM's, in bytes.
        needed: u64,
        /// Those here, in bytes.
        offered: u64,
    },
    /// A device is missing, or has another version.
    Device {
        /// Its name.
        name: String,
        /// Version of its state.
        needed: u32,
        /// Versions that can be restored.
        offered: Option<RangeInclusive<u32>>,
    },
    /// The state as a whole has another version.
    StateVersion {
        /// Its version.
        needed: u32,
        /// Versions that can be restored.
        offered: RangeInclusive<u32>,
    },
}

impl fmt::Display for Incompatibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { needed, offered } => write!(f, "CPU of {needed} vs {offered}"),
            Self::Feature(feature) => write!(f, "missing {feature}"),
            Self::ArchCapability(bit) if ARCH_FLAWS >> bit & 1 != 0 => {
                write!(f, "flaw {} unknown to the guest", features::arch_capability(*bit))
            }
            Self::ArchCapability(bit) => write!(f, "missing {}", features::arch_capability(*bit)),
            Self::Number { name, needed, offered } => write!(f, "{name} {needed} vs {offered}"),
            Self::Leaf { function, index } => write!(f, "unknown cpuid leaf {function:x}.{index} differs"),
            Self::Component { number, needed, offered } => {
                write!(f, "XSAVE component {number} {} vs {}", place(*needed), place(*offered))
            }
            Self::XsaveArea { needed, offered } => write!(f, "XSAVE area of {needed} bytes vs {offered}"),
            Self::Tsc { needed: None, .. } => f.write_str("TSC of unknown frequency"),
            Self::Tsc { needed: Some(needed), offered: None } => {
                write!(f, "TSC {} vs unknown frequency without scaling", gigahertz(*needed))
            }
            Self::Tsc { needed: Some(needed), offered: Some(offered) } => {
                write!(f, "TSC {} vs {} without scaling", gigahertz(*needed), gigahertz(*offered))
            }
            Self::Msr(index) => write!(f, "missing MSR {index:#x}"),
            Self::Capability(name) => write!(f, "missing {name}"),
            Self::PageSize { needed, offered } => write!(f, "pages of {needed} bytes vs {offered}"),
            Self::Device { name, needed, offered: None } => {
                write!(f, "missing device {name} version {needed}")
            }
            Self::Device { name, needed, offered: Some(offered) } => {
                write!(f, "device {name} version {needed} vs {}", versions(offered))
            }
            Self::StateVersion { needed, offered } => {
                write!(f, "state version {needed} vs {}", versions(offered))
            }
        }
    }
}

fn place(component: Option<Component>) -> String {
    match component {
        Some(Component { bytes, offset, flags }) => format!("of {bytes} bytes at {offset} (flags {flags})"),
        None => "of no size".to_owned(),
    }
}

fn gigahertz(khz: u32) -> String {
    format!("{} GHz", f64::from(khz) / 1e6)
}

fn versions(range: &RangeInclusive<u32>) -> String {
    let (first, last) = (range.start(), range.end());
    if first == last { first.to_string() } else { format!("{first} to {last}") }
}
