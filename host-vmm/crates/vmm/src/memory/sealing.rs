//! Retries of the seal on a file that the kernel refuses to seal for now (EBUSY).

use std::{
    fs::File,
    thread,
    time::{Duration, Instant},
};

use super::{Error, memfd};

/// Pause after the first refusal; after each further one it is twice as long, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Time in which a parent has to leave the writable mapping of its old memory behind. On an idle host that
/// takes some milliseconds, or a second where its guest stands still; on a busy one its node may wait for a
/// processor.
const LIMIT: Duration = Duration::from_secs(20);

/// Further time for each MiB of memory. To unmap 512 MiB takes 20 ms on an idle host, 5 s with ten threads on
/// two processors, and up to 20 s with 45 (measured).
const LIMIT_PER_MIB: Duration = Duration::from_millis(32);

/// Least number of attempts, however long they take: this process may have had no processor itself.
const LEAST_ATTEMPTS: u32 = 50;

/// The attempts to seal one file.
#[derive(Debug, Clone)]
pub struct SealRetry {
    began: Instant,
    limit: Duration,
    refusals: u32,
}

impl SealRetry {
    /// Attempts for a file of a memory of `ram_bytes` bytes, from `now` on.
    pub fn new(now: Instant, ram_bytes: u64) -> Self {
        let mib = u32::try_from(ram_bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        Self { began: now, limit: LIMIT.saturating_add(LIMIT_PER_MIB.saturating_mul(mib)), refusals: 0 }
    }

    /// Counts a refusal, and gives the pause before the next attempt; `None` after the last one: whoever can
    /// write to the file does not let go of it.
    pub fn refused(&mut self, now: Instant) -> Option<Duration> {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.refusals.min(10)).min(LONGEST_PAUSE);
        self.refusals = self.refusals.saturating_add(1);
        let is_over =
            self.refusals >= LEAST_ATTEMPTS && now.saturating_duration_since(self.began) >= self.limit;
        (!is_over).then_some(pause)
    }
}

/// Seals a file of a memory of `ram_bytes` bytes that was filled while others had it mapped. Where one of
/// them holds a page for a moment, it is tried again: for a thread that nobody waits for.
///
/// # Errors
/// [`Error::File`] where it can't be sealed, [`Error::Busy`] where the kernel goes on refusing it.
pub fn seal_filled(file: &File, ram_bytes: u64) -> Result<(), Error> {
    let mut retry = SealRetry::new(Instant::now(), ram_bytes);
    while !memfd::try_seal(file)? {
        thread::sleep(retry.refused(Instant::now()).ok_or(Error::Busy)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_tried_again_ever_more_rarely_until_its_time_is_over() {
        let start = Instant::now();
        let mut retry = SealRetry::new(start, 512 << 20);
        let (mut now, mut pauses) = (start, Vec::new());
        while let Some(pause) = retry.refused(now) {
            pauses.push(pause);
            now += pause;
        }
        assert!(pauses.is_sorted() && pauses[0] == FIRST_PAUSE && pauses[pauses.len() - 1] == LONGEST_PAUSE);
        let taken = now - start;
        let limit = LIMIT + 512 * LIMIT_PER_MIB;
        assert!(taken >= limit && taken < limit + LONGEST_PAUSE, "{taken:?}");
        // Whatever comes in between, a second is enough for ten attempts.
        assert!(pauses.iter().take(10).sum::<Duration>() < Duration::from_secs(1));
    }

    #[test]
    fn nobody_is_blamed_by_who_had_no_processor_himself() {
        let start = Instant::now();
        let mut retry = SealRetry::new(start, 0);
        let late = start + LIMIT;
        assert!((1..LEAST_ATTEMPTS).all(|_| retry.refused(late).is_some()));
        assert!(retry.refused(late).is_none());
    }

    #[test]
    fn a_large_memory_has_more_time() {
        let start = Instant::now();
        let mut retry = SealRetry { refusals: LEAST_ATTEMPTS, ..SealRetry::new(start, 8 << 30) };
        assert!(retry.refused(start + LIMIT + 8191 * LIMIT_PER_MIB).is_some());
        assert!(retry.refused(start + LIMIT + 8192 * LIMIT_PER_MIB).is_none());
        assert!(SealRetry::new(start, u64::MAX).refused(start).is_some());
    }
}
