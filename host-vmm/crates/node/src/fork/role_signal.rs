//! Role signals: each side of a fork is told who it is, through its control page.

use std::io;

use base::{
    clock::{monotonic_raw_ns, wall_clock_ns},
    sync::lock,
};
use types::VmIdentity;
use vmfork_abi::{ErrorCode, Identity, ListedCopy, Response, Role, Status};
use vmm::{machine::Machine, memory};

/// Why the control page could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No seed could be drawn.
    #[error("the system has no random bytes")]
    Seed(#[source] io::Error),
    /// The page is not accessible.
    #[error("can't write the control page")]
    Page(#[from] memory::Error),
}

/// Role and identity that a VM is to be told, and the answer to its request.
#[derive(Debug)]
#[must_use]
pub struct RoleSignal {
    identity: VmIdentity,
    page: Identity,
    answer: Option<Answer>,
}

/// The answer to a request that has made a fork.
#[derive(Debug)]
struct Answer {
    seq: u64,
    /// The copies, as far as it is known where they are.
    copies: Vec<ListedCopy>,
}

impl RoleSignal {
    /// Tells a VM that it was booted.
    ///
    /// # Errors
    /// [`Error::Seed`].
    pub fn to_booted(machine: &Machine) -> Result<Self, Error> {
        Self::new(lock(&machine.identity).clone(), Role::Booted, None)
    }

    /// Tells the parent that its request `seq` has made `count` copies, and where these went. It is made
    /// ready before that is certain: giving it can't fail for want of anything.
    pub(super) fn to_parent(
        machine: &Machine,
        seq: u64,
        count: u32,
        copies: Vec<ListedCopy>,
    ) -> Result<Self, Error> {
        let identity = VmIdentity { index: 0, count, ..lock(&machine.identity).clone() };
        Self::new(identity, Role::Parent, Some(Answer { seq, copies }))
    }

    /// Tells a child who it is. What its guest has asked for, and was answered, has come with the machine's
    /// state.
    pub(super) fn to_child(machine: &Machine) -> Result<Self, Error> {
        Self::new(lock(&machine.identity).clone(), Role::Child, None)
    }

    fn new(identity: VmIdentity, role: Role, answer: Option<Answer>) -> Result<Self, Error> {
        let page = identity.to_page(role).map_err(Error::Seed)?;
        Ok(Self { identity, page, answer })
    }

    /// Gives it, with the time at which the VM's clocks began to go on: a copy may have waited for others
    /// since.
    ///
    /// # Errors
    /// [`Error::Page`] never, for as long as the page's layout is right.
    pub fn give(self, machine: &Machine) -> Result<(), Error> {
        let began_ns = machine.clock_began_ns.filter(|_| self.page.role == Role::Child.number());
        let waited_ns = began_ns.map_or(0, |began_ns| monotonic_raw_ns().saturating_sub(began_ns));
        let page = Identity { wall_clock_ns: wall_clock_ns().saturating_sub(waited_ns), ..self.page };
        machine.control_page.identify(&page)?;
        if let Some(Answer { seq, copies }) = &self.answer {
            machine.control_page.list(*seq, copies)?;
            let status = Status::Forked.number();
            machine.control_page.respond(&Response { seq: *seq, status, ..Default::default() })?;
        }
        *lock(&machine.identity) = self.identity;
        Ok(())
    }
}

/// Tells the parent that there was no fork. Who it is stays as it was.
pub(super) fn refuse(machine: &Machine, seq: u64, code: ErrorCode) -> Result<(), Error> {
    let response =
        Response { seq, status: Status::Failed.number(), error: code.number(), ..Default::default() };
    Ok(machine.control_page.respond(&response)?)
}
