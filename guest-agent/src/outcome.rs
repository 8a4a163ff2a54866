//! The outcome of a fork: what the VMM left in the control page, checked field by field.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Serialize, Serializer};
use uuid::Uuid;
use vmfork_abi::{Identity, ListedCopy, Location, MAX_CHILDREN, Role, padded_text};

use crate::route::RawReport;

/// The latest fork as this VM saw it: which side of it this VM is, and who it has been since.
///
/// Serialized, `role` is its name in lower case, `vm_type` is called `type`, and an ID is its hyphenated
/// text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Fork {
    /// Which side this VM is; never [`Role::Booted`] right after a fork.
    #[serde(serialize_with = "as_text")]
    pub role: Role,
    /// Which child this VM is, from 1 to `count`; 0 in a parent and in a booted VM.
    pub index: u32,
    /// How many children the fork made; 0 in a booted VM.
    pub count: u32,
    /// How many forks lie between this VM and a booted one.
    pub generation: u32,
    /// ID of this VM, which no other VM has.
    pub vm_id: Uuid,
    /// ID of the VM that this one is a copy of; `None` in one that was booted.
    pub parent_id: Option<Uuid>,
    /// Name of this VM on its platform, such as `web.2`.
    pub name: String,
    /// VM type under which this VM was launched.
    #[serde(rename = "type")]
    pub vm_type: String,
    /// The copies that a parent has made, lowest index first; empty in a child, and where the VMM does not
    /// say where they are.
    pub copies: Vec<ForkCopy>,
}

/// One copy that a fork has made, as its parent is told of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ForkCopy {
    /// Which child it is, from 1 to the fork's count.
    pub index: u32,
    /// ID of the VM.
    pub vm_id: Uuid,
    /// Name of the platform that has launched it; empty where there is one platform alone.
    pub platform: String,
    /// Whether that is the parent's platform.
    #[serde(serialize_with = "as_text")]
    pub placement: Location,
}

/// Which field of the control page can't be right.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OutcomeError {
    /// Not the number of a role.
    #[error("the role {role} is unknown")]
    UnknownRole {
        /// The number.
        role: u32,
    },
    /// A role that no VM has after a fork.
    #[error("the role after a fork is {role}")]
    NotForked {
        /// The role.
        role: Role,
    },
    /// An index and a count that this role can't have.
    #[error("a {role} VM can't have index {index} of {count}")]
    Index {
        /// The role.
        role: Role,
        /// The index.
        index: u32,
        /// The count of children.
        count: u32,
    },
    /// Every VM has an ID.
    #[error("the VM's ID is zero")]
    NoId,
    /// A child is a copy of a VM that has an ID, and at least one fork away from a booted one.
    #[error("a child of generation {generation} names no parent")]
    NoParent {
        /// The generation.
        generation: u32,
    },
    /// Empty, not UTF-8, or with more behind its first NUL.
    #[error("the VM's name is no text")]
    Name,
    /// Not UTF-8, or with more behind its first NUL.
    #[error("the VM's type is no text")]
    VmType,
    /// All copies of a fork are listed, or none.
    #[error("{listed} copies are listed of a fork that made {count}")]
    Listed {
        /// How many are listed.
        listed: u32,
        /// How many the fork made.
        count: u32,
    },
    /// The kernel module finds something wrong that this program does not.
    #[error("the kernel module does not accept what the VMM says")]
    NotAccepted,
    /// A copy with another index, without ID, on no platform with a name that is text, or neither here nor
    /// elsewhere.
    #[error("what is listed of copy {index} is not valid")]
    Copy {
        /// The copy's index.
        index: u32,
    },
}

