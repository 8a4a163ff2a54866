// SPDX-License-Identifier: GPL-2.0

//! The kernel's random generator, which a copy shares with its parent until it has a seed of its
//! own.

#[cfg(CONFIG_VMGENID = "m")]
pub(crate) use exported::Generator;
#[cfg(not(CONFIG_VMGENID = "m"))]
pub(crate) use ioctl::Generator;

/// By the kernel's own function for forked VMs, which tells its other users too: WireGuard, for
/// one, throws its keys away. The kernel exports it if the driver of ACPI's VM generation ID is a
/// module.
#[cfg(CONFIG_VMGENID = "m")]
mod exported {
    use kernel::prelude::*;

    use crate::bindings;

    /// The generator.
    pub(crate) struct Generator;

    impl Generator {
        /// Nothing is needed.
        pub(crate) fn open() -> Result<Self> {
            Ok(Self)
        }

        /// Mixes `seed` in, and makes the generator take a new key from it now.
        pub(crate) fn reseed(&self, seed: &[u8]) {
            // SAFETY: The kernel reads as many bytes as it is told.
            unsafe { bindings::add_vmfork_randomness(seed.as_ptr().cast(), seed.len()) };
        }
    }
}

/// By what every kernel has: the function for hardware generators mixes the seed in, and an ioctl
/// of /dev/urandom makes a new key. That ioctl is for administrators alone, so it is made with the
/// kernel's own credentials.
#[cfg(not(CONFIG_VMGENID = "m"))]
mod ioctl {
    use core::ptr::{addr_of, NonNull};

    use kernel::{c_str, error::from_err_ptr, prelude::*};

    use crate::bindings;

    /// The generator: /dev/urandom, opened.
    pub(crate) struct Generator {
        file: NonNull<bindings::file>,
        control: unsafe extern "C" fn(
            *mut bindings::file,
            kernel::ffi::c_uint,
            kernel::ffi::c_ulong,
        ) -> kernel::ffi::c_long,
    }

    // SAFETY: An open file can be used from everywhere.
    unsafe impl Send for Generator {}
    // SAFETY: As above; the ioctl locks what it needs.
    unsafe impl Sync for Generator {}

    impl Generator {
        /// Opens the device, as long as whoever loads the module sees it.
        pub(crate) fn open() -> Result<Self> {
            let path = c_str!("/dev/urandom");
            // SAFETY: The path is a string with a NUL at its end.
            let file =
                unsafe { bindings::filp_open(path.as_char_ptr(), bindings::O_RDONLY as _, 0) };
            let file = from_err_ptr(file)
                .and_then(|file| NonNull::new(file).ok_or(ENODEV))
                .map_err(|error| {
                    pr_err!("{} can't be opened\n", path);
                    error
                })?;
            // SAFETY: An open file has its operations for as long as it is open.
            let control = unsafe { (*(*file.as_ptr()).f_op).unlocked_ioctl };
            match control {
                Some(control) => Ok(Self { file, control }),
                None => {
                    // SAFETY: It was opened above, and is not used any more.
                    unsafe { bindings::filp_close(file.as_ptr(), core::ptr::null_mut()) };
                    Err(ENODEV)
                }
            }
        }

        /// Mixes `seed` in, and makes the generator take a new key from it now.
        pub(crate) fn reseed(&self, seed: &[u8]) {
            // SAFETY: The kernel reads as many bytes as it is told.
            unsafe {
                bindings::add_hwgenerator_randomness(
                    seed.as_ptr().cast(),
                    seed.len(),
                    8 * seed.len(),
                    false,
                )
            };
            // SAFETY: There is always a current task.
            let task = unsafe { kernel::bindings::get_current() }.cast::<bindings::task_struct>();
            // SAFETY: A task alone changes its own credentials, and those of the first task are
            // there for ever. They are put back below, before anything else can happen to them: the
            // ioctl does not change them.
            let own = unsafe {
                core::mem::replace(&mut (*task).cred, (*addr_of!(bindings::init_task)).cred)
            };
            // SAFETY: The file is open, and the request has no argument. It fails while the
            // generator has no first key, and then it needs no new one.
            unsafe { (self.control)(self.file.as_ptr(), bindings::VMFORK_RNDRESEEDCRNG, 0) };
            // SAFETY: As above.
            unsafe { (*task).cred = own };
        }
    }

    impl Drop for Generator {
        fn drop(&mut self) {
            // SAFETY: It was opened by `open`, and is not used any more.
            unsafe { bindings::filp_close(self.file.as_ptr(), core::ptr::null_mut()) };
        }
    }
}
