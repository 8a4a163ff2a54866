//! CPU profiles: what of a host's CPU its guests are shown, so that they can go on where there is less.
//!
//! All of them, `host` too, leave out features whose state a fork does not copy, and what this program does
//! not know.
//!
//! A profile takes features from what KVM supports, before [`cpuid::for_vcpu`](super::cpuid::for_vcpu) makes
//! a vCPU's leaves of it. Numbers (address bits, performance counters) are cut down likewise, and the state
//! that XSAVE saves to what the features use. Leaves that this program does not know are left out: nobody
//! could say whether another host has what they promise, or whether a copy would keep it.
//!
//! What model-specific registers promise can't be cut down, so a profile other than `host` never shows that
//! they are there: IA32_ARCH_CAPABILITIES (`arch_capabilities`), IA32_CORE_CAPABILITIES and
//! IA32_PERF_CAPABILITIES (`pdcm`). A guest that can't read the first one guards itself against each flaw
//! that this register could deny: slower than need be on some hosts. What a kernel takes from the CPU's model
//! instead, it has taken from that of the host where it booted: for others, a cluster should be of one
//! maker's generations with the same flaws. Registers that are not shown are no part of a vCPU's state.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use super::{
    features::{self, Feature, Kind, LINEAR_ADDRESS_BITS, NUMBERS, PHYSICAL_ADDRESS_BITS, UnknownFeature},
    leaf::{self, Leaf, Word},
    levels::Level,
    xstate::{self, Component},
};
use crate::arch::CpuidEntry;

/// Features that the making of a vCPU's leaves decides on, whatever the host has.
const MACHINES: &[&str] = &["hypervisor", "tsc_deadline_timer", "x2apic"];

/// Features that no profile shows but `host`: what model-specific registers tell more of, and what a leaf
/// does that is left out.
const NEVER: &[&str] = &[
    "arch_capabilities",
    "arch_perfmon_ext",
    "core_capabilities",
    "hreset",
    "pdcm",
    "sgx",
    "sgx_lc",
    "svm",
    "vmx",
];

/// Features that no profile shows at all: with them, a guest has state that is not saved, or of which no test
/// has seen that it is. The shadow stack pointer of control-flow enforcement (`shstk`, `ibt`) is in no
/// register that KVM lists; AMX, MPX, APX and LWP have components of the XSAVE area, and the others
/// registers, that no host had on which this was tried.
const UNCOPIED: &[&str] = &[
    "amx_bf16",
    "amx_complex",
    "amx_fp16",
    "amx_int8",
    "amx_tile",
    "apx",
    "arch_lbr",
    "cet_sss",
    "enqcmd",
    "fred",
    "ibt",
    "intel_pt",
    "key_locker",
    "lbr_v2",
    "lwp",
    "mpx",
    "pks",
    "shstk",
    "uintr",
    "xfd",
];

/// Components of the XSAVE area that are copied, and seen to be by a test: x87, SSE, AVX, those of AVX-512,
/// and PKRU. The supervisor's are in no area that KVM shows.
const COPIED_COMPONENTS: u64 = 0b10_1110_0111;

/// The feature whose leaves tell of AMX's tiles.
const TILES: &str = "amx_tile";

/// Linear addresses with four levels of page tables, in bits.
const FOUR_LEVELS: u32 = 48;

/// What can be wrong with a profile.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is for other processors.
    #[error("the CPU profile is one of {profile} processors, and this host's is {host}")]
    Vendor {
        /// Who made those that it is of.
        profile: String,
        /// Who made this host's.
        host: String,
    },
    /// The host has less than it shows.
    #[error("this host lacks what the CPU profile {profile} shows: {}", list(.lacking))]
    Lacking {
        /// The profile.
        profile: String,
        /// What is missing.
        lacking: Vec<Feature>,
    },
    /// Profiles of processors of different makers: a guest of one can't go on on the other.
    #[error("CPU profiles of {0} and {1} processors have no guests in common")]
    Vendors(String, String),
    /// It is no profile.
    #[error("this is no CPU profile")]
    Form(#[source] serde_json::Error),
}

/// What guests are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Profile {
    /// All that KVM supports, and copies keep.
    Host,
    /// What a level of x86-64 has.
    Level(Level),
    /// What some hosts have in common.
    Common(Subset),
}

impl Profile {
    /// The profile that has this name, if there is one.
    pub fn named(name: &str) -> Option<Self> {
        if name == Self::HOST {
            return Some(Self::Host);
        }
        Level::ALL.into_iter().find(|level| level.name() == name).map(Self::Level)
    }

    const HOST: &str = "host";

