// SPDX-License-Identifier: GPL-2.0

//! Guard of forks: there is one fork at a time, whoever asks.

use kernel::{
    prelude::*,
    sync::CondVarTimeoutResult,
    time::{msecs_to_jiffies, Msecs},
};

use crate::{bindings, device::Device, fork::errno, identity::monotonic_ns};

/// Longest wait in one go, in milliseconds.
const LONG: u64 = 60_000;

/// Guard for as long as a caller forks this VM: the right to fork, given up on drop. A copy of the VM
/// holds it in its own kernel, and gives it up there.
pub(crate) struct ForkGuard<'a> {
    device: &'a Device,
    /// ID of the VM that the caller has asked in.
    asker: [u8; 16],
}

impl<'a> ForkGuard<'a> {
    /// Waits until no other caller has it, or until the monotonic time `deadline_ns` where that is
    /// not zero.
    ///
    /// # Errors
    ///
    /// `EINTR` where a signal comes first, `ETIMEDOUT`, or `ESTALE` where this is a copy that came
    /// about meanwhile.
    pub(crate) fn take(device: &'a Device, deadline_ns: u64) -> Result<Self> {
        let asker = device.page().identity().vm_id;
        let waited = wait(device, deadline_ns);
        // A copy that came about meanwhile: whatever ended the wait, a restart included, is not for
        // the copy to go on from.
        if device.page().identity().vm_id != asker {
            if waited.is_ok() {
                drop(Self { device, asker });
            }
            return Err(errno(bindings::ESTALE));
        }
        waited.map(|()| Self { device, asker })
    }

    /// That of whoever has set `State::forking`, in the VM `asker`.
    pub(crate) fn taken(device: &'a Device, asker: [u8; 16]) -> Self {
        Self { device, asker }
    }

    /// ID of the VM that the caller has asked in: in a copy that came about since then, its request
    /// is not for the copy to make.
    pub(crate) fn asker(&self) -> [u8; 16] {
        self.asker
    }

    /// Waits a moment for whoever else forks this VM: an operator.
    ///
    /// # Errors
    ///
    /// As [`ForkGuard::take`].
    pub(crate) fn pause(&self, pause_ms: u32, deadline_ns: u64) -> Result {
        // SAFETY: The caller may sleep, and holds no lock.
        let left_ms = unsafe { bindings::msleep_interruptible(pause_ms) };
        if self.device.page().identity().vm_id != self.asker {
            return Err(errno(bindings::ESTALE));
        }
        if left_ms != 0 {
            return Err(EINTR);
        }
        if is_past(deadline_ns) {
            return Err(errno(bindings::ETIMEDOUT));
        }
        Ok(())
    }
}

/// Waits until nobody has the guard, and sets `State::forking`.
fn wait(device: &Device, deadline_ns: u64) -> Result {
    let mut state = device.state().lock();
    while state.forking {
        let signalled = if deadline_ns == 0 {
            device.fork_ended().wait_interruptible(&mut state)
        } else {
            let left_ns = deadline_ns.saturating_sub(monotonic_ns());
            if left_ns == 0 {
                return Err(errno(bindings::ETIMEDOUT));
            }
            let left_ms = left_ns.div_ceil(1_000_000).min(LONG) as Msecs;
            let left = msecs_to_jiffies(left_ms);
            let woken = device
                .fork_ended()
                .wait_interruptible_timeout(&mut state, left);
            matches!(woken, CondVarTimeoutResult::Signal { .. })
        };
        if signalled {
            return Err(EINTR);
        }
    }
    if is_past(deadline_ns) {
        return Err(errno(bindings::ETIMEDOUT));
    }
    state.forking = true;
    Ok(())
}

impl Drop for ForkGuard<'_> {
    fn drop(&mut self) {
        self.device.state().lock().forking = false;
        self.device.fork_ended().notify_all();
    }
}

fn is_past(deadline_ns: u64) -> bool {
    deadline_ns != 0 && monotonic_ns() >= deadline_ns
}
