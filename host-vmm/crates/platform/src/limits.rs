//! What the operator allows to VMs, by type.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    str::FromStr,
    time::{Duration, Instant},
};

use base::units;
use types::{VmIdentity, VmShape};
use uuid::Uuid;
use vmfork_abi::{ErrorCode, is_vm_type};

use super::{Error, Platform};

/// Stands for all types in `--limit`.
const ALL_TYPES: &str = "*";

/// Something that can be limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limited {
    /// Children of one fork.
    ForkChildren,
    /// Children that one VM has at a time.
    Children,
    /// Forks of one VM within a second.
    Rate,
    /// Forks that lie between a VM and a booted one.
    Generations,
    /// Guest memory of all VMs of the type together, in bytes.
    Memory,
}

impl Limited {
    const ALL: [(&'static str, Self); 5] = [
        ("fork-children", Self::ForkChildren),
        ("children", Self::Children),
        ("rate", Self::Rate),
        ("generations", Self::Generations),
        ("memory", Self::Memory),
    ];

    /// What the guest is told that asks for more.
    pub(super) fn code(self) -> ErrorCode {
        match self {
            Self::ForkChildren | Self::Children => ErrorCode::Children,
            Self::Rate => ErrorCode::Rate,
            Self::Generations => ErrorCode::Generation,
            Self::Memory => ErrorCode::Memory,
        }
    }
}

impl fmt::Display for Limited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(_, limited)| limited == self).map_or("", |(name, _)| name))
    }
}

/// Limits of one type, as `--limit` gives them: `web:children=8,memory=2G`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    vm_type: String,
    most: BTreeMap<Limited, u64>,
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (vm_type, limits) = text.split_once(':').ok_or("must be TYPE:NAME=VALUE,...")?;
        if vm_type != ALL_TYPES && !is_vm_type(vm_type) {
            return Err(format!("{vm_type:?} is no VM type; * stands for all"));
        }
        let mut most = BTreeMap::new();
        for limit in limits.split(',') {
            let (name, value) =
                limit.split_once('=').ok_or_else(|| format!("{limit:?} must be NAME=VALUE"))?;
            let found = Limited::ALL.iter().find(|(known, _)| *known == name);
            let names = || Limited::ALL.map(|(name, _)| name).join(", ");
            let (_, limited) =
                found.ok_or_else(|| format!("{name:?} can't be limited; what can be: {}", names()))?;
            let value = units::size(value).ok_or_else(|| format!("{value:?} is no number"))?;
            most.insert(*limited, value);
        }
        Ok(Self { vm_type: vm_type.to_owned(), most })
    }
}

/// The limits of a platform.
#[derive(Debug, Default)]
pub(super) struct Limits {
    by_type: BTreeMap<String, BTreeMap<Limited, u64>>,
}

/// What a fork would come to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    /// Children of this fork.
    pub(super) count: u64,
    /// Children that the parent would have then.
    pub(super) children: u64,
    /// Generation of the children.
    pub(super) generation: u64,
    /// Guest memory that the VMs of the children's type would have then, in bytes.
    pub(super) memory_bytes: u64,
}

impl Limits {
    /// Those that were given. Of several for one thing, the last one counts.
    pub(super) fn new(limits: Vec<Limit>) -> Self {
        let mut by_type: BTreeMap<String, BTreeMap<_, _>> = BTreeMap::new();
        for Limit { vm_type, most } in limits {
            by_type.entry(vm_type).or_default().extend(most);
        }
        Self { by_type }
    }

    /// Whether there are any.
    pub(super) fn are_none(&self) -> bool {
        self.by_type.is_empty()
    }

    /// The most that a type may have of something: by its own limit, or that of all types.
    pub(super) fn most(&self, vm_type: &str, limited: Limited) -> Option<u64> {
        let of = |vm_type: &str| self.by_type.get(vm_type).and_then(|most| most.get(&limited)).copied();
        of(vm_type).or_else(|| of(ALL_TYPES))
    }

    /// Checks a fork by a VM of the type `parent` into children of the type `child`. Both types' limits
    /// count: a guest chooses the name of its children's type, and must not get around its own limits by it.
    pub(super) fn check(&self, parent: &str, child: &str, asked: Asked) -> Result<(), Error> {
        let of_both = [
            (Limited::ForkChildren, asked.count),
            (Limited::Children, asked.children),
            (Limited::Generations, asked.generation),
        ];
        for vm_type in [parent, child] {
            for (limited, wanted) in of_both {
                self.check_one(vm_type, limited, wanted)?;
            }
        }
        self.check_memory(child, asked.memory_bytes)
    }

    /// Checks how much guest memory the VMs of a type would have then.
    pub(super) fn check_memory(&self, vm_type: &str, memory_bytes: u64) -> Result<(), Error> {
        self.check_one(vm_type, Limited::Memory, memory_bytes)
    }

