//! Waking a thread up in a while.
//!
//! Whoever wakes a thread up at once may see it take his processor, or that of somebody for whom he has just made way: a background thread
//! that a parent woke up at the end of a fork kept its child from running for 100 us (measured). An alarm that goes off later costs no more.

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

/// An alarm clock, for one thread that waits.
#[derive(Debug)]
pub(super) struct Alarm {
    timer: TimerFd,
    is_set: AtomicBool,
}

impl Alarm {
    /// One that is not set (timerfd_create).
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self { timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?, is_set: AtomicBool::new(false) })
    }

    /// Has it go off in a while, unless it is set already.
    pub(super) fn set(&self, delay: Duration) {
        if !self.is_set.swap(true, Ordering::AcqRel) {
            self.start(delay);
        }
    }

    /// Has it go off at once.
    pub(super) fn ring(&self) {
        self.is_set.store(true, Ordering::Release);
        self.start(AT_ONCE);
    }

    fn start(&self, delay: Duration) {
        let expiration = Expiration::OneShot(TimeSpec::from_duration(delay));
        // The only failures are a time or a descriptor that is not one.
        if let Err(errno) = self.timer.set(expiration, TimerSetTimeFlags::empty()) {
            tracing::error!(%errno, "an alarm can't be set");
        }
    }

    /// Waits until it goes off, and says whether it has; it has not after `limit`. Whatever was done before it was set is to be seen then.
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
        self.is_set.swap(false, Ordering::AcqRel);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn it_goes_off_once_each_time_it_is_set() {
        let alarm = Alarm::new().unwrap();
        assert!(!alarm.wait(Some(Duration::ZERO)).unwrap());
        for _ in 0..2 {
            let began = Instant::now();
            alarm.set(Duration::from_millis(3));
            // It is set: this changes nothing.
            alarm.set(Duration::from_secs(100));
            assert!(alarm.wait(None).unwrap());
            assert!(began.elapsed() >= Duration::from_millis(3));
            assert!(!alarm.wait(Some(Duration::from_millis(1))).unwrap());
        }
    }

    #[test]
    fn who_can_not_wait_rings() {
        let alarm = Alarm::new().unwrap();
        alarm.set(Duration::from_secs(100));
        alarm.ring();
        assert!(alarm.wait(None).unwrap());
    }
}
