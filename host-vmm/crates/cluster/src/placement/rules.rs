//! What the operator wants of placement, by VM type.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use vmfork_abi::is_vm_type;

use crate::member::MAX_LABELS;

/// Stands for all types that have no rule of their own.
const ALL_TYPES: &str = "*";

/// Why rules are not valid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such policy.
    #[error("{found:?} is no placement policy; there are {}", Policy::ALL.map(|(name, _)| name).join(", "))]
    Policy {
        /// What was given.
        found: String,
    },
    /// A rule is for no type.
    #[error("placement of {found:?}: that is no VM type; * stands for all")]
    Type {
        /// What was given.
        found: String,
    },
    /// Something has a name that it can't have.
    #[error(
        "placement of {vm_type:?}: {found:?} is no {what}: 1 to 32 characters of a-z, 0-9 and -, not - at an end"
    )]
    Name {
        /// Type of the rule.
        vm_type: String,
        /// What was to be named.
        what: &'static str,
        /// What was given.
        found: String,
    },
    /// Copies are to go to pinned platforms, and there are none.
    #[error("placement of {vm_type:?}: the policy pinned needs platforms: pinned = [\"NAME\", ...]")]
    NothingPinned {
        /// Type of the rule.
        vm_type: String,
    },
    /// Platforms are pinned that would be ignored.
    #[error(
        "placement of {vm_type:?}: the policy {policy} ignores what is pinned: leave that out, or say policy = \"pinned\""
    )]
    IdlyPinned {
        /// Type of the rule.
        vm_type: String,
        /// Its policy.
        policy: Policy,
    },
    /// A platform is pinned twice.
    #[error("placement of {vm_type:?}: {platform:?} is pinned twice")]
    PinnedTwice {
        /// Type of the rule.
        vm_type: String,
        /// The platform.
        platform: String,
    },
    /// No platform can have so many labels.
    #[error("placement of {vm_type:?}: {found} labels, and platforms have {MAX_LABELS} at most")]
    Labels {
        /// Type of the rule.
        vm_type: String,
        /// How many there are.
        found: usize,
    },
}

/// By what copies are placed, of all platforms that may take them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// On the platform of the VM that is copied, and nowhere else.
    Local,
    /// Where there is the most to be had, and the least to be waited for: the best [`Score`](super::Score).
    #[default]
    LeastLoaded,
    /// The same number on each platform, give or take one. Those that are left over go where the smallest
    /// part of the nodes is taken, then to the better score.
    Spread,
    /// On as few platforms as possible: first on those that have VMs, and there on those with the most.
    Pack,
    /// On the platforms that the rule names, in that order: the next one is used when one has no room.
    Pinned,
}

impl Policy {
    /// All of them, by name.
    pub const ALL: [(&'static str, Self); 5] = [
        ("local", Self::Local),
        ("least-loaded", Self::LeastLoaded),
        ("spread", Self::Spread),
        ("pack", Self::Pack),
        ("pinned", Self::Pinned),
    ];
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(Self::ALL.iter().find(|(_, policy)| policy == self).map_or("", |(name, _)| name))
    }
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let found = Self::ALL.iter().find(|(name, _)| *name == text);
        found.map(|(_, policy)| *policy).ok_or_else(|| Error::Policy { found: text.to_owned() })
    }
}

/// What holds where there is no rule: least-loaded, anywhere.
static DEFAULT: Rule = Rule {
    policy: Policy::LeastLoaded,
    labels: BTreeMap::new(),
    cluster: None,
    cpu_profile: None,
    pinned: Vec::new(),
};

/// How the copies of one type are placed. What is left out is not asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// The policy.
    pub policy: Policy,
    /// Labels that a platform must have, with these values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Cluster that a platform must be of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster: Option<String>,
    /// CPU profile that a platform must show its guests; empty: it must show them what its host has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_profile: Option<String>,
    /// Names of the platforms that [`Policy::Pinned`] uses, in that order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pinned: Vec<String>,
}

impl Rule {
    fn check(&self, vm_type: &str) -> Result<(), Error> {
        let vm_type = || vm_type.to_owned();
        let is_pinned = self.policy == Policy::Pinned;
        if is_pinned && self.pinned.is_empty() {
            return Err(Error::NothingPinned { vm_type: vm_type() });
        }
        if !is_pinned && !self.pinned.is_empty() {
            return Err(Error::IdlyPinned { vm_type: vm_type(), policy: self.policy });
        }
        if self.labels.len() > MAX_LABELS {
            return Err(Error::Labels { vm_type: vm_type(), found: self.labels.len() });
        }
        let clusters = self.cluster.iter().map(|name| ("cluster", name));
        let names = clusters.chain(self.pinned.iter().map(|name| ("platform", name)));
        if let Some((what, found)) = names.into_iter().find(|(_, name)| !is_vm_type(name)) {
            return Err(Error::Name { vm_type: vm_type(), what, found: found.clone() });
        }
        let mut sorted: Vec<&String> = self.pinned.iter().collect();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::PinnedTwice { vm_type: vm_type(), platform: pair[0].clone() }),
            None => Ok(()),
        }
    }
}

