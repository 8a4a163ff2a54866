// SPDX-License-Identifier: GPL-2.0

//! The kernel's random generator, which a copy shares with its parent until it has a seed of its
//! own.

use core::ptr::{null_mut, NonNull};

use kernel::{
    c_str,
    error::from_err_ptr,
    ffi::{c_long, c_uint, c_ulong},
    prelude::*,
};

use crate::bindings;

// The generator's locks sleep there, and the machine is stopped while they are taken.
#[cfg(CONFIG_PREEMPT_RT)]
compile_error!("vmfork.ko is not for kernels with CONFIG_PREEMPT_RT: build one without it");

/// Where the device is, and its number: major 1, minor 9, as the kernel keeps numbers.
const DEVICE: bindings::dev_t = 1 << 20 | 9;

/// What the ioctl answers while the generator has no first key, and needs no new one.
const NOT_READY: c_long = -(bindings::ENODATA as c_long);

/// The generator: /dev/urandom, opened.
///
/// It is reseeded by what every kernel has: the function for hardware generators mixes the seed in,
/// and an ioctl makes a new key. The ioctl is for administrators alone, as the kernel's own tasks
/// are.
pub(crate) struct Generator {
    file: NonNull<bindings::file>,
    control: unsafe extern "C" fn(*mut bindings::file, c_uint, c_ulong) -> c_long,
}

// SAFETY: An open file can be used from everywhere.
unsafe impl Send for Generator {}
// SAFETY: As above; the ioctl locks what it needs.
unsafe impl Sync for Generator {}

impl Generator {
    /// Opens the device, where whoever loads the module sees it.
    ///
    /// # Errors
    ///
    /// What opening it answers, or `ENODEV` where it is something else.
    pub(crate) fn open() -> Result<Self> {
        Self::open_device().inspect_err(|_| pr_err!("there is no /dev/urandom here\n"))
    }

    fn open_device() -> Result<Self> {
        let (path, flags) = (c_str!("/dev/urandom"), bindings::O_RDONLY as _);
        // SAFETY: The path is a string with a NUL at its end.
        let file = unsafe { bindings::filp_open(path.as_char_ptr(), flags, 0) };
        let file = NonNull::new(from_err_ptr(file)?).ok_or(ENODEV)?;
        // SAFETY: An open file has its operations and its inode for as long as it is open.
        let (operations, inode) = unsafe { (&*file.as_ref().f_op, &*file.as_ref().f_inode) };
        let is_device = c_uint::from(inode.i_mode) & bindings::S_IFMT == bindings::S_IFCHR;
        match operations.unlocked_ioctl {
            Some(control) if is_device && inode.i_rdev == DEVICE => Ok(Self { file, control }),
            _ => {
                // SAFETY: It was opened above, and is not used any more.
                unsafe { bindings::filp_close(file.as_ptr(), null_mut()) };
                Err(ENODEV)
            }
        }
    }

    /// Mixes `seed` in, and makes the generator take a new key from it now: what each CPU has of
    /// the old one, and what it has drawn in advance, is void. Only the kernel's own tasks may.
    ///
    /// It sleeps nowhere, and takes spinlocks alone, so that it can be called while the machine is
    /// stopped: both functions lock the pool and the key for the time of a hash, and hand all that
    /// may wait to a work queue.
    pub(crate) fn reseed(&self, seed: &[u8]) {
        let (start, bytes) = (seed.as_ptr().cast(), seed.len());
        // SAFETY: The kernel reads as many bytes as it is told.
        unsafe { bindings::add_hwgenerator_randomness(start, bytes, 8 * bytes, false) };
        let (file, request) = (self.file.as_ptr(), bindings::VMFORK_RNDRESEEDCRNG);
        // SAFETY: The file is open, and the request has no argument.
        let result = unsafe { (self.control)(file, request, 0) };
        if result != 0 && result != NOT_READY {
            pr_err!("the random generator has no new key: error {result}\n");
        }
    }

    /// Tells the generator's users in the kernel that this is a copy: WireGuard, for one, throws
    /// its keys away. They may sleep.
    ///
    /// The kernel exports the function for it where the driver of ACPI's VM generation ID is a
    /// module. Where the driver is built in, it tells them itself, a little later.
    #[cfg(CONFIG_VMGENID = "m")]
    pub(crate) fn tell_users(&self, seed: &[u8]) {
        // SAFETY: The kernel reads as many bytes as it is told.
        unsafe { bindings::add_vmfork_randomness(seed.as_ptr().cast(), seed.len()) };
    }

    /// Tells nobody: the kernel's function for it is not exported.
    #[cfg(not(CONFIG_VMGENID = "m"))]
    pub(crate) fn tell_users(&self, _seed: &[u8]) {}
}

impl Drop for Generator {
    fn drop(&mut self) {
        // SAFETY: It was opened by `open`, and is not used any more.
        unsafe { bindings::filp_close(self.file.as_ptr(), null_mut()) };
    }
}
