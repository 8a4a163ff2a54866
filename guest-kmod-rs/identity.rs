// SPDX-License-Identifier: GPL-2.0

//! What must differ between a VM and its copy, set from the identity that the VMM left.

use core::fmt::{self, Write};

use kernel::prelude::*;
use vmfork_abi::{padded_text, Identity, Role};

use crate::bindings;

/// Nanoseconds in a second.
const SECOND: u64 = 1_000_000_000;

/// Monotonic time in nanoseconds. It stands still during a fork.
pub(crate) fn monotonic_ns() -> u64 {
    // SAFETY: Anyone may ask for the time.
    u64::try_from(unsafe { bindings::ktime_get() }).unwrap_or(0)
}

/// Sets the wall clock of a copy whose vCPUs were started at `started_ns` since 1970, for a request
/// that was made at the monotonic time `rung_at_ns`.
///
/// # Errors
///
/// `EINVAL` where that is no time that the kernel's clock can show.
pub(crate) fn step_clock(started_ns: u64, rung_at_ns: u64) -> Result {
    let now_ns = started_ns.saturating_add(monotonic_ns().saturating_sub(rung_at_ns));
    // Both fit: the first is less than 2^35, the second than 2^30.
    let time = bindings::timespec64 {
        tv_sec: (now_ns / SECOND) as _,
        tv_nsec: (now_ns % SECOND) as _,
    };
    // SAFETY: The time lives until the call returns.
    kernel::error::to_result(unsafe { bindings::do_settimeofday64(&time) })
}

/// Tells user space, by a uevent of the device behind `kobject`, that this is a copy:
/// `VMFORK_ROLE=child`, and who it is.
///
/// # Safety
///
/// `kobject` is registered.
pub(crate) unsafe fn announce(kobject: *mut bindings::kobject, identity: &Identity) {
    let name = padded_text(&identity.name).unwrap_or_default();
    let mut variables = [
        Variable::new(format_args!("VMFORK_ROLE={}", Role::Child)),
        Variable::new(format_args!("VMFORK_INDEX={}", identity.index)),
        Variable::new(format_args!("VMFORK_COUNT={}", identity.count)),
        Variable::new(format_args!("VMFORK_GENERATION={}", identity.generation)),
        Variable::new(format_args!("VMFORK_VM_ID={}", Hyphenated(&identity.vm_id))),
        Variable::new(format_args!("VMFORK_NAME={name}")),
    ];
    let mut environment = [core::ptr::null_mut(); 7];
    for (pointer, variable) in environment.iter_mut().zip(&mut variables) {
        *pointer = variable.0.as_mut_ptr().cast();
    }
    // SAFETY: The object is registered, as the caller says. The strings end with NUL, the array
    // with null, and both live until the call returns.
    let result = unsafe {
        bindings::kobject_uevent_env(
            kobject,
            bindings::kobject_action_KOBJ_CHANGE,
            environment.as_mut_ptr(),
        )
    };
    if result != 0 {
        pr_warn!("no uevent tells that this is a copy: error {result}\n");
    }
}

/// `NAME=VALUE` with a NUL behind it; what does not fit is left out.
struct Variable([u8; 96]);

impl Variable {
    fn new(text: fmt::Arguments<'_>) -> Self {
        let mut variable = Self([0; 96]);
        let mut rest = Rest(&mut variable.0[..95]);
        // The error says that it was too long.
        let _ = rest.write_fmt(text);
        variable
    }
}

/// The part of a buffer that nothing was written to yet.
struct Rest<'a>(&'a mut [u8]);

impl Write for Rest<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // A NUL would end the variable before its end.
        if text.len() > self.0.len() || text.contains('\0') {
            return Err(fmt::Error);
        }
        let (now, rest) = core::mem::take(&mut self.0).split_at_mut(text.len());
        now.copy_from_slice(text.as_bytes());
        self.0 = rest;
        Ok(())
    }
}

/// A UUID as people write it.
struct Hyphenated<'a>(&'a [u8; 16]);

impl fmt::Display for Hyphenated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_char('-')?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}