    /// The names that profiles have.
    pub fn names() -> impl Iterator<Item = &'static str> {
        std::iter::once(Self::HOST).chain(Level::ALL.map(Level::name))
    }

    /// This as text, for another process of this program.
    ///
    /// # Errors
    /// [`Error::Form`].
    pub fn to_text(&self) -> Result<String, Error> {
        match self {
            Self::Common(subset) => subset.to_json(),
            other => Ok(other.to_string()),
        }
    }

    /// What is left of the leaves that KVM supports.
    ///
    /// # Errors
    /// [`Error::Vendor`] or [`Error::Lacking`] where the host is none of those that the profile is for: its
    /// guests would not be what they are elsewhere.
    pub fn apply(&self, supported: &[CpuidEntry]) -> Result<Vec<CpuidEntry>, Error> {
        let (subset, needed) = match self {
            Self::Host => return Ok(copied(supported)),
            Self::Level(level) => (Subset::of_level(*level), level.defined()),
            Self::Common(subset) => (subset.clone(), subset.features.clone()),
        };
        let host = leaf::vendor(&leaf::leaves(supported));
        if let Some(profile) = subset.vendor.as_ref().filter(|profile| **profile != host) {
            return Err(Error::Vendor { profile: profile.clone(), host });
        }
        let left = subset.cut(supported);
        let shown = leaf::leaves(&left);
        let lacking: Vec<_> = needed.into_iter().filter(|feature| !feature.is_shown(&shown)).collect();
        if lacking.is_empty() { Ok(left) } else { Err(Error::Lacking { profile: self.to_string(), lacking }) }
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str(Self::HOST),
            Self::Level(level) => level.fmt(f),
            Self::Common(_) => f.write_str("of the file"),
        }
    }
}

impl FromStr for Profile {
    type Err = Error;

    /// The profile of this name, or the one that is the text of a file.
    fn from_str(text: &str) -> Result<Self, Error> {
        Self::named(text).map_or_else(|| Subset::from_json(text).map(Self::Common), Ok)
    }
}

/// What one or more hosts have: a set that can be cut with others, printed, and read back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub struct Subset {
    /// Who made the processors; a level does not say.
    vendor: Option<String>,
    features: BTreeSet<Feature>,
    /// The most that numbers may be, by their names. Others may be whatever the host has.
    most: BTreeMap<String, u32>,
    /// Where components of the state lie. Others may lie where the host has them.
    state: BTreeMap<u32, Component>,
}

impl Subset {
    /// What a host has, by the leaves that KVM supports there.
    pub fn of_host(supported: &[CpuidEntry]) -> Self {
        let mut leaves = leaf::leaves(supported);
        xstate::settle(&mut leaves);
        let components = xstate::numbers(xstate::shown(&leaves));
        Self::new(
            Some(leaf::vendor(&leaves)),
            features::all().filter(|feature| feature.is_shown(&leaves)).collect(),
            NUMBERS.iter().map(|number| (number.name.to_owned(), number.shown(&leaves))).collect(),
            components.filter_map(|number| Some((number, xstate::component(&leaves, number)?))).collect(),
        )
    }

    /// What guests of a level are shown. There are no performance counters in it.
    fn of_level(level: Level) -> Self {
        let most = NUMBERS.iter().filter_map(|number| match number.name {
            PHYSICAL_ADDRESS_BITS => None,
            LINEAR_ADDRESS_BITS => Some((number.name.to_owned(), FOUR_LEVELS)),
            name => Some((name.to_owned(), 0)),
        });
        Self::new(None, level.shown(), most.collect(), BTreeMap::new())
    }

    fn new(
        vendor: Option<String>,
        mut features: BTreeSet<Feature>,
        most: BTreeMap<String, u32>,
        mut state: BTreeMap<u32, Component>,
    ) -> Self {
        for feature in named(NEVER).chain(named(UNCOPIED)).chain(named(MACHINES)) {
            features.remove(&feature);
        }
        xstate::keep_together(&mut features);
        state.retain(|number, _| xstate::features_of(*number).any(|feature| features.contains(&feature)));
        Self { vendor, features, most, state }
    }

    /// What both have.
    ///
    /// # Errors
    /// [`Error::Vendors`].
    pub fn intersection(&self, other: &Self) -> Result<Self, Error> {
        let vendor = match (&self.vendor, &other.vendor) {
            (Some(one), Some(other)) if one != other => {
                return Err(Error::Vendors(one.clone(), other.clone()));
            }
            (one, other) => one.clone().or_else(|| other.clone()),
        };
        let mut features = &self.features & &other.features;
        let (mut most, mut state) = (self.most.clone(), self.state.clone());
        for (name, limit) in &other.most {
            most.entry(name.clone()).and_modify(|most| *most = (*most).min(*limit)).or_insert(*limit);
        }
        for (number, place) in &other.state {
            // A component that lies elsewhere is another one.
            if *state.entry(*number).or_insert(*place) != *place {
                for feature in xstate::features_of(*number) {
                    features.remove(&feature);
                }
            }
        }
        Ok(Self::new(vendor, features, most, state))
    }

