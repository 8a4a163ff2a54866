//! Telling each side of a fork who it is, through its control page.

use std::io;

use vmfork_abi::{ErrorCode, Identity, ListedCopy, Response, Role, Status};

use super::request::Order;
use crate::{
    clock::wall_clock_ns,
    machine::{Machine, VmIdentity},
    memory,
    sync::lock,
};

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

/// What a VM is to be told.
#[derive(Debug)]
#[must_use]
pub struct Signal {
    identity: VmIdentity,
    page: Identity,
    response: Option<Response>,
    /// The copies that a parent has made, as far as it is known where they are.
    copies: Vec<ListedCopy>,
}

impl Signal {
    /// Tells a VM that it was booted.
    ///
    /// # Errors
    /// [`Error::Seed`].
    pub fn to_booted(machine: &Machine) -> Result<Self, Error> {
        let identity = lock(&machine.identity).clone();
        Self::new(identity, Role::Booted, None)
    }

    /// Tells the parent that the fork was made, and where its copies went. It is made ready before that is certain: giving it can't fail for want of anything.
    pub(super) fn to_parent(machine: &Machine, order: &Order, copies: Vec<ListedCopy>) -> Result<Self, Error> {
        let identity = VmIdentity { index: 0, count: order.count, ..lock(&machine.identity).clone() };
        let signal = Self::new(identity, Role::Parent, Some(order.seq))?;
        Ok(Self { copies, ..signal })
    }

    /// Tells a child who it is. What its guest has asked for, and was answered, has come with the machine's state.
    pub(super) fn to_child(machine: &Machine) -> Result<Self, Error> {
        let identity = lock(&machine.identity).clone();
        Self::new(identity, Role::Child, None)
    }

    fn new(identity: VmIdentity, role: Role, answers: Option<u64>) -> Result<Self, Error> {
        let page = identity.to_page(role).map_err(Error::Seed)?;
        let status = Status::Forked.number();
        let response = answers.map(|seq| Response { seq, status, ..Default::default() });
        Ok(Self { identity, page, response, copies: Vec::new() })
    }

    /// Gives it, with the time as it is now.
    ///
    /// # Errors
    /// [`Error::Page`] never, for as long as the page's layout is right.
    pub fn give(self, machine: &Machine) -> Result<(), Error> {
        let page = Identity { wall_clock_ns: wall_clock_ns(), ..self.page };
        machine.control_page.identify(&page)?;
        if let Some(response) = &self.response {
            machine.control_page.list(response.seq, &self.copies)?;
            machine.control_page.respond(response)?;
        }
        *lock(&machine.identity) = self.identity;
        Ok(())
    }
}

/// Tells the parent that there was no fork. Who it is stays as it was.
pub(super) fn refuse(machine: &Machine, seq: u64, code: ErrorCode) -> Result<(), Error> {
    let response = Response { seq, status: Status::Failed.number(), error: code.number(), ..Default::default() };
    Ok(machine.control_page.respond(&response)?)
}
