//! What a run comes to, and a table of it.

use cluster::placement::Policy;
use serde::Serialize;

/// How evenly something is distributed over platforms; the mean of all times at which it was looked at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Balance {
    /// Mean of all platforms.
    pub(crate) mean: f64,
    /// The most that one has, in relation to that.
    pub(crate) max_to_mean: f64,
    /// Standard deviation.
    pub(crate) deviation: f64,
    /// How often it was looked at.
    pub(crate) samples: u32,
}

impl Balance {
    /// Looks at it.
    pub(crate) fn add(&mut self, values: impl Iterator<Item = f64> + Clone) {
        let count = values.clone().count().max(1) as f64;
        let mean = values.clone().sum::<f64>() / count;
        let max = values.clone().fold(0.0, f64::max);
        let variance = values.map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        self.mean += mean;
        self.max_to_mean += if mean > 0.0 { max / mean } else { 1.0 };
        self.deviation += variance.sqrt();
        self.samples += 1;
    }

    /// The mean of what was added.
    pub(crate) fn mean(self) -> Self {
        let of = f64::from(self.samples.max(1));
        Self {
            mean: self.mean / of,
            max_to_mean: self.max_to_mean / of,
            deviation: self.deviation / of,
            ..self
        }
    }
}

/// What a run comes to.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) policy: Policy,
    pub(crate) view_age_ms: u64,
    pub(crate) platforms: u32,
    /// Copies that were wished for.
    pub(crate) wished: u64,
    /// Copies that were launched.
    pub(crate) placed: u64,
    /// Copies for which no place was found.
    pub(crate) refused: u64,
    /// How often copies were sent to a platform that was full by then.
    pub(crate) bounced: u64,
    /// Copies that bounced as often as they were tried.
    pub(crate) lost: u64,
    /// Measured: the time of the decisions alone.
    pub(crate) decisions_per_second: f64,
    /// VMs of a platform.
    pub(crate) vms: Balance,
    /// Nodes that are taken of a platform's.
    pub(crate) nodes_percent: Balance,
    /// Memory that is taken of a platform's.
    pub(crate) memory_percent: Balance,
}

/// The table.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let balance = |name: &str| format!("{name:>10}{:>9}{:>7}", "max/mean", "sd");
    let head = format!(
        "{:<13}{:>7}{:>9}{:>9}{:>9}{:>7}{}{}{}{:>9}",
        "policy",
        "view s",
        "placed",
        "refused",
        "bounced",
        "lost",
        balance("vms"),
        balance("nodes %"),
        balance("memory %"),
        "dec/s"
    );
    std::iter::once(head).chain(outcomes.iter().map(row)).map(|line| line + "\n").collect()
}

fn row(outcome: &Outcome) -> String {
    let Outcome { policy, view_age_ms, placed, refused, bounced, lost, decisions_per_second, .. } = outcome;
    let balances = [outcome.vms, outcome.nodes_percent, outcome.memory_percent];
    let balances = balances.map(|Balance { mean, max_to_mean, deviation, .. }| {
        format!("{mean:>10.1}{max_to_mean:>9.2}{deviation:>7.2}")
    });
    format!(
        "{policy:<13}{:>7}{placed:>9}{refused:>9}{bounced:>9}{lost:>7}{}{decisions_per_second:>9.0}",
        view_age_ms / 1000,
        balances.concat(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn balance_is_the_mean_of_what_was_seen() {
        let mut balance = Balance::default();
        balance.add([1.0, 3.0].into_iter());
        balance.add([0.0, 0.0].into_iter());
        assert_eq!(balance.mean(), Balance { mean: 1.0, max_to_mean: 1.25, deviation: 0.5, samples: 2 });
    }

    #[test]
    fn columns_line_up() {
        let balance = Balance { mean: 12.5, max_to_mean: 1.25, deviation: 3.75, samples: 50 };
        let outcome = Outcome {
            policy: Policy::LeastLoaded,
            view_age_ms: 5000,
            platforms: 100,
            wished: 12,
            placed: 9,
            refused: 2,
            bounced: 3,
            lost: 1,
            decisions_per_second: 12_345.6,
            vms: balance,
            nodes_percent: balance,
            memory_percent: balance,
        };
        let text = table(&[outcome]);
        let widths: Vec<usize> = text.lines().map(str::len).collect();
        assert_eq!((widths.len(), widths[0]), (2, widths[1]), "{text}");
        let row = "least-loaded       5        9        2        3      1      \
                   12.5     1.25   3.75      12.5     1.25";
        assert!(text.contains(row), "{text}");
    }
}