    /// What this leaves of a host's leaves.
    fn cut(&self, supported: &[CpuidEntry]) -> Vec<CpuidEntry> {
        let mut leaves = leaf::leaves(supported);
        for leaf in &mut leaves {
            self.cut_leaf(leaf);
        }
        let elsewhere = self.state.iter().filter(|(number, place)| {
            xstate::component(&leaves, **number).is_some_and(|found| found != **place)
        });
        let elsewhere = elsewhere.fold(0, |mask, (number, _)| mask | 1u64.checked_shl(*number).unwrap_or(0));
        xstate::hide(&mut leaves, elsewhere | !COPIED_COMPONENTS);
        xstate::settle(&mut leaves);
        let entries = supported.iter().zip(&leaves).filter(|(_, leaf)| is_of_use(leaf, &leaves));
        entries.map(|(entry, leaf)| leaf.into_entry(*entry)).collect()
    }

    fn cut_leaf(&self, leaf: &mut Leaf) {
        let is_its = |word: &Word| (word.function, word.index) == (leaf.function, leaf.index);
        for word in features::words().filter(is_its).collect::<Vec<_>>() {
            let own = self.features.iter().copied().filter(|feature| feature.word() == word);
            let machines = named(MACHINES).filter(|feature| feature.word() == word);
            let shown =
                own.chain(machines).fold(!features::mask(word), |mask, feature| mask | feature.mask());
            leaf.set(word.register, leaf.get(word.register) & shown);
        }
        for number in NUMBERS {
            if let Some(most) = self.most.get(number.name) {
                number.limit(leaf, *most);
            }
        }
    }

    /// This as the text of a file (JSON).
    ///
    /// # Errors
    /// [`Error::Form`].
    pub fn to_json(&self) -> Result<String, Error> {
        serde_json::to_string_pretty(self).map_err(Error::Form)
    }

    /// What the text of a file says.
    ///
    /// # Errors
    /// [`Error::Form`] where it is not JSON, or names what this program does not know: it could not tell what
    /// that needs.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text).map_err(Error::Form)
    }
}

/// A subset as it stands in a file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    /// Who made the processors.
    vendor: Option<String>,
    /// The features, by name.
    features: Vec<String>,
    /// The most that numbers may be, by name.
    most: BTreeMap<String, u32>,
    /// Where components of the state lie, by number.
    state: BTreeMap<u32, Component>,
}

/// What makes no sense in a file.
#[derive(Debug, thiserror::Error)]
enum FormError {
    #[error(transparent)]
    Feature(#[from] UnknownFeature),
    #[error("{0:?} is no number that CPUID shows")]
    Number(String),
    #[error("there is no component {0} of the state")]
    Component(u32),
}

impl From<Subset> for Form {
    fn from(subset: Subset) -> Self {
        let Subset { vendor, features, most, state } = subset;
        Self { vendor, features: features.iter().map(Feature::to_string).collect(), most, state }
    }
}

impl TryFrom<Form> for Subset {
    type Error = FormError;

    fn try_from(form: Form) -> Result<Self, FormError> {
        let Form { vendor, features, most, state } = form;
        let features =
            features.iter().map(|name| name.parse::<Feature>()).collect::<Result<_, UnknownFeature>>()?;
        if let Some(name) = most.keys().find(|name| !NUMBERS.iter().any(|number| number.name == **name)) {
            return Err(FormError::Number(name.clone()));
        }
        if let Some(number) =
            state.keys().find(|number| !xstate::numbers(u64::MAX).any(|known| known == **number))
        {
            return Err(FormError::Component(*number));
        }
        Ok(Self::new(vendor, features, most, state))
    }
}

/// What is left of a host's leaves without features whose state is not copied, or of which this program does
/// not know whether they have any.
fn copied(supported: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let mut leaves = leaf::leaves(supported);
    let nameless = features::all().filter(|feature| feature.name().is_none());
    named(UNCOPIED).chain(nameless).for_each(|feature| feature.hide(&mut leaves));
    xstate::hide(&mut leaves, !COPIED_COMPONENTS);
    xstate::settle(&mut leaves);
    let entries = supported.iter().zip(&leaves).filter(|(_, leaf)| is_of_use(leaf, &leaves));
    entries.map(|(entry, leaf)| leaf.into_entry(*entry)).collect()
}

/// Whether it is known what a leaf says, and the others don't deny it.
fn is_of_use(leaf: &Leaf, leaves: &[Leaf]) -> bool {
    match features::kind(leaf) {
        Kind::Known | Kind::Free => true,
        Kind::State if leaf.index < 2 => xstate::has_xsave(leaves),
        Kind::State => xstate::numbers(xstate::shown(leaves)).any(|number| number == leaf.index),
        Kind::Tiles => named(&[TILES]).all(|tiles| tiles.is_shown(leaves)),
        Kind::Unknown => false,
    }
}

/// The features of these names, all of which there are (see the tests).
fn named(names: &'static [&str]) -> impl Iterator<Item = Feature> {
    names.iter().filter_map(|name| name.parse().ok())
}

fn list(features: &[Feature]) -> String {
    features.iter().map(Feature::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[path = "profile_test.rs"]
mod tests;
