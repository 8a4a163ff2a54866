// SPDX-License-Identifier: GPL-2.0

//! The machine, stopped: one function runs, and nothing else of the guest.

use core::{ffi::c_void, ptr::null};

use kernel::{error::to_result, ffi::c_int, prelude::*};

use crate::bindings;

/// Runs `work` on one CPU, with its interrupts off, while every other CPU waits with its own off,
/// and returns what it gave.
///
/// No task is in the middle of a section with preemption disabled meanwhile: of the kernel's
/// spinlocks, none is held. So `work` may take those, and may not sleep.
///
/// # Errors
///
/// What `stop_machine` answers where it did not run `work`.
pub(crate) fn with_machine_stopped<R: Send>(work: impl FnOnce() -> R + Send) -> Result<R> {
    let mut call = Call {
        work: Some(work),
        result: None,
    };
    let (run, data) = (run_of(&call), (&raw mut call).cast());
    // SAFETY: `run` takes a `Call` of these types, which lives until the call returns; until then,
    // one CPU alone uses it. The caller may sleep, and holds no lock.
    to_result(unsafe { bindings::stop_machine(Some(run), data, null()) })?;
    call.result.ok_or(EAGAIN)
}

/// A function to run, and what it gave.
struct Call<F, R> {
    work: Option<F>,
    result: Option<R>,
}

/// What `stop_machine` calls.
type Run = unsafe extern "C" fn(*mut c_void) -> c_int;

/// [`run`] for a call of this type, which has no name.
fn run_of<F: FnOnce() -> R, R>(_call: &Call<F, R>) -> Run {
    run::<F, R>
}

/// # Safety
///
/// `call` is a [`Call`] of these types that nobody else uses meanwhile.
unsafe extern "C" fn run<F: FnOnce() -> R, R>(call: *mut c_void) -> c_int {
    // SAFETY: As the caller says.
    let call = unsafe { &mut *call.cast::<Call<F, R>>() };
    call.result = call.work.take().map(|work| work());
    0
}
