//! Rate limiter of what is sent of clones' memories.

use std::{
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use base::sync::lock;

/// For how long a bandwidth may be made up for that was not used.
const MAX_BURST: Duration = Duration::from_millis(50);

/// For how long what nobody waits for lets all else go first: who has asked for it takes its source for gone
/// where nothing comes.
const MAX_DELAY: Duration = Duration::from_secs(1);

/// Token bucket that keeps what is sent below a bandwidth.
#[derive(Debug)]
pub(super) struct RateLimiter {
    bytes_per_second: Option<u64>,
    free_at: Mutex<Instant>,
}

impl RateLimiter {
    /// One of so many bytes within a second, or of as many as possible.
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes may be sent.
    pub(super) fn wait(&self, bytes: u64) {
        thread::sleep(self.reserve(bytes, Instant::now()));
    }

    /// The same, on a thread that has other things to do. What is not urgent lets all else go first, for a
    /// while.
    pub(super) async fn wait_for_turn(&self, bytes: u64, is_urgent: bool) {
        let began = Instant::now();
        loop {
            let now = Instant::now();
            let gap = if is_urgent || now - began >= MAX_DELAY { None } else { Some(self.gap(bytes, now)) };
            let wait = gap.unwrap_or_else(|| self.reserve(bytes, now));
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            if wait.is_zero() || gap.is_none() {
                return;
            }
        }
    }

    /// Reserves the next free time, and says how long it is until then.
    fn reserve(&self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.bytes_per_second.filter(|rate| *rate > 0) else { return Duration::ZERO };
        let mut free_at = lock(&self.free_at);
        let start = (*free_at).max(now.checked_sub(MAX_BURST).unwrap_or(now));
        *free_at = start + Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate);
        start.saturating_duration_since(now)
    }

    /// Reserves the present time where nobody else has; else says when it makes sense to try again.
    fn gap(&self, bytes: u64, now: Instant) -> Duration {
        let wait = lock(&self.free_at).saturating_duration_since(now);
        if wait.is_zero() { self.reserve(bytes, now) } else { wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn no_more_is_sent_than_the_bandwidth_and_a_short_burst() {
        let rate_limiter = RateLimiter::new(Some(1000));
        let start = Instant::now() + SECOND;
        let waits: Vec<Duration> = (0..4).map(|_| rate_limiter.reserve(100, start)).collect();
        assert_eq!(waits, [0, 50, 150, 250].map(Duration::from_millis));
        assert_eq!(rate_limiter.reserve(1, start + 10 * SECOND), Duration::ZERO);
        assert!((0..100).all(|_| RateLimiter::new(None).reserve(u64::MAX, start).is_zero()));
    }

    #[test]
    fn what_somebody_waits_for_goes_first() {
        let rate_limiter = RateLimiter::new(Some(1000));
        let start = Instant::now() + SECOND;
        assert_eq!(rate_limiter.gap(1050, start), Duration::ZERO);
        // Whoever waits for a gap has reserved nothing.
        assert_eq!(rate_limiter.gap(1000, start), SECOND);
        assert_eq!(rate_limiter.reserve(1000, start), SECOND);
        assert_eq!(rate_limiter.gap(1000, start + SECOND), SECOND);
        assert_eq!(rate_limiter.gap(1000, start + 2 * SECOND), Duration::ZERO);
        assert_eq!(rate_limiter.reserve(1000, start + 2 * SECOND), SECOND);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_sent_too() {
        let rate_limiter = RateLimiter::new(Some(1000));
        rate_limiter.reserve(3000, Instant::now());
        let began = Instant::now();
        rate_limiter.wait_for_turn(1, false).await;
        assert!(began.elapsed() >= 2 * SECOND);
    }
}
