//! The contract of devices.
//!
//! ```text
//!  power-on ─┐             ┌───── resume ─────┐
//!            ├─► built ─► running ─ pause ─► paused ─ save, any number of times
//!  restore ──┘                                │
//!                                             └─ drop (the VM ends, as it may in each state)
//! ```
//!
//! - **Power-on, restore**: the device as a guest finds it at its boot, or at its capture. It reaches no vCPU
//!   yet.
//! - **Run**: before the first vCPU runs. From here on it serves accesses, and may raise interrupts.
//! - **Pause**: after all vCPUs have stopped. Until it resumes it reaches no guest memory, raises no
//!   interrupt and takes no input.
//! - **Save**: the state of a paused device, from which any number of copies are restored.
//!
//! [`Seat`] asserts this order, so that a device can rely on it.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard},
};

use base::sync::lock;

use super::Error;

/// A device of a VM.
pub trait Device: fmt::Debug + Send {
    /// Name in the table of versions that every capsule carries.
    const NAME: &'static str;

    /// Version of its state and of its interface: another one with each change of either.
    const VERSION: u32;

    /// State that a fork takes of it.
    type State;

    /// Saves the state.
    ///
    /// # Errors
    /// [`Error`] where the state can't be read.
    fn save(&self) -> Result<Self::State, Error>;

    /// Stops all that goes on without a vCPU.
    fn pause(&mut self) {}

    /// Lets it go on.
    fn resume(&mut self) {}
}

/// Row of a device in the table of versions.
pub(super) const fn version<D: Device>() -> (&'static str, u32) {
    (D::NAME, D::VERSION)
}

/// Place of a device in a VM, which keeps the device's accesses apart from each other, and from pauses.
#[derive(Debug)]
pub(super) struct Seat<D>(Mutex<Seated<D>>);

#[derive(Debug)]
struct Seated<D> {
    phase: Phase,
    device: D,
}

/// Phase of a device's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Built,
    Running,
    Paused,
}

impl<D: Device> Seat<D> {
    /// Seats a device after its power-on, or restored.
    pub(super) fn new(device: D) -> Self {
        Self(Mutex::new(Seated { phase: Phase::Built, device }))
    }

    /// Lets the device run.
    ///
    /// # Panics
    /// Where it was let run before.
    pub(super) fn run(&self) {
        lock(&self.0).go(Phase::Built, Phase::Running);
    }

    /// Gives access to the running device. Waits for as long as it is paused.
    ///
    /// # Panics
    /// Where it was not let run yet.
    pub(super) fn access(&self) -> Access<'_, D> {
        let seated = lock(&self.0);
        assert_eq!(seated.phase, Phase::Running, "an access to {} out of turn", D::NAME);
        Access(seated)
    }

    /// Pauses the device, until the result is dropped.
    ///
    /// # Panics
    /// Where it was not let run yet.
    pub(super) fn pause(&self) -> Paused<'_, D> {
        let mut seated = lock(&self.0);
        seated.go(Phase::Running, Phase::Paused);
        seated.device.pause();
        Paused(seated)
    }
}

impl<D: Device> Seated<D> {
    fn go(&mut self, from: Phase, to: Phase) {
        assert_eq!(self.phase, from, "{} can't become {to:?}", D::NAME);
        self.phase = to;
    }
}

/// Access to a running device.
#[derive(Debug)]
pub(super) struct Access<'s, D>(MutexGuard<'s, Seated<D>>);

impl<D> Deref for Access<'_, D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.0.device
    }
}

impl<D> DerefMut for Access<'_, D> {
    fn deref_mut(&mut self) -> &mut D {
        &mut self.0.device
    }
}

/// A paused device, which resumes when this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Paused<'s, D: Device>(MutexGuard<'s, Seated<D>>);

impl<D: Device> Paused<'_, D> {
    /// Saves the device's state.
    ///
    /// # Errors
    /// As [`Device::save`].
    pub(super) fn save(&self) -> Result<D::State, Error> {
        self.0.device.save()
    }
}

impl<D: Device> Drop for Paused<'_, D> {
    fn drop(&mut self) {
        self.0.device.resume();
        self.0.go(Phase::Paused, Phase::Running);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that counts by itself, but for while it is paused.
    #[derive(Debug, Default)]
    struct Clock {
        is_still: bool,
        ticks: u32,
    }

    impl Device for Clock {
        const NAME: &'static str = "clock";
        const VERSION: u32 = 3;
        type State = u32;

        fn save(&self) -> Result<u32, Error> {
            assert!(self.is_still);
            Ok(self.ticks)
        }

        fn pause(&mut self) {
            self.is_still = true;
        }

        fn resume(&mut self) {
            self.is_still = false;
        }
    }

    #[test]
    fn a_device_is_saved_while_it_is_paused_and_goes_on_behind_that() {
        let seat = Seat::new(Clock::default());
        seat.run();
        seat.access().ticks += 1;
        let paused = seat.pause();
        assert_eq!((paused.save().unwrap(), paused.save().unwrap()), (1, 1));
        drop(paused);
        assert!(!seat.access().is_still);
        seat.access().ticks += 1;
        assert_eq!(seat.pause().save().unwrap(), 2);
        assert_eq!(version::<Clock>(), ("clock", 3));
    }

    #[test]
    #[should_panic(expected = "an access to clock out of turn")]
    fn nobody_reaches_a_device_that_does_not_run_yet() {
        Seat::new(Clock::default()).access().ticks += 1;
    }

    #[test]
    #[should_panic(expected = "clock can't become Paused")]
    fn a_device_that_does_not_run_yet_is_not_paused() {
        drop(Seat::new(Clock::default()).pause());
    }

    #[test]
    #[should_panic(expected = "clock can't become Running")]
    fn a_device_is_let_run_once() {
        let seat = Seat::new(Clock::default());
        seat.run();
        seat.run();
    }
}
