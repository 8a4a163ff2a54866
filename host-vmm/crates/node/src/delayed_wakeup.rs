//! Delayed wake-ups of a thread, by a timer.
//!
//! Whoever wakes a thread up at once may see it take his processor, or that of somebody for whom he has just
//! made way: a background thread that a parent woke up at the end of a fork kept its child from running for
//! 100 us (measured). A delayed wake-up costs no more.

use std::{
    io,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};

/// The shortest time that does not mean "never" (timerfd_settime).
const AT_ONCE: Duration = Duration::from_nanos(1);

/// Delayed wake-up (timerfd) of one thread that waits.
#[derive(Debug)]
pub(super) struct DelayedWakeup {
    timer: TimerFd,
    is_scheduled: AtomicBool,
}

impl DelayedWakeup {
    /// One that is not scheduled (timerfd_create).
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self {
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            is_scheduled: AtomicBool::new(false),
        })
    }

    /// Schedules it after a delay, unless it is scheduled already.
    pub(super) fn schedule(&self, delay: Duration) {
        if !self.is_scheduled.swap(true, Ordering::AcqRel) {
            self.start(delay);
        }
    }

    /// Wakes the thread up at once.
    pub(super) fn wake_now(&self) {
        self.is_scheduled.store(true, Ordering::Release);
        self.start(AT_ONCE);
    }

    fn start(&self, delay: Duration) {
        let expiration = Expiration::OneShot(TimeSpec::from_duration(delay));
        // The only failures are a time or a descriptor that is not one.
        if let Err(errno) = self.timer.set(expiration, TimerSetTimeFlags::empty()) {
            tracing::error!(%errno, "a wake-up can't be set");
        }
    }

    /// Waits until it expires, and says whether it has; it has not after `limit`. Whatever was done before it
    /// was scheduled is to be seen then.
    pub(super) fn wait(&self, limit: Option<Duration>) -> io::Result<bool> {
        let limit = limit.map_or(Ok(PollTimeout::NONE), PollTimeout::try_from).map_err(io::Error::other)?;
        loop {
            match poll(&mut [PollFd::new(self.timer.as_fd(), PollFlags::POLLIN)], limit) {
                Ok(0) => return Ok(false),
                Ok(_) => break,
                Err(nix::Error::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        match self.timer.wait() {
            Ok(()) | Err(nix::Error::EAGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.is_scheduled.swap(false, Ordering::AcqRel);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn it_expires_once_each_time_it_is_scheduled() {
        let wakeup = DelayedWakeup::new().unwrap();
        assert!(!wakeup.wait(Some(Duration::ZERO)).unwrap());
        for _ in 0..2 {
            let began = Instant::now();
            wakeup.schedule(Duration::from_millis(3));
            // It is scheduled: this changes nothing.
            wakeup.schedule(Duration::from_secs(100));
            assert!(wakeup.wait(None).unwrap());
            assert!(began.elapsed() >= Duration::from_millis(3));
            assert!(!wakeup.wait(Some(Duration::from_millis(1))).unwrap());
        }
    }

    #[test]
    fn who_can_not_wait_wakes_it_now() {
        let wakeup = DelayedWakeup::new().unwrap();
        wakeup.schedule(Duration::from_secs(100));
        wakeup.wake_now();
        assert!(wakeup.wait(None).unwrap());
    }
}
