//! What platforms say of themselves, checked at the border: it comes from other hosts, and anybody may have
//! written it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use base::text::Name;
use types::{MAX_RAM_BYTES, MIN_RAM_BYTES, PAGE_BYTES, VmShape};
use vmfork_abi::is_vm_type;

use crate::member::{Load, MAX_IMAGES, MAX_LABELS, MAX_SHAPES, Member};

/// Longest description of a platform, as JSON, in bytes.
pub const MAX_BYTES: usize = 64 << 10;

/// Longest name or value of a label in bytes, and longest name of a CPU profile.
pub const MAX_LABEL_BYTES: usize = 63;

/// What makes labels.
pub const LABEL_RULE: &str =
    "a name has 1 to 63 characters of a-z, A-Z, 0-9 and ./_-, a value up to 63 characters of ASCII";

/// Most vCPUs of a machine.
const MAX_VCPUS: u8 = 64;

/// A whole, in thousandths.
const WHOLE_PERMILLE: u32 = 1000;

/// What is wrong with what a platform says of itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is too long to be looked at.
    #[error("it is {0} bytes long; at most {MAX_BYTES} are read")]
    Length(usize),
    /// It is something else.
    #[error("it is no description of a platform")]
    Json(#[source] serde_json::Error),
    /// It has a name that none can have.
    #[error("{0:?} is no name")]
    Name(Name),
    /// It is another one than was looked for.
    #[error("it says that it is {found}")]
    Stranger {
        /// Who it says it is.
        found: Name,
    },
    /// It can't be reached.
    #[error("nobody can be reached at {0}")]
    Address(SocketAddr),
    /// There is too much of something.
    #[error("it has {found} {what}; at most {most} are taken")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there may be.
        most: usize,
    },
    /// A label, or the CPU profile, can't have this name or value.
    #[error("{0:?} can't be a label or a CPU profile, nor the value of a label")]
    Label(Name),
    /// There are no machines of this shape.
    #[error("there are no machines with {} bytes of memory and {} vCPUs", .0.ram_bytes, .0.vcpus)]
    Shape(VmShape),
    /// A share is more than the whole.
    #[error("it is under a pressure of {0} thousandths")]
    Pressure(u32),
}

/// What a platform says of itself, from JSON.
///
/// # Errors
/// [`Error`]: what is wrong with it.
pub fn parse(json: &[u8]) -> Result<Member, Error> {
    let member = parse_json(json)?;
    check(&member)?;
    Ok(member)
}

/// Something from JSON, if it is no longer than a description of a platform may be.
pub(super) fn parse_json<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, Error> {
    if json.len() > MAX_BYTES {
        return Err(Error::Length(json.len()));
    }
    serde_json::from_slice(json).map_err(Error::Json)
}

/// Checks all that a platform says of itself.
///
/// # Errors
/// [`Error`]: what is wrong with it.
pub fn check(member: &Member) -> Result<(), Error> {
    if is_reachable(member.address) { check_alone(member) } else { Err(Error::Address(member.address)) }
}

/// The same of one that nobody needs to reach.
///
/// # Errors
/// As [`check`].
pub fn check_alone(
    Member { name, cluster, address: _, labels: all, cpu_profile, load }: &Member,
) -> Result<(), Error> {
    if let Some(bad) = [name, cluster].into_iter().find(|name| !is_vm_type(name)) {
        return Err(Error::Name(bad.as_str().into()));
    }
    labels(all)?;
    if !cpu_profile.is_empty() && !is_label_name(cpu_profile) {
        return Err(Error::Label(cpu_profile.as_str().into()));
    }
    check_load(load)
}

fn check_load(load: &Load) -> Result<(), Error> {
    at_most(MAX_SHAPES, "shapes of ready shells", load.ready.len())?;
    at_most(MAX_IMAGES, "images", load.images.len())?;
    let mut shapes = load.ready.iter().map(|ready| ready.config);
    if let Some(bad) = shapes.find(|shape| !is_shape(*shape)) {
        return Err(Error::Shape(bad));
    }
    let pressures = [load.cpu_pressure_permille, load.memory_pressure_permille];
    match pressures.into_iter().find(|pressure| *pressure > WHOLE_PERMILLE) {
        Some(bad) => Err(Error::Pressure(bad)),
        None => Ok(()),
    }
}

/// Checks labels: how many there are, their names and values.
///
/// # Errors
/// [`Error::TooMany`] or [`Error::Label`].
pub fn labels(labels: &BTreeMap<String, String>) -> Result<(), Error> {
    at_most(MAX_LABELS, "labels", labels.len())?;
    let bad_name = labels.keys().find(|name| !is_label_name(name));
    let bad_value = || labels.values().find(|value| !is_label_value(value));
    match bad_name.or_else(bad_value) {
        Some(bad) => Err(Error::Label(bad.as_str().into())),
        None => Ok(()),
    }
}

/// Whether a label can have this name.
pub fn is_label_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"./_-".contains(&byte);
    (1..=MAX_LABEL_BYTES).contains(&name.len()) && name.bytes().all(is_allowed)
}

fn is_label_value(value: &str) -> bool {
    value.len() <= MAX_LABEL_BYTES && value.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ')
}

/// Whether there can be VMs of a shape.
pub fn is_shape(shape: VmShape) -> bool {
    let VmShape { ram_bytes, vcpus } = shape;
    let is_size =
        (MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&ram_bytes) && ram_bytes.is_multiple_of(PAGE_BYTES);
    is_size && (1..=MAX_VCPUS).contains(&vcpus)
}

/// Whether one host, and a service of it, can be meant by an address.
pub fn is_reachable(address: SocketAddr) -> bool {
    let ip = address.ip();
    let is_of_one_host = !ip.is_unspecified() && !ip.is_multicast() && ip != IpAddr::V4(Ipv4Addr::BROADCAST);
    is_of_one_host && address.port() != 0
}

fn at_most(most: usize, what: &'static str, found: usize) -> Result<(), Error> {
    if found > most { Err(Error::TooMany { what, found, most }) } else { Ok(()) }
}

#[cfg(test)]
#[path = "check_test.rs"]
mod tests;
