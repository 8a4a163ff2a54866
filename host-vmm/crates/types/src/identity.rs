//! Who a VM is, and how it is told.

use std::io;

use base::random;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use vmfork_abi::{Identity, Role, pad_text};

/// Who a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIdentity {
    /// ID, unique among all VMs.
    pub id: Uuid,
    /// The VM that this one is a copy of; nil in a booted VM.
    pub parent: Uuid,
    /// Name on its platform.
    pub name: String,
    /// Type under which it was launched.
    pub vm_type: String,
    /// Which child of its latest fork it is, from 1; 0 in a booted VM and in a parent.
    pub index: u32,
    /// How many children its latest fork made; 0 in a booted VM.
    pub count: u32,
    /// How many forks lie between it and a booted VM.
    pub generation: u32,
}

impl VmIdentity {
    /// What the control page says of this VM in `role`, but for the time; the seed is drawn here.
    ///
    /// # Errors
    /// Where the system has no random bytes to give.
    pub fn to_page(&self, role: Role) -> io::Result<Identity> {
        let mut seed = [0; 64];
        random::fill(&mut seed)?;
        Ok(Identity {
            role: role.number(),
            index: self.index,
            count: self.count,
            generation: self.generation,
            vm_id: self.id.into_bytes(),
            parent_id: self.parent.into_bytes(),
            seed,
            wall_clock_ns: 0,
            // Names and types are checked where they are made.
            name: pad_text(&self.name).unwrap_or([0; vmfork_abi::NAME_BYTES]),
            vm_type: pad_text(&self.vm_type).unwrap_or([0; vmfork_abi::VM_TYPE_BYTES]),
            reserved: [0; 296],
        })
    }
}

/// A new ID. The uuid crate's own way opens a file for it in a static program: 25 us (measured).
///
/// # Errors
/// Where the system has no random bytes to give.
pub fn new_id() -> io::Result<Uuid> {
    let mut bytes = [0; 16];
    random::fill(&mut bytes)?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}
