// SPDX-License-Identifier: GPL-2.0

//! The device: all that the module has, and what it tells its users.

use kernel::{
    error::to_result,
    new_condvar, new_mutex,
    prelude::*,
    sync::{lock::Guard, CondVar, LockedBy, Mutex},
    types::Opaque,
};
use vmfork_abi::Identity;

use crate::{
    bindings,
    control_page::ControlPage,
    file,
    fork_guard::ForkGuard,
    hypercall::Hypercall,
    identity,
    seed::Generator,
    task::{Job, JobSlot, Task},
    vmm,
    wait_queue::WaitQueue,
};

/// The device, which stays where it is: the kernel has pointers to it.
#[pin_data]
pub(crate) struct Device {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    hypercall: Hypercall,
    page: ControlPage,
    generator: Generator,
    #[pin]
    state: Mutex<State>,
    /// Notified when `State::forking` becomes false.
    #[pin]
    fork_ended: CondVar,
    /// Notified when `State::forks` changes.
    #[pin]
    fork_events: CondVar,
    #[pin]
    pollers: WaitQueue,
    #[pin]
    job_slot: JobSlot,
}

// SAFETY: `misc` is the kernel's, which locks it. All else is `Send` by itself.
unsafe impl Send for Device {}
// SAFETY: As above.
unsafe impl Sync for Device {}

/// What changes.
pub(crate) struct State {
    /// Whether a caller has the fork guard.
    pub(crate) forking: bool,
    /// How many forks this VM has come out of since the module was loaded, as far as the module has
    /// seen.
    pub(crate) forks: u64,
    /// Of the VM, when it was last looked at.
    generation: u32,
}

/// Forks that one open file was told of.
pub(crate) type SeenForks = LockedBy<u64, State>;

/// A device that processes can open, until this is dropped.
pub(crate) struct Registration {
    /// Ends before the device goes, and before it is deregistered: it sends uevents by it.
    task: Option<Task>,
    device: Pin<KBox<Device>>,
}

impl Registration {
    /// Finds the VMM, and makes the device.
    ///
    /// # Errors
    ///
    /// `ENODEV` where there is no VMM that can fork this VM by a hypercall, or what its parts
    /// return. The kernel's log tells more.
    pub(crate) fn new() -> Result<Self> {
        let interface = vmm::detect()?;
        let hypercall = Hypercall::detect();
        if !hypercall.is_handed_on() {
            pr_err!("KVM does not hand hypercalls on: only the doorbell's port is left\n");
            return Err(ENODEV);
        }
        let page = ControlPage::open(&interface)?;
        let generation = page.identity().generation;
        let generator = Generator::open()?;
        let state = State {
            forking: false,
            forks: 0,
            generation,
        };
        let device = KBox::pin_init(
            pin_init!(Device {
                misc: Opaque::new(file::misc_device()),
                hypercall,
                page,
                generator,
                state <- new_mutex!(state),
                fork_ended <- new_condvar!(),
                fork_events <- new_condvar!(),
                pollers <- WaitQueue::new(),
                job_slot <- JobSlot::new(),
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The device is pinned, and goes after the task.
        let task = unsafe { Task::start(&device) }?;
        // SAFETY: The device is complete and pinned. It goes away after `misc_deregister` alone,
        // and not while a file is open, since each holds the module.
        to_result(unsafe { bindings::misc_register(device.misc.get()) })?;
        pr_info!("control page at {:#x}\n", device.page.gpa());
        Ok(Self {
            task: Some(task),
            device,
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        drop(self.task.take());
        // SAFETY: `new` has registered it.
        unsafe { bindings::misc_deregister(self.device.misc.get()) };
    }
}

impl Device {
    /// The device of a `miscdevice` that is in one.
    ///
    /// # Safety
    ///
    /// `misc` is a device's, and that lives for as long as the result is used.
    pub(crate) unsafe fn from_misc<'a>(misc: *mut bindings::miscdevice) -> &'a Self {
        let device = kernel::container_of!(misc.cast::<Opaque<bindings::miscdevice>>(), Self, misc);
        // SAFETY: As the caller says.
        unsafe { &*device }
    }

    pub(crate) fn page(&self) -> &ControlPage {
        &self.page
    }

    pub(crate) fn hypercall(&self) -> &Hypercall {
        &self.hypercall
    }

    pub(crate) fn job_slot(&self) -> &JobSlot {
        &self.job_slot
    }

    pub(crate) fn generator(&self) -> &Generator {
        &self.generator
    }

    pub(crate) fn state(&self) -> &Mutex<State> {
        &self.state
    }

    pub(crate) fn fork_ended(&self) -> &CondVar {
        &self.fork_ended
    }

    pub(crate) fn fork_events(&self) -> &CondVar {
        &self.fork_events
    }

    pub(crate) fn pollers(&self) -> &WaitQueue {
        &self.pollers
    }

    /// The state, after forks that did not come by this device were noticed: an operator's, or by
    /// the doorbell's port. Nothing tells the module of such a one, so that it sees to the copy's
    /// seed when it next looks: whenever the device is used, and [from time to time](Self::look).
    pub(crate) fn up_to_date(&self) -> Guard<'_, State, kernel::sync::lock::mutex::MutexBackend> {
        if let Some(guard) = self.guard_of_copy() {
            // Whether its role makes sense is for those to say who ask for it.
            let _ = self.job_slot.run(Job::CatchUp).result;
            drop(guard);
        }
        self.state.lock()
    }

    /// The same, by the module's own task.
    pub(crate) fn look(&self) {
        if let Some(guard) = self.guard_of_copy() {
            // As above.
            let _ = self.work(Job::CatchUp).result;
            drop(guard);
        }
    }

    /// The fork guard, where this VM is a copy that is not itself yet, and nobody else has it.
    fn guard_of_copy(&self) -> Option<ForkGuard<'_>> {
        let mut state = self.state.lock();
        let identity = self.page.identity();
        if state.forking || identity.generation == state.generation {
            return None;
        }
        state.forking = true;
        Some(ForkGuard::taken(self, identity.vm_id))
    }

    /// Notes that this VM has come out of a fork, and tells those who wait for it.
    pub(crate) fn note(&self, identity: &Identity) {
        let mut state = self.state.lock();
        state.forks += 1;
        state.generation = identity.generation;
        drop(state);
        self.fork_events.notify_all();
        self.pollers.wake();
    }

    /// Sends the uevent of a copy.
    pub(crate) fn announce(&self, identity: &Identity) {
        // SAFETY: The device is registered for as long as anyone can get here.
        let kobject = unsafe { &raw mut (*(*self.misc.get()).this_device).kobj };
        // SAFETY: As above.
        unsafe { identity::announce(kobject, identity) };
    }

    /// What a file has that was opened now.
    pub(crate) fn seen_forks(&self) -> SeenForks {
        let forks = self.up_to_date().forks;
        LockedBy::new(&self.state, forks)
    }
}
