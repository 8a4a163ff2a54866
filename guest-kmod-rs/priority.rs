// SPDX-License-Identifier: GPL-2.0

//! The calling task above every other of its CPU, so that none of them runs in a copy that is not
//! itself yet.

use core::mem::size_of;

use crate::bindings::{self, sched_attr, task_struct};

/// The highest real-time priority of user space.
const TOP: u32 = 99;

/// Nice value zero, as `static_prio` has it (DEFAULT_PRIO of linux/sched/prio.h).
const DEFAULT_PRIO: i32 = 120;

/// The calling task, raised for as long as this lives. It is not for other tasks: whoever makes it
/// drops it.
pub(crate) struct Raised {
    task: *mut task_struct,
    /// How the task was scheduled before; `None` where it was left alone.
    old: Option<sched_attr>,
}

impl Raised {
    /// Raises the calling task. Deadline tasks, which have a bandwidth reserved that could be gone
    /// later, and those of policies that this module does not know are left as they are.
    pub(crate) fn new() -> Self {
        // SAFETY: There is always a current task.
        let task = unsafe { kernel::bindings::get_current() }.cast::<task_struct>();
        let top = sched_attr {
            sched_policy: bindings::SCHED_FIFO,
            sched_priority: TOP,
            ..sized()
        };
        // SAFETY: The task is the current one.
        let old = unsafe { scheduling(task) }.filter(|_| {
            // SAFETY: The task is the current one; the attributes live until the call returns.
            unsafe { bindings::sched_setattr_nocheck(task, &top) == 0 }
        });
        Self { task, old }
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(old) = &self.old {
            // What the task was before, it can be again: no check of its rights is made.
            // SAFETY: The task is still the current one, since a `Raised` stays with the task that
            // has made it: a raw pointer is not `Send`.
            unsafe { bindings::sched_setattr_nocheck(self.task, old) };
        }
    }
}

/// How a task is scheduled, where it can be put back to that.
///
/// # Safety
///
/// `task` is the current one.
unsafe fn scheduling(task: *mut task_struct) -> Option<sched_attr> {
    // SAFETY: The current task is valid, and the fields are its own to change but for privileged
    // others; stale ones do no harm.
    let task = unsafe { &*task };
    let attributes = sched_attr {
        sched_policy: task.policy,
        sched_flags: if task.sched_reset_on_fork() != 0 {
            bindings::SCHED_FLAG_RESET_ON_FORK.into()
        } else {
            0
        },
        ..sized()
    };
    match task.policy {
        bindings::SCHED_NORMAL | bindings::SCHED_BATCH | bindings::SCHED_IDLE => Some(sched_attr {
            sched_nice: task.static_prio - DEFAULT_PRIO,
            sched_runtime: if task.se.custom_slice != 0 {
                task.se.slice
            } else {
                0
            },
            ..attributes
        }),
        bindings::SCHED_FIFO | bindings::SCHED_RR => Some(sched_attr {
            sched_priority: task.rt_priority,
            ..attributes
        }),
        _ => None,
    }
}

fn sized() -> sched_attr {
    sched_attr {
        size: size_of::<sched_attr>() as u32,
        ..sched_attr::default()
    }
}
