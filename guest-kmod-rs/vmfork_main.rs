// SPDX-License-Identifier: GPL-2.0

//! VM fork from Linux: the device `/dev/vmfork`.
//!
//! Its interface is described in the crate `vmfork_abi`, module `device`. A fork's way through the
//! module:
//!
//! ```text
//! ioctl      the arguments are copied in and checked, and room for the answer is touched
//! fork_guard one caller after another; a signal or the deadline ends the wait
//! task       it is handed to the module's own task, which is above every other of its CPU
//! stop       all CPUs are stopped, but for the one that goes on here
//! fork       the request is written, and the hypercall made   ->  parent       children
//! seed       the generator takes the seed of this VM               seed         seed
//! stop       all CPUs go on
//! identity   who this VM is now                                                clock, uevent
//! device     whoever reads or polls is told; then the caller gets its answer
//! ```
//!
//! Everything unsafe is in `bindings` (what the kernel offers), `control_page` (memory that the VMM
//! writes too), `hypercall`, `task`, `stop`, `seed`, `identity`, `vmm`, `wait_queue`, `device`, and
//! `file` (calls from the VFS).

mod bindings;
mod control_page;
mod device;
mod file;
mod fork;
mod fork_guard;
mod hypercall;
mod identity;
mod ioctl;
mod seed;
mod stop;
mod task;
mod vmm;
mod wait_queue;

use kernel::prelude::*;

use crate::device::Registration;

#[cfg(kernel_since_6_15)]
module! {
    type: VmFork,
    name: "vmfork",
    authors: ["The vmfork authors"],
    description: "Lets processes fork the virtual machine that they run in",
    license: "GPL",
}
#[cfg(not(kernel_since_6_15))]
module! {
    type: VmFork,
    name: "vmfork",
    author: "The vmfork authors",
    description: "Lets processes fork the virtual machine that they run in",
    license: "GPL",
}

/// The module: its device, for as long as it is loaded.
struct VmFork {
    _device: Registration,
}

impl kernel::Module for VmFork {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Self {
            _device: Registration::new()?,
        })
    }
}
