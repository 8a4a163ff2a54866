//! When a VM shows its first sign of life after a fork.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use base::{clock::monotonic_ns, sync::lock};

/// Watches for the first exit after a point in time. Until then the VM has run, but nobody has seen anything
/// of it.
#[derive(Debug, Default)]
pub struct Exits {
    armed: AtomicBool,
    awaited: Mutex<Option<Arc<FirstExit>>>,
}

/// The exit that was watched for.
#[derive(Debug, Default)]
pub struct FirstExit {
    seen: Mutex<Seen>,
    changed: Condvar,
}

/// What is known of an exit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Seen {
    #[default]
    NotYet,
    At(u64),
    /// Nobody watches for it any more.
    GivenUp,
}

impl Exits {
    /// Watches for the next exit. One that was watched for before and has not come yet is given up.
    pub fn watch(&self) -> Arc<FirstExit> {
        let exit = Arc::new(FirstExit::default());
        let given_up = lock(&self.awaited).replace(Arc::clone(&exit));
        self.armed.store(true, Ordering::Release);
        if let Some(given_up) = given_up {
            given_up.tell(Seen::GivenUp);
        }
        exit
    }

    /// Called at every exit.
    pub(super) fn happened(&self) {
        if self.armed.load(Ordering::Relaxed)
            && self.armed.swap(false, Ordering::Acquire)
            && let Some(exit) = lock(&self.awaited).take()
        {
            exit.tell(Seen::At(monotonic_ns()));
        }
    }
}

impl FirstExit {
    fn tell(&self, seen: Seen) {
        *lock(&self.seen) = seen;
        self.changed.notify_all();
    }

    /// Waits for it, up to `limit`: CLOCK_MONOTONIC in nanoseconds. One that was given up is not waited for.
    pub fn wait(&self, limit: Duration) -> Option<u64> {
        let seen = self.changed.wait_timeout_while(lock(&self.seen), limit, |seen| *seen == Seen::NotYet);
        match *seen.unwrap_or_else(PoisonError::into_inner).0 {
            Seen::At(at_ns) => Some(at_ns),
            Seen::NotYet | Seen::GivenUp => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_exit_counts() {
        let exits = Exits::default();
        exits.happened();
        let first = exits.watch();
        assert_eq!(first.wait(Duration::ZERO), None);
        exits.happened();
        let at_ns = first.wait(Duration::ZERO);
        assert!(at_ns.is_some());
        let second = exits.watch();
        exits.happened();
        exits.happened();
        assert_eq!(first.wait(Duration::ZERO), at_ns);
        assert!(second.wait(Duration::ZERO) >= at_ns);
        let (third, fourth) = (exits.watch(), exits.watch());
        assert_eq!(third.wait(Duration::MAX), None);
        exits.happened();
        assert!(fourth.wait(Duration::ZERO) >= at_ns);
    }
}
