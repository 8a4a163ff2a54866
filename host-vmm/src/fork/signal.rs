//! Telling each side of a fork who it is, through its control page.

use vmfork_abi::{ErrorCode, Response, Role, Status};

use super::request::Order;
use crate::{
    machine::{Machine, VmIdentity},
    memory,
    sync::lock,
};

/// Why the control page could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No seed could be drawn.
    #[error("the system has no random bytes")]
    Seed(#[source] getrandom::Error),
    /// The page is not accessible.
    #[error("can't write the control page")]
    Page(#[from] memory::Error),
}

/// Tells a VM that is about to start who it is. `answers` is the number of the request that it comes from, if it comes from one.
///
/// # Errors
/// [`Error`].
pub fn identify(machine: &Machine, answers: Option<u64>) -> Result<(), Error> {
    let identity = lock(&machine.identity).clone();
    match answers {
        Some(seq) => forked(machine, &identity, Role::Child, seq),
        None => Ok(machine.control_page.identify(&identity.to_page(Role::Booted).map_err(Error::Seed)?)?),
    }
}

/// Tells the parent that the fork was made.
pub(super) fn parent(machine: &Machine, order: &Order) -> Result<(), Error> {
    let mut identity = lock(&machine.identity);
    let parent = VmIdentity { index: 0, count: order.count, ..identity.clone() };
    forked(machine, &parent, Role::Parent, order.seq)?;
    *identity = parent;
    Ok(())
}

/// Tells the parent that there was no fork. Who it is stays as it was.
pub(super) fn refuse(machine: &Machine, seq: u64, code: ErrorCode) -> Result<(), Error> {
    let response = Response { seq, status: Status::Failed.number(), error: code.number(), ..Default::default() };
    Ok(machine.control_page.respond(&response)?)
}

fn forked(machine: &Machine, identity: &VmIdentity, role: Role, seq: u64) -> Result<(), Error> {
    machine.control_page.identify(&identity.to_page(role).map_err(Error::Seed)?)?;
    let response = Response { seq, status: Status::Forked.number(), ..Default::default() };
    Ok(machine.control_page.respond(&response)?)
}
