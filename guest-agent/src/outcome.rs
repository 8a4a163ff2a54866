//! The outcome of a fork, read from the identity that the VMM left and checked field by field.

use std::fmt;

use serde::{Serialize, Serializer};
use uuid::Uuid;
use vmfork_abi::{Identity, MAX_CHILDREN, Role, padded_text};

/// The latest fork as this VM saw it: which side of it this VM is, and who it has been since.
///
/// Serialized, `role` is its name in lower case, `vm_type` is called `type`, and an ID is its hyphenated text.
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
}

/// Which field of the identity in the control page can't be right.
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
}

impl Fork {
    /// The outcome that an identity describes, after a fork or without one.
    ///
    /// # Errors
    ///
    /// [`OutcomeError`] where a field is impossible.
    pub(crate) fn from_page(identity: &Identity) -> Result<Self, OutcomeError> {
        let &Identity { index, count, generation, .. } = identity;
        let role = Role::from_number(identity.role).ok_or(OutcomeError::UnknownRole { role: identity.role })?;
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
        })
    }

    /// The outcome that an identity describes right after a fork.
    ///
    /// # Errors
    ///
    /// [`OutcomeError`] where a field is impossible, or the role is not one of a fork's two.
    pub(crate) fn after_fork(identity: &Identity) -> Result<Self, OutcomeError> {
        let fork = Self::from_page(identity)?;
        match fork.role {
            Role::Booted => Err(OutcomeError::NotForked { role: fork.role }),
            Role::Parent | Role::Child => Ok(fork),
        }
    }

    /// The environment variables that tell a program which copy it is in; without a parent, `VMFORK_PARENT_ID` is empty.
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
}

/// One line for people, such as `child 2 of 4: web.2 (web), generation 1, ID …, parent …`.
impl fmt::Display for Fork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Role::Booted => write!(f, "booted")?,
            Role::Parent => write!(f, "parent of {}", self.count)?,
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

fn as_text<S: Serializer>(role: &Role, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(role)
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

    #[test]
    fn json_of_a_child_is_one_flat_object() {
        let json = serde_json::to_string(&Fork::after_fork(&child()).unwrap()).unwrap();
        let expected = concat!(
            r#"{"role":"child","index":2,"count":4,"generation":1,"#,
            r#""vm_id":"11111111-1111-1111-1111-111111111111","#,
            r#""parent_id":"22222222-2222-2222-2222-222222222222","name":"web.2","type":"web"}"#
        );
        assert_eq!(json, expected);
    }

    #[test]
    fn the_environment_of_a_child_says_all_of_it() {
        let text =
            Fork::after_fork(&child()).unwrap().environment().map(|(key, value)| format!("{key}={value}")).join(" ");
        let expected = "VMFORK_ROLE=child VMFORK_INDEX=2 VMFORK_COUNT=4 VMFORK_GENERATION=1 \
                        VMFORK_VM_ID=11111111-1111-1111-1111-111111111111 \
                        VMFORK_PARENT_ID=22222222-2222-2222-2222-222222222222 VMFORK_NAME=web.2 VMFORK_TYPE=web";
        assert_eq!(text, expected);
    }

    #[test]
    fn lines_for_people_name_the_role_first() {
        let line = |identity| Fork::from_page(&identity).unwrap().to_string();
        let id = "11111111-1111-1111-1111-111111111111";
        let parent = Identity { role: 1, index: 0, count: 4, ..booted() };
        assert_eq!(line(booted()), format!("booted: web.2 (web), generation 0, ID {id}"));
        assert_eq!(line(parent), format!("parent of 4: web.2 (web), generation 0, ID {id}"));
        assert!(line(child()).starts_with("child 2 of 4: web.2 (web), generation 1"));
    }

    #[test]
    fn a_booted_vm_has_an_identity_but_no_fork() {
        assert_eq!(Fork::from_page(&booted()).unwrap().parent_id, None);
        assert_eq!(Fork::after_fork(&booted()), Err(OutcomeError::NotForked { role: Role::Booted }));
    }

    #[test]
    fn impossible_fields_are_errors() {
        let error = |identity| Fork::from_page(&identity).unwrap_err();
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
        assert_eq!(error(Identity { parent_id: [0; 16], ..child() }), OutcomeError::NoParent { generation: 1 });
        assert_eq!(error(Identity { generation: 0, ..child() }), OutcomeError::NoParent { generation: 0 });
        assert_eq!(error(Identity { name: [0; 64], ..child() }), OutcomeError::Name);
        assert_eq!(error(Identity { name: [0xff; 64], ..child() }), OutcomeError::Name);
        assert_eq!(error(Identity { vm_type: [0xff; 32], ..child() }), OutcomeError::VmType);
    }

    #[test]
    fn any_page_is_an_outcome_or_an_error() {
        for byte in 0..=u8::MAX {
            assert!(Fork::from_page(&Identity::from_bytes(&[byte; Identity::BYTES])).is_err());
        }
    }
}
