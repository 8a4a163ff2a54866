// SPDX-License-Identifier: GPL-2.0

//! The wait queue behind `poll`, which [`kernel::sync::CondVar`] has inside but does not show.

use core::{ffi::c_void, mem::MaybeUninit};

use kernel::{c_str, prelude::*, types::Opaque};

use crate::bindings;

/// For lockdep. Zeros are how the kernel declares such keys.
struct Key(Opaque<MaybeUninit<bindings::lock_class_key>>);

// SAFETY: Only lockdep looks at it, which locks what it changes.
unsafe impl Sync for Key {}

static KEY: Key = Key(Opaque::new(MaybeUninit::zeroed()));

/// Those who wait by `poll`, `select` or `epoll`.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head>,
}

// SAFETY: A wait queue has a lock of its own, and can be used from everywhere.
unsafe impl Send for WaitQueue {}
// SAFETY: As above.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// An empty queue.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `head` is valid while this runs, is pinned then, and name and key are static.
            head <- Opaque::ffi_init(|head| unsafe {
                let name = c_str!("vmfork").as_char_ptr();
                bindings::__init_waitqueue_head(head, name, KEY.0.get().cast());
            }),
        })
    }

    /// Has the caller of a file's `poll` wait in this queue, if it waits at all (`poll_wait` of
    /// linux/poll.h).
    ///
    /// # Safety
    ///
    /// `file` and `table` are those of a call of `poll` that has not returned, and this queue lives
    /// for as long as the file is open.
    pub(crate) unsafe fn join(
        &self,
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) {
        // SAFETY: The table is null or valid, as the caller says.
        let queue = unsafe { table.as_ref() }.and_then(|table| table._qproc);
        if let Some(queue) = queue {
            // SAFETY: This is what the table's function is for; the queue outlives the file, as the
            // caller says.
            unsafe { queue(file, self.head.get(), table) };
            // What is looked at from here on is newer than the entry in the queue.
            core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        }
    }

    /// Wakes all up, since there is something to read.
    pub(crate) fn wake(&self) {
        let events = bindings::VMFORK_EPOLLIN as usize as *mut c_void;
        // SAFETY: The queue was initialised.
        unsafe { bindings::__wake_up(self.head.get(), bindings::VMFORK_TASK_NORMAL, 0, events) };
    }
}