    fn check_one(&self, vm_type: &str, limited: Limited, wanted: u64) -> Result<(), Error> {
        match self.most(vm_type, limited) {
            Some(most) if wanted > most => {
                Err(Error::Limit { vm_type: vm_type.to_owned(), limited, wanted, most })
            }
            _ => Ok(()),
        }
    }
}

/// When one VM has forked within the last second.
#[derive(Debug, Default)]
pub(super) struct Recent(VecDeque<Instant>);

impl Recent {
    /// Enters a fork, unless there were so many already.
    pub(super) fn enter(&mut self, vm_type: &str, most: Option<u64>, now: Instant) -> Result<(), Error> {
        let Some(most) = most else { return Ok(()) };
        while self.0.front().is_some_and(|then| now.duration_since(*then) >= Duration::from_secs(1)) {
            self.0.pop_front();
        }
        let wanted = self.0.len() as u64 + 1;
        if wanted > most {
            return Err(Error::Limit { vm_type: vm_type.to_owned(), limited: Limited::Rate, wanted, most });
        }
        self.0.push_back(now);
        Ok(())
    }
}

impl Platform {
    /// Checks the limit for the memory of all VMs of a type, of which so many more are to come.
    pub(super) fn check_memory(&self, vm_type: &str, config: VmShape, count: usize) -> Result<(), Error> {
        let (_, memory_bytes) = self.registry.usage(Uuid::nil(), vm_type);
        let more_bytes = config.ram_bytes.saturating_mul(count as u64);
        self.limits.check_memory(vm_type, memory_bytes.saturating_add(more_bytes))
    }

    /// Checks all limits for a fork of a VM into so many children of a type, and counts the fork.
    pub(super) fn check_limits(
        &self,
        vm: &VmIdentity,
        config: VmShape,
        recent: &mut Recent,
        (vm_type, count): (&str, u32),
    ) -> Result<(), Error> {
        let rates = [&vm.vm_type, vm_type].map(|vm_type| self.limits.most(vm_type, Limited::Rate));
        recent.enter(&vm.vm_type, rates.into_iter().flatten().min(), Instant::now())?;
        let (children, memory_bytes) = self.registry.usage(vm.id, vm_type);
        let count = u64::from(count);
        let asked = Asked {
            count,
            children: children.saturating_add(count),
            generation: u64::from(vm.generation) + 1,
            memory_bytes: memory_bytes.saturating_add(config.ram_bytes.saturating_mul(count)),
        };
        self.limits.check(&vm.vm_type, vm_type, asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked = Asked { count: 4, children: 9, generation: 2, memory_bytes: 1 << 30 };

    fn limits(texts: &[&str]) -> Limits {
        Limits::new(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn refused(limits: &Limits, parent: &str, child: &str) -> Option<ErrorCode> {
        match limits.check(parent, child, ASKED) {
            Err(Error::Limit { limited, .. }) => Some(limited.code()),
            other => {
                other.unwrap();
                None
            }
        }
    }

    #[test]
    fn each_limit_has_its_code() {
        for (limit, code) in [
            ("*:fork-children=3", Some(ErrorCode::Children)),
            ("*:fork-children=4,children=9,generations=2,memory=1G", None),
            ("*:children=8", Some(ErrorCode::Children)),
            ("*:generations=1", Some(ErrorCode::Generation)),
            ("*:memory=1023M", Some(ErrorCode::Memory)),
        ] {
            assert_eq!(refused(&limits(&[limit]), "vm", "web"), code, "{limit}");
        }
    }

    #[test]
    fn a_type_has_its_own_limits_and_no_other_name_gets_around_them() {
        let limits = limits(&["*:fork-children=2", "big:fork-children=100"]);
        assert_eq!(refused(&limits, "big", "big"), None);
        assert_eq!(refused(&limits, "big", "web"), Some(ErrorCode::Children));
        assert_eq!(refused(&limits, "web", "big"), Some(ErrorCode::Children));
    }

    #[test]
    fn forks_are_counted_within_a_second() {
        let (mut recent, start) = (Recent::default(), Instant::now());
        let mut fork = |ms| recent.enter("web", Some(2), start + Duration::from_millis(ms)).is_ok();
        assert_eq!(
            [0, 10, 20, 999, 1000, 1005, 1010].map(&mut fork),
            [true, true, false, false, true, false, true]
        );
        assert!((0..9).all(|_| Recent::default().enter("web", None, start).is_ok()));
    }

    #[test]
    fn mistakes_are_told() {
        for bad in [
            "",
            "web",
            "web:",
            "web:x=1",
            "web:rate",
            "web:rate=",
            "web:rate=-1",
            "We b:rate=1",
            "web:rate=1,",
        ] {
            assert!(bad.parse::<Limit>().is_err(), "{bad}");
        }
    }
}
