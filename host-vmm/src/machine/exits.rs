//! When a VM shows its first sign of life after a fork.

use std::{
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{clock::monotonic_ns, sync::lock};

/// Watches for the first exit after a point in time. Until then the VM has run, but nobody has seen anything of it.
#[derive(Debug, Default)]
pub struct Exits {
    armed: AtomicBool,
    awaited: Mutex<Option<Arc<FirstExit>>>,
}

/// The exit that was watched for.
#[derive(Debug, Default)]
pub struct FirstExit {
    at_ns: Mutex<Option<u64>>,
    changed: Condvar,
}

impl Exits {
    /// Watches for the next exit. One that was watched for before and has not come yet is given up.
    pub fn watch(&self) -> Arc<FirstExit> {
        let exit = Arc::new(FirstExit::default());
        *lock(&self.awaited) = Some(Arc::clone(&exit));
        self.armed.store(true, Ordering::Release);
        exit
    }

    /// Called at every exit.
    pub(super) fn happened(&self) {
        if self.armed.load(Ordering::Relaxed)
            && self.armed.swap(false, Ordering::Acquire)
            && let Some(exit) = lock(&self.awaited).take()
        {
            *lock(&exit.at_ns) = Some(monotonic_ns());
            exit.changed.notify_all();
        }
    }
}

impl FirstExit {
    /// Waits for it, up to `limit`: CLOCK_MONOTONIC in nanoseconds.
    pub fn wait(&self, limit: Duration) -> Option<u64> {
        let at_ns = self.changed.wait_timeout_while(lock(&self.at_ns), limit, |at_ns| at_ns.is_none());
        *at_ns.unwrap_or_else(PoisonError::into_inner).0
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
    }
}
