// SPDX-License-Identifier: GPL-2.0

//! The ioctls: arguments are copied in once, checked, and answered.

use core::mem::replace;

use kernel::{
    prelude::*,
    uaccess::{UserPtr, UserSlice},
};
use vmfork_abi::{
    device::{ForkArguments, Notice, StatusArguments, FORK, IDENTITY, STATUS, VERSION},
    flags, is_vm_type, padded_text, Identity, ListedCopy, Request, MAX_CHILDREN,
};

use crate::{
    bindings,
    control_page::RawReport,
    device::Device,
    fork::{errno, Outcome},
};

impl Device {
    /// Serves an ioctl whose argument is at `address` in the caller's memory. A file that was not
    /// opened for writing may look, but not fork.
    ///
    /// # Errors
    ///
    /// As `vmfork_abi::device` lists them.
    pub(crate) fn control(&self, command: u32, address: usize, may_fork: bool) -> Result {
        match command {
            FORK if !may_fork => Err(EBADF),
            FORK => self.control_fork(address),
            STATUS => self.control_status(address),
            IDENTITY => self.control_identity(address),
            _ => Err(ENOTTY),
        }
    }

    #[inline(never)]
    fn control_fork(&self, address: usize) -> Result {
        let arguments = ForkArguments::from_bytes(&read(address)?);
        check(arguments.bytes, ForkArguments::BYTES, arguments.version)?;
        let request = request(&arguments)?;
        let asked = ForkArguments {
            listed: 0,
            error: 0,
            reserved: 0,
            identity: [0; Identity::BYTES],
            ..arguments
        };
        let mut copies = Copies::new(asked.copies_address, asked.copies_room.min(asked.count))?;
        // What can't be answered fails while there is only one VM.
        write(address, &asked.to_bytes())?;
        copies.write(asked.count)?;

        drop(self.up_to_date());
        let outcome = self.fork(
            request,
            asked.deadline_ns,
            replace(&mut copies.bytes, KVVec::new()),
        );
        let Outcome {
            result,
            code,
            report,
            ..
        } = outcome;
        copies.bytes = outcome.copies;
        if result.is_err() {
            // A copy that came about meanwhile is not itself yet.
            drop(self.up_to_date());
        }

        let RawReport { identity, listed } = report.unwrap_or(RawReport {
            identity: Identity::default(),
            listed: 0,
        });
        let answer = ForkArguments {
            listed,
            error: code.number(),
            identity: public(identity),
            ..asked
        };
        write(address, &answer.to_bytes())?;
        copies.write(listed)?;
        result
    }

    #[inline(never)]
    fn control_status(&self, address: usize) -> Result {
        let arguments = StatusArguments::from_bytes(&read(address)?);
        check(arguments.bytes, StatusArguments::BYTES, arguments.version)?;
        let mut copies = Copies::new(
            arguments.copies_address,
            arguments.copies_room.min(MAX_CHILDREN),
        )?;
        let (forking, forks) = {
            let state = self.up_to_date();
            (state.forking.into(), state.forks)
        };
        let RawReport { identity, listed } = self.page().report(&mut copies.bytes);
        let answer = StatusArguments {
            listed,
            forking,
            forks,
            abi_version: self.page().abi_version(),
            control_page_gpa: self.page().gpa(),
            reserved: [0; 16],
            identity: public(identity),
            ..arguments
        };
        write(address, &answer.to_bytes())?;
        copies.write(listed)
    }

    #[inline(never)]
    fn control_identity(&self, address: usize) -> Result {
        let arguments = Notice::from_bytes(&read(address)?);
        check(arguments.bytes, Notice::BYTES, arguments.version)?;
        let forks = self.up_to_date().forks;
        write(address, &self.notice(forks).to_bytes())
    }

    /// Who this VM is, after so many forks.
    pub(crate) fn notice(&self, forks: u64) -> Notice {
        let identity = public(self.page().identity());
        Notice {
            bytes: Notice::BYTES as u32,
            version: VERSION,
            forks,
            identity,
        }
    }
}

/// Checks what each argument begins with.
fn check(bytes: u32, expected: usize, version: u32) -> Result {
    if bytes as usize != expected {
        return Err(EINVAL);
    }
    if version != VERSION {
        return Err(errno(bindings::EPROTONOSUPPORT));
    }
    Ok(())
}

/// The request that a caller's arguments ask for, checked. Its number is chosen later.
fn request(arguments: &ForkArguments) -> Result<Request> {
    let ForkArguments {
        count,
        flags,
        vm_type,
        ..
    } = *arguments;
    let known_flags = flags & !(flags::LOCAL | flags::REMOTE) == 0;
    let valid_type = padded_text(&vm_type).is_some_and(is_vm_type);
    if !(1..=MAX_CHILDREN).contains(&count) || !known_flags || !valid_type {
        return Err(EINVAL);
    }
    Ok(Request {
        count,
        flags,
        vm_type,
        ..Request::default()
    })
}

/// An identity as processes may see it: with the seed, they could tell what the kernel's generator
/// gives to others.
fn public(identity: Identity) -> [u8; Identity::BYTES] {
    Identity {
        seed: [0; 64],
        ..identity
    }
    .to_bytes()
}

/// Room for listed copies, here and in the caller's memory.
struct Copies {
    address: usize,
    bytes: KVVec<u8>,
}

impl Copies {
    /// # Errors
    ///
    /// `EINVAL` where there is room without an address, `ENOMEM`.
    fn new(address: u64, room: u32) -> Result<Self> {
        if room != 0 && address == 0 {
            return Err(EINVAL);
        }
        let bytes = KVVec::from_elem(0, room as usize * ListedCopy::BYTES, GFP_KERNEL)?;
        Ok(Self {
            address: usize::try_from(address)?,
            bytes,
        })
    }

    /// Writes as many as there are, at most as many as there is room for.
    fn write(&self, listed: u32) -> Result {
        let bytes = self
            .bytes
            .len()
            .min(listed.min(MAX_CHILDREN) as usize * ListedCopy::BYTES);
        write(self.address, &self.bytes[..bytes])
    }
}

/// Copies an argument in.
fn read<const BYTES: usize>(address: usize) -> Result<[u8; BYTES]> {
    let mut argument = [0; BYTES];
    UserSlice::new(pointer(address), BYTES)
        .reader()
        .read_slice(&mut argument)?;
    Ok(argument)
}

/// Copies an answer out.
pub(crate) fn write(address: usize, answer: &[u8]) -> Result {
    UserSlice::new(pointer(address), answer.len())
        .writer()
        .write_slice(answer)
}

#[cfg(kernel_since_6_17)]
fn pointer(address: usize) -> UserPtr {
    UserPtr::from_addr(address)
}

#[cfg(not(kernel_since_6_17))]
fn pointer(address: usize) -> UserPtr {
    address
}
