//! Reports of writes that fail: once when it begins and once when it is over, however often they fail.

use std::time::{Duration, Instant};

/// Shortest time between two reports: a disk that refuses every other write must not fill the log with them.
const PAUSE: Duration = Duration::from_secs(10);

/// Failures of one kind, from the first to the next success.
#[derive(Debug, Default)]
pub struct Outage {
    is_on: bool,
    /// What was lost since the last report, in the unit of whoever counts.
    lost: u64,
    reported: Option<Instant>,
}

impl Outage {
    /// Counts what a failure has cost, and says whether the failure is to be reported.
    pub fn begins(&mut self, lost: u64, now: Instant) -> bool {
        self.lost = self.lost.saturating_add(lost);
        let is_new = !self.is_on && self.may_report(now);
        if is_new {
            self.reported = Some(now);
        }
        self.is_on = true;
        is_new
    }

    /// Takes a success, and gives what was lost where the end of the outage is to be reported.
    pub fn ends(&mut self, now: Instant) -> Option<u64> {
        if !self.is_on || !self.may_report(now) {
            return None;
        }
        (self.is_on, self.reported) = (false, Some(now));
        Some(std::mem::take(&mut self.lost))
    }

    /// What was lost and not reported, where nothing more will come.
    pub fn rest(&mut self) -> Option<u64> {
        Some(std::mem::take(&mut self.lost)).filter(|lost| *lost > 0)
    }

    fn may_report(&self, now: Instant) -> bool {
        self.reported.is_none_or(|reported| now.saturating_duration_since(reported) >= PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_reported_when_it_begins_and_when_it_is_over() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        assert_eq!(outage.ends(start), None, "nothing has failed");
        assert!(outage.begins(3, start));
        assert!((0..1000).all(|_| !outage.begins(1, start + PAUSE)));
        assert_eq!(outage.ends(start + 2 * PAUSE), Some(1003));
        assert_eq!(outage.ends(start + 3 * PAUSE), None);
    }

    #[test]
    fn failures_that_come_and_go_are_few_reports_and_nothing_is_forgotten() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        let (mut reports, mut lost) = (0, 0);
        for ms in 0..60_000 {
            let now = start + Duration::from_millis(ms);
            if ms % 2 == 0 {
                reports += u32::from(outage.begins(1, now));
            } else if let Some(more) = outage.ends(now) {
                (reports, lost) = (reports + 1, lost + more);
            }
        }
        assert!((2..=7).contains(&reports), "{reports} reports in a minute");
        assert_eq!(lost + outage.rest().unwrap_or(0), 30_000);
        assert_eq!(outage.rest(), None);
    }
}