impl Fork {
    /// The outcome that the VMM describes, after a fork or without one.
    ///
    /// # Errors
    ///
    /// [`OutcomeError`] where a field is impossible.
    pub(crate) fn from_report(
        RawReport { identity, listed, copies }: &RawReport,
    ) -> Result<Self, OutcomeError> {
        let &Identity { index, count, generation, .. } = identity;
        let role =
            Role::from_number(identity.role).ok_or(OutcomeError::UnknownRole { role: identity.role })?;
        let possible = match role {
            Role::Booted => index == 0 && count == 0,
            Role::Parent => index == 0 && (1..=MAX_CHILDREN).contains(&count),
            Role::Child => (1..=count).contains(&index) && count <= MAX_CHILDREN,
        };
        if !possible {
            return Err(OutcomeError::Index { role, index, count });
        }
        let vm_id = some_id(identity.vm_id).ok_or(OutcomeError::NoId)?;
        let parent_id = some_id(identity.parent_id);
        if role == Role::Child && (parent_id.is_none() || generation == 0) {
            return Err(OutcomeError::NoParent { generation });
        }
        let name = padded_text(&identity.name).filter(|name| !name.is_empty()).ok_or(OutcomeError::Name)?;
        let vm_type = padded_text(&identity.vm_type).ok_or(OutcomeError::VmType)?;
        Ok(Self {
            role,
            index,
            count,
            generation,
            vm_id,
            parent_id,
            name: name.to_owned(),
            vm_type: vm_type.to_owned(),
            copies: all_copies(count, *listed, copies)?,
        })
    }

    /// The outcome that the VMM describes right after a fork.
    ///
    /// # Errors
    ///
    /// [`OutcomeError`] where a field is impossible, or the role is not one of a fork's two.
    pub(crate) fn after_fork(report: &RawReport) -> Result<Self, OutcomeError> {
        let fork = Self::from_report(report)?;
        match fork.role {
            Role::Booted => Err(OutcomeError::NotForked { role: fork.role }),
            Role::Parent | Role::Child => Ok(fork),
        }
    }

    /// The environment variables that tell a program which copy it is in; without a parent,
    /// `VMFORK_PARENT_ID` is empty.
    pub fn environment(&self) -> [(&'static str, String); 8] {
        [
            ("VMFORK_ROLE", self.role.to_string()),
            ("VMFORK_INDEX", self.index.to_string()),
            ("VMFORK_COUNT", self.count.to_string()),
            ("VMFORK_GENERATION", self.generation.to_string()),
            ("VMFORK_VM_ID", self.vm_id.to_string()),
            ("VMFORK_PARENT_ID", self.parent_id.map_or_else(String::new, |id| id.to_string())),
            ("VMFORK_NAME", self.name.clone()),
            ("VMFORK_TYPE", self.vm_type.clone()),
        ]
    }

    /// How many copies each other platform has.
    fn away(&self) -> BTreeMap<&str, usize> {
        let remote = self.copies.iter().filter(|copy| copy.placement == Location::Remote);
        remote.fold(BTreeMap::new(), |mut counts, copy| {
            *counts.entry(copy.platform.as_str()).or_default() += 1;
            counts
        })
    }
}

/// One line for people, such as `child 2 of 4: web.2 (web), generation 1, ID …, parent …`, or
/// `parent of 4, 3 on north: …` where copies are on other platforms.
impl fmt::Display for Fork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Role::Booted => write!(f, "booted")?,
            Role::Parent => {
                write!(f, "parent of {}", self.count)?;
                self.away().iter().try_for_each(|(platform, count)| write!(f, ", {count} on {platform}"))?;
            }
            Role::Child => write!(f, "child {} of {}", self.index, self.count)?,
        }
        write!(f, ": {} ({}), generation {}, ID {}", self.name, self.vm_type, self.generation, self.vm_id)?;
        match self.parent_id {
            Some(parent_id) => write!(f, ", parent {parent_id}"),
            None => Ok(()),
        }
    }
}

/// The ID in these bytes, or `None` where they are zero.
fn some_id(bytes: [u8; 16]) -> Option<Uuid> {
    Some(Uuid::from_bytes(bytes)).filter(|id| !id.is_nil())
}

