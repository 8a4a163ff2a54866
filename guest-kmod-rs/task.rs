// SPDX-License-Identifier: GPL-2.0

//! The module's own task, which makes the forks: it is above every other task of its CPU, so that
//! a copy has its clock before most others run, and has the kernel's credentials.
//!
//! It is a task of its own, and not the caller raised for a while: whoever may change the caller's
//! scheduling could keep it up there.

use core::{
    ffi::c_void,
    mem::{replace, size_of},
    ptr::NonNull,
};

use kernel::{
    c_str,
    error::{from_err_ptr, to_result},
    ffi::c_int,
    new_condvar, new_mutex,
    prelude::*,
    sync::{CondVar, CondVarTimeoutResult, Mutex},
    time::msecs_to_jiffies,
};
use vmfork_abi::Request;

use crate::{
    bindings::{self, sched_attr, task_struct},
    device::Device,
    fork::Outcome,
};

/// The highest real-time priority of user space.
const PRIORITY: u32 = 99;

/// How often the task looks by itself who this VM is, in milliseconds, while somebody has the device
/// open.
const LOOK: u32 = 1000;

/// NUMA_NO_NODE of linux/numa.h: the task's memory may be anywhere.
const ANY_NODE: c_int = -1;

/// What the task is asked to do.
pub(crate) enum Job {
    /// To ask for a fork once. Of its copies, a parent is told as many as fit into `copies`.
    Fork { request: Request, copies: KVVec<u8> },
    /// To make this VM itself, which has become a copy by a fork that did not come by the device.
    CatchUp,
}

// There is one.
#[allow(clippy::large_enum_variant)]
enum Slot {
    Empty,
    Asked(Job),
    Done(Outcome),
    /// Nothing will be asked any more.
    Closed,
}

/// Job that was given, and how many files are open.
struct JobState {
    slot: Slot,
    /// How many files are open.
    clients: u32,
}

/// Slot in which jobs are given to the task, one at a time: by whoever has the fork guard.
#[pin_data]
pub(crate) struct JobSlot {
    #[pin]
    state: Mutex<JobState>,
    #[pin]
    changed: CondVar,
}

/// What the task does next.
enum Next {
    Work(Job),
    /// To look who this VM is.
    Look,
    End,
}

impl JobSlot {
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state <- new_mutex!(JobState {
                slot: Slot::Empty,
                clients: 0,
            }),
            changed <- new_condvar!(),
        })
    }

    /// Has the task do a job, and waits until that is done, which no signal ends.
    pub(crate) fn run(&self, job: Job) -> Outcome {
        let mut state = self.state.lock();
        state.slot = Slot::Asked(job);
        self.changed.notify_all();
        loop {
            self.changed.wait(&mut state);
            match replace(&mut state.slot, Slot::Empty) {
                Slot::Done(outcome) => return outcome,
                other => state.slot = other,
            }
        }
    }

    /// Notes that a file was opened.
    pub(crate) fn opened(&self) {
        self.state.lock().clients += 1;
        self.changed.notify_all();
    }

    /// Notes that a file was closed.
    pub(crate) fn closed(&self) {
        self.state.lock().clients -= 1;
    }

    /// Waits for what there is to do.
    fn next(&self) -> Next {
        let mut state = self.state.lock();
        loop {
            match replace(&mut state.slot, Slot::Empty) {
                Slot::Asked(job) => return Next::Work(job),
                Slot::Closed => return Next::End,
                other => state.slot = other,
            }
            // A task of the kernel gets no signals; waiting so, it does not count as stuck.
            if state.clients == 0 {
                let _ = self.changed.wait_interruptible(&mut state);
                continue;
            }
            let look = msecs_to_jiffies(LOOK);
            let woken = self.changed.wait_interruptible_timeout(&mut state, look);
            if matches!(woken, CondVarTimeoutResult::Timeout) {
                return Next::Look;
            }
        }
    }

    fn done(&self, outcome: Outcome) {
        self.state.lock().slot = Slot::Done(outcome);
        self.changed.notify_all();
    }

    fn close(&self) {
        self.state.lock().slot = Slot::Closed;
        self.changed.notify_all();
    }
}

/// The task, until this is dropped.
pub(crate) struct Task {
    task: NonNull<task_struct>,
    device: NonNull<Device>,
}

// SAFETY: A task can be waited for from everywhere, and a `Device` is `Sync`.
unsafe impl Send for Task {}
// SAFETY: As above.
unsafe impl Sync for Task {}

impl Task {
    /// Starts the task of a device.
    ///
    /// # Errors
    ///
    /// What the kernel answers where there can't be another task.
    ///
    /// # Safety
    ///
    /// The device stays where it is until the result is dropped.
    pub(crate) unsafe fn start(device: &Device) -> Result<Self> {
        let device = NonNull::from(device);
        let name = c_str!("vmfork").as_char_ptr();
        // SAFETY: `main` takes a device, which outlives the task, as the caller says. The name has
        // no directives that would need arguments.
        let task = unsafe {
            bindings::kthread_create_on_node(Some(main), device.as_ptr().cast(), ANY_NODE, name)
        };
        let task = NonNull::new(from_err_ptr(task)?).ok_or(ENOMEM)?;
        // From here on it is ended by `drop`.
        let task = Self { task, device };
        let attributes = sched_attr {
            size: size_of::<sched_attr>() as u32,
            sched_policy: bindings::SCHED_FIFO,
            sched_priority: PRIORITY,
            ..Default::default()
        };
        // SAFETY: The task has not ended, and the attributes live until the call returns.
        to_result(unsafe { bindings::sched_setattr_nocheck(task.task.as_ptr(), &attributes) })?;
        // SAFETY: As above.
        unsafe { bindings::wake_up_process(task.task.as_ptr()) };
        Ok(task)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        // SAFETY: The device is still there, as the caller of `start` has promised.
        unsafe { self.device.as_ref() }.job_slot().close();
        // SAFETY: The task ends only after this, and was not waited for before.
        unsafe { bindings::kthread_stop(self.task.as_ptr()) };
    }
}

/// What the task does.
///
/// # Safety
///
/// `device` is a [`Device`] that outlives the task.
unsafe extern "C" fn main(device: *mut c_void) -> c_int {
    // SAFETY: As the caller says.
    let device = unsafe { &*device.cast::<Device>() };
    loop {
        match device.job_slot().next() {
            Next::Work(job) => device.job_slot().done(device.work(job)),
            Next::Look => device.look(),
            Next::End => break,
        }
    }
    // Whoever ends the task must find it.
    // SAFETY: This is a task of the kernel that holds no lock.
    while !unsafe { bindings::kthread_should_stop() } {
        // SAFETY: As above.
        unsafe { bindings::msleep_interruptible(1) };
    }
    0
}