/// The rules of a platform, by VM type; `*` stands for all types that have none of their own.
///
/// ```toml
/// [placement."*"]
/// policy = "least-loaded"
///
/// [placement."web"]
/// policy = "spread"
/// labels = { zone = "north" }
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, Rule>", into = "BTreeMap<String, Rule>")]
pub struct Rules(BTreeMap<String, Rule>);

impl Rules {
    /// These rules.
    ///
    /// # Errors
    /// [`Error`]: what is wrong with the first one that is not valid.
    pub fn new(by_type: BTreeMap<String, Rule>) -> Result<Self, Error> {
        for (vm_type, rule) in &by_type {
            if vm_type != ALL_TYPES && !is_vm_type(vm_type) {
                return Err(Error::Type { found: vm_type.clone() });
            }
            rule.check(vm_type)?;
        }
        Ok(Self(by_type))
    }

    /// The rule of a type: its own one, that of `*`, or the default.
    pub fn of(&self, vm_type: &str) -> &Rule {
        self.0.get(vm_type).or_else(|| self.0.get(ALL_TYPES)).unwrap_or(&DEFAULT)
    }
}

impl TryFrom<BTreeMap<String, Rule>> for Rules {
    type Error = Error;

    fn try_from(by_type: BTreeMap<String, Rule>) -> Result<Self, Error> {
        Self::new(by_type)
    }
}

impl From<Rules> for BTreeMap<String, Rule> {
    fn from(Rules(by_type): Rules) -> Self {
        by_type
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration file that has nothing else.
    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Configuration {
        placement: Rules,
    }

    fn rules(text: &str) -> Result<Rules, String> {
        toml::from_str(text).map(|Configuration { placement }| placement).map_err(|error| error.to_string())
    }

    #[test]
    fn each_policy_has_one_name() {
        for (name, policy) in Policy::ALL {
            assert_eq!(name.parse(), Ok(policy));
            assert_eq!(policy.to_string(), name);
            assert_eq!(serde_json::to_value(policy).unwrap(), name);
        }
        let error = "round-robin".parse::<Policy>().unwrap_err().to_string();
        assert!(error.contains("least-loaded, spread, pack"), "{error}");
    }

    #[test]
    fn a_type_has_its_own_rule_or_that_of_all_or_the_default() {
        let rules = rules(
            r#"
            [placement."*"]
            policy = "pack"
            [placement."web"]
            policy = "spread"
            labels = { zone = "north" }
            cluster = "main"
            cpu_profile = "v3"
            [placement.db]
            policy = "pinned"
            pinned = ["b", "a"]
            "#,
        );
        let rules = rules.unwrap();
        let web = rules.of("web");
        assert_eq!((web.policy, web.labels["zone"].as_str()), (Policy::Spread, "north"));
        assert_eq!((web.cluster.as_deref(), web.cpu_profile.as_deref()), (Some("main"), Some("v3")));
        assert_eq!(rules.of("db").pinned, ["b", "a"]);
        assert_eq!(rules.of("mail"), &Rule { policy: Policy::Pack, ..Rule::default() });
        assert_eq!(Rules::default().of("mail"), &Rule::default());
        assert_eq!(DEFAULT, Rule::default());
    }

    #[test]
    fn rules_are_written_as_they_are_read() {
        let rules = rules("[placement.web]\npolicy = \"pinned\"\npinned = [\"a\"]").unwrap();
        let text = serde_json::to_string(&rules).unwrap();
        assert_eq!(text, r#"{"web":{"policy":"pinned","pinned":["a"]}}"#);
        assert_eq!(serde_json::from_str::<Rules>(&text).unwrap(), rules);
    }

    #[test]
    fn mistakes_are_told() {
        for (text, told) in [
            ("[placement.web]\npolicy = \"even\"", "least-loaded"),
            ("[placement.web]\npolices = \"spread\"", "polices"),
            ("[placement.\"We b\"]", "no VM type"),
            ("[placement.web]\ncluster = \"\"", "no cluster"),
            ("[placement.web]\npolicy = \"pinned\"", "needs platforms"),
            ("[placement.web]\npinned = [\"a\"]", "ignores"),
            ("[placement.web]\npolicy = \"pinned\"\npinned = [\"a\", \"A\"]", "\"A\" is no platform"),
            ("[placement.web]\npolicy = \"pinned\"\npinned = [\"a\", \"b\", \"a\"]", "pinned twice"),
            ("[placement.web]\nlabels = { zone = 1 }", "string"),
        ] {
            let error = rules(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
        let labels = (0..=MAX_LABELS).map(|label| (label.to_string(), String::new())).collect();
        let rule = Rule { labels, ..Rule::default() };
        let error = Rules::new(BTreeMap::from([("web".to_owned(), rule)])).unwrap_err();
        assert_eq!(error, Error::Labels { vm_type: "web".to_owned(), found: MAX_LABELS + 1 });
    }
}