/// The copies of a fork that made `count`: all of them, or none where none are listed.
fn all_copies(count: u32, listed: u32, copies: &[ListedCopy]) -> Result<Vec<ForkCopy>, OutcomeError> {
    if listed == 0 {
        return Ok(Vec::new());
    }
    // A caller has room for as many as it has asked for. A fork that says it made more is not to pass as one
    // of so many.
    let read = u32::try_from(copies.len()).unwrap_or(u32::MAX);
    if let Some(listed) = [listed, read].into_iter().find(|&number| number != count) {
        return Err(OutcomeError::Listed { listed, count });
    }
    (1..).zip(copies).map(|(index, copy)| one_copy(index, copy).ok_or(OutcomeError::Copy { index })).collect()
}

fn one_copy(index: u32, copy: &ListedCopy) -> Option<ForkCopy> {
    let placement = Location::from_number(copy.location).filter(|_| copy.index == index)?;
    let platform = padded_text(&copy.platform)?.to_owned();
    Some(ForkCopy { index, vm_id: some_id(copy.vm_id)?, platform, placement })
}

fn as_text<S: Serializer>(name: &impl fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(name)
}

#[cfg(test)]
pub(crate) mod tests {
    use vmfork_abi::pad_text;

    use super::*;

    /// Child 2 of 4 as the VMM would describe it.
    pub(crate) fn child() -> Identity {
        Identity {
            role: Role::Child.number(),
            index: 2,
            count: 4,
            generation: 1,
            vm_id: [0x11; 16],
            parent_id: [0x22; 16],
            name: pad_text("web.2").unwrap(),
            vm_type: pad_text("web").unwrap(),
            ..Identity::default()
        }
    }

    fn booted() -> Identity {
        Identity { role: 0, index: 0, count: 0, generation: 0, parent_id: [0; 16], ..child() }
    }

    pub(crate) fn parent() -> Identity {
        Identity { role: Role::Parent.number(), index: 0, count: 3, ..booted() }
    }

    /// The copies of that parent: one at home, and two on another platform.
    pub(crate) fn copies() -> Vec<ListedCopy> {
        let copy = |index, location: Location, platform| {
            let (location, platform) = (location.number(), pad_text(platform).unwrap());
            ListedCopy { vm_id: [0x33; 16], index, location, platform, ..ListedCopy::default() }
        };
        vec![copy(1, Location::Local, "a"), copy(2, Location::Remote, "b"), copy(3, Location::Remote, "b")]
    }

    /// An account without copies.
    pub(crate) fn of(identity: Identity) -> RawReport {
        RawReport { identity, ..RawReport::default() }
    }

    /// An account of that parent, with these copies.
    pub(crate) fn with_copies(copies: Vec<ListedCopy>) -> RawReport {
        RawReport { identity: parent(), listed: 3, copies }
    }

