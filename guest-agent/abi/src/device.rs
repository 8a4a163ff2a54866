//! What the kernel module offers to processes: the device [`PATH`], its ioctls, and what can be read and
//! mapped of it.
//!
//! - [`FORK`], [`STATUS`] and [`IDENTITY`] each take one of the structs here. It begins with its own size and
//!   [`VERSION`], by which the module refuses programs that were built for another one.
//! - A file that was opened for reading alone serves for all but [`FORK`]. So a group that may read the
//!   device is told of forks, and one that may write it makes them.
//! - `read` gives one [`Notice`] for each fork that this VM has come out of since the file was opened, as
//!   parent or as child, or the latest where there were several; `poll` tells that there is one (`POLLIN`). A
//!   shorter buffer is refused (`EINVAL`), and a file that does not wait is told `EAGAIN` where there is
//!   none.
//! - `mmap` gives one page, read-only, at offset 0: [`Generation`](crate::Generation); `ENODEV` where the VMM
//!   has none, `EACCES` for writing.
//! - [`FORK`] is made while the module has stopped all CPUs: in a copy, nothing else runs on any of them
//!   before the kernel's random generator has the copy's seed. Its clock is set, and its uevent sent, right
//!   after that.
//! - While an operator forks the VM, a [`FORK`] waits for that, and is made then in the original VM: for a
//!   second at most, or until its deadline.
//!
//! The module keeps the seed of an [`Identity`](crate::Identity) to itself: wherever one stands here, its
//! seed is zero.
//!
//! What ioctls answer, beside the usual `EFAULT` for memory that is not the caller's and `ENOTTY` for other
//! numbers:
//!
//! | errno | meaning |
//! |---|---|
//! | `EINVAL` | another size, a field out of its range, or room for copies without an address |
//! | `EPROTONOSUPPORT` | another version |
//! | `EINTR` | a signal came while the caller waited for its turn; no fork was asked for |
//! | `ETIMEDOUT` | the deadline passed while the caller waited; no fork was asked for |
//! | `EBADF` | the file was not opened for writing |
//! | `ESTALE` | this VM is a copy by another fork, made before this one, which its parent makes |
//! | `ECONNREFUSED` | the VMM refused or failed, and [`ForkArguments::error`] says why |
//! | `EPROTO` | the VMM's answer makes no sense; its role, if any, tells whether the fork was made |
//! | `ENOLINK` | the VMM did not answer |
//! | `EUCLEAN` | the fork was made, but this child has not its own time |

use crate::{VM_TYPE_BYTES, part::part};

/// Where the device is.
pub const PATH: &str = "/dev/vmfork";

/// Version of the device's interface.
pub const VERSION: u32 = 1;

/// Type of the ioctls' numbers. Linux's list of such types
/// (Documentation/userspace-api/ioctl/ioctl-number.rst) has no other user of it.
pub const IOCTL_TYPE: u8 = 0xd6;

/// Forks the VM: [`ForkArguments`].
pub const FORK: u32 = number(1, ForkArguments::BYTES);

/// Says who this VM is and how it came out of its latest fork: [`StatusArguments`].
pub const STATUS: u32 = number(2, StatusArguments::BYTES);

/// Says who this VM is: [`Notice`].
pub const IDENTITY: u32 = number(3, Notice::BYTES);

/// Number of an ioctl that reads and writes an argument of so many bytes (asm-generic/ioctl.h).
#[allow(clippy::cast_possible_truncation, reason = "checked: at most 14 bits")]
const fn number(number: u8, bytes: usize) -> u32 {
    const READ_WRITE: u32 = 3;
    assert!(bytes < 1 << 14);
    READ_WRITE << 30 | (bytes as u32) << 16 | (IOCTL_TYPE as u32) << 8 | number as u32
}

part! {
    /// What [`FORK`] is asked, and what it answers. Fields from `listed` on are answers.
    ForkArguments (592) {
        /// Size of this struct in bytes.
        0 bytes: u32,
        /// [`VERSION`].
        4 version: u32,
        /// How many children, from 1 to [`MAX_CHILDREN`](crate::MAX_CHILDREN).
        8 count: u32,
        /// [`flags`](crate::flags).
        12 flags: u32,
        /// Until when the caller waits for its turn, in nanoseconds of CLOCK_MONOTONIC outside of all time
        /// namespaces; zero where it waits for ever.
        16 deadline_ns: u64,
        /// The kind of worker, NUL-padded, as [`is_vm_type`](crate::is_vm_type) allows.
        24 vm_type: [u8; VM_TYPE_BYTES],
        /// Address of the array of [`ListedCopy`](crate::ListedCopy)s that a parent is told; may be zero
        /// where `copies_room` is.
        56 copies_address: u64,
        /// How many fit there. Those with the lowest indices are told.
        64 copies_room: u32,
        /// How many copies the VMM has listed; 0 in a child, and where it lists none.
        68 listed: u32,
        /// An [`ErrorCode`](crate::ErrorCode).
        72 error: u32,
        /// Zero.
        76 reserved: u32,
        /// The [`Identity`](crate::Identity) of the VM that this has returned in, without its seed; zero
        /// where no fork was made.
        80 identity: [u8; crate::Identity::BYTES],
    }
}

part! {
    /// What [`STATUS`] is asked, and what it answers. Fields from `listed` on are answers.
    StatusArguments (576) {
        /// Size of this struct in bytes.
        0 bytes: u32,
        /// [`VERSION`].
        4 version: u32,
        /// Address of the array of [`ListedCopy`](crate::ListedCopy)s, as in [`ForkArguments`].
        8 copies_address: u64,
        /// How many fit there.
        16 copies_room: u32,
        /// How many copies the VMM has listed.
        20 listed: u32,
        /// [`ABI_VERSION`](crate::ABI_VERSION) of the VMM.
        24 abi_version: u32,
        /// Whether a caller of this module is forking the VM now: 1 or 0.
        28 forking: u32,
        /// Guest-physical address of the control page.
        32 control_page_gpa: u64,
        /// How many forks the VM has come out of since the module was loaded, as parent or as child, as far
        /// as the module has seen.
        40 forks: u64,
        /// Zero.
        48 reserved: [u8; 16],
        /// The VM's [`Identity`](crate::Identity), without its seed.
        64 identity: [u8; crate::Identity::BYTES],
    }
}

part! {
    /// A fork that this VM has come out of, as `read` gives it, or who the VM is, as [`IDENTITY`] answers.
    Notice (528) {
        /// Size of this struct in bytes.
        0 bytes: u32,
        /// [`VERSION`].
        4 version: u32,
        /// How many forks the VM has come out of, as in [`StatusArguments::forks`]. More than one above the
        /// last one read: some went by unread.
        8 forks: u64,
        /// The VM's [`Identity`](crate::Identity), without its seed.
        16 identity: [u8; crate::Identity::BYTES],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernels_macro() {
        // _IOWR(0xd6, N, struct) by asm-generic/ioctl.h: direction, size, type, number.
        assert_eq!(FORK, 0xc250_d601);
        assert_eq!(STATUS, 0xc240_d602);
        assert_eq!(IDENTITY, 0xc210_d603);
    }

    #[test]
    fn structs_end_with_an_identity() {
        let identity = crate::Identity { index: 7, ..Default::default() };
        let arguments = ForkArguments { identity: identity.to_bytes(), ..Default::default() };
        assert_eq!(arguments.to_bytes()[80..], identity.to_bytes());
    }
}