    #[test]
    fn json_of_a_child_is_one_flat_object() {
        let json = serde_json::to_string(&Fork::after_fork(&of(child())).unwrap()).unwrap();
        let expected = concat!(
            r#"{"role":"child","index":2,"count":4,"generation":1,"#,
            r#""vm_id":"11111111-1111-1111-1111-111111111111","#,
            r#""parent_id":"22222222-2222-2222-2222-222222222222","name":"web.2","type":"web","copies":[]}"#
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn json_of_a_parent_lists_its_copies() {
        let fork = Fork::after_fork(&with_copies(copies())).unwrap();
        let expected = concat!(
            r#"{"index":2,"vm_id":"33333333-3333-3333-3333-333333333333","#,
            r#""platform":"b","placement":"remote"}"#
        );
        assert_eq!(serde_json::to_string(&fork.copies[1]).unwrap(), expected);
        let fork = serde_json::to_value(fork).unwrap();
        assert_eq!(
            (&fork["copies"][0]["placement"], &fork["copies"][0]["platform"]),
            (&"local".into(), &"a".into())
        );
        assert_eq!(fork["copies"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn a_vmm_that_lists_no_copies_leaves_a_parent_all_the_same() {
        assert_eq!(Fork::after_fork(&of(parent())).unwrap().copies, []);
    }

    #[test]
    fn impossible_copies_are_errors() {
        let error = |report: RawReport| Fork::after_fork(&report).unwrap_err();
        for listed in [1, 4, MAX_CHILDREN + 1, u32::MAX] {
            assert_eq!(
                error(RawReport { listed, ..with_copies(copies()) }),
                OutcomeError::Listed { listed, count: 3 }
            );
        }
        let two = copies()[..2].to_vec();
        assert_eq!(error(with_copies(two)), OutcomeError::Listed { listed: 2, count: 3 });
        let second = copies()[1];
        for bad in [
            ListedCopy { index: 1, ..second },
            ListedCopy { vm_id: [0; 16], ..second },
            ListedCopy { location: 0, ..second },
            ListedCopy { location: 3, ..second },
            ListedCopy { platform: [0xff; 32], ..second },
        ] {
            let mut copies = copies();
            copies[1] = bad;
            assert_eq!(error(with_copies(copies)), OutcomeError::Copy { index: 2 }, "{bad:?}");
        }
    }

    #[test]
    fn the_environment_of_a_child_says_all_of_it() {
        let text = Fork::after_fork(&of(child()))
            .unwrap()
            .environment()
            .map(|(key, value)| format!("{key}={value}"))
            .join(" ");
        let expected = "VMFORK_ROLE=child VMFORK_INDEX=2 VMFORK_COUNT=4 VMFORK_GENERATION=1 \
                        VMFORK_VM_ID=11111111-1111-1111-1111-111111111111 \
                        VMFORK_PARENT_ID=22222222-2222-2222-2222-222222222222 \
                        VMFORK_NAME=web.2 VMFORK_TYPE=web";
        assert_eq!(text, expected);
    }

    #[test]
    fn lines_for_people_name_the_role_first() {
        let line = |identity| Fork::from_report(&of(identity)).unwrap().to_string();
        let id = "11111111-1111-1111-1111-111111111111";
        assert_eq!(line(booted()), format!("booted: web.2 (web), generation 0, ID {id}"));
        assert_eq!(line(parent()), format!("parent of 3: web.2 (web), generation 0, ID {id}"));
        let parent = Fork::from_report(&with_copies(copies())).unwrap().to_string();
        assert_eq!(parent, format!("parent of 3, 2 on b: web.2 (web), generation 0, ID {id}"));
        assert!(line(child()).starts_with("child 2 of 4: web.2 (web), generation 1"));
    }

    #[test]
    fn a_booted_vm_has_an_identity_but_no_fork() {
        assert_eq!(Fork::from_report(&of(booted())).unwrap().parent_id, None);
        assert_eq!(Fork::after_fork(&of(booted())), Err(OutcomeError::NotForked { role: Role::Booted }));
    }

    #[test]
    fn impossible_fields_are_errors() {
        let error = |identity| Fork::from_report(&of(identity)).unwrap_err();
        assert_eq!(error(Identity { role: 3, ..child() }), OutcomeError::UnknownRole { role: 3 });
        for (role, index, count) in [
            (Role::Child, 0, 4),
            (Role::Child, 5, 4),
            (Role::Child, 1, MAX_CHILDREN + 1),
            (Role::Parent, 1, 4),
            (Role::Parent, 0, 0),
            (Role::Booted, 0, 1),
        ] {
            let identity = Identity { role: role.number(), index, count, ..child() };
            assert_eq!(error(identity), OutcomeError::Index { role, index, count });
        }
        assert_eq!(error(Identity { vm_id: [0; 16], ..child() }), OutcomeError::NoId);
        assert_eq!(
            error(Identity { parent_id: [0; 16], ..child() }),
            OutcomeError::NoParent { generation: 1 }
        );
        assert_eq!(error(Identity { generation: 0, ..child() }), OutcomeError::NoParent { generation: 0 });
        assert_eq!(error(Identity { name: [0; 64], ..child() }), OutcomeError::Name);
        assert_eq!(error(Identity { name: [0xff; 64], ..child() }), OutcomeError::Name);
        assert_eq!(error(Identity { vm_type: [0xff; 32], ..child() }), OutcomeError::VmType);
    }

    #[test]
    fn any_page_is_an_outcome_or_an_error() {
        for byte in 0..=u8::MAX {
            assert!(Fork::from_report(&of(Identity::from_bytes(&[byte; Identity::BYTES]))).is_err());
        }
    }
}
