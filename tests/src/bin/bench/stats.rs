//! Samples, and what is told of them.

use serde::Serialize;

/// A figure that was measured over and over.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    /// What it is, such as `fork.child.512m`.
    pub(crate) name: String,
    /// Unit of the numbers.
    pub(crate) unit: &'static str,
    /// How many samples there are.
    pub(crate) n: usize,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// Figures, in the order in which they were first measured.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<(String, &'static str, Vec<f64>)>);

impl Samples {
    /// Adds a sample.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        match self.0.iter_mut().find(|(known, ..)| known == name) {
            Some((_, _, values)) => values.push(value),
            None => self.0.push((name.to_owned(), unit, vec![value])),
        }
    }

    /// Adds a time in nanoseconds, in microseconds.
    pub(crate) fn add_ns(&mut self, name: &str, nanoseconds: u64) {
        self.add(name, "us", microseconds(nanoseconds));
    }

    /// All figures.
    pub(crate) fn figures(&self) -> Vec<Figure> {
        self.0.iter().map(|(name, unit, values)| figure(name, unit, values)).collect()
    }
}

/// Nanoseconds as microseconds.
pub(crate) fn microseconds(nanoseconds: u64) -> f64 {
    std::time::Duration::from_nanos(nanoseconds).as_secs_f64() * 1e6
}

fn figure(name: &str, unit: &'static str, values: &[f64]) -> Figure {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |percent: usize| sorted[rank(percent, sorted.len())];
    Figure {
        name: name.to_owned(),
        unit,
        n: sorted.len(),
        p50: at(50),
        p90: at(90),
        p99: at(99),
        max: at(100),
    }
}

/// Index of the smallest sorted value that so many percent of `n` values do not exceed.
fn rank(percent: usize, n: usize) -> usize {
    (percent * n).div_ceil(100).clamp(1, n) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let mut samples = Samples::default();
        for value in [5.0, 1.0, 3.0, 2.0, 4.0] {
            samples.add("x", "us", value);
        }
        samples.add_ns("y", 1500);
        let figures = samples.figures();
        assert_eq!((figures[0].p50, figures[0].p90, figures[0].max, figures[0].n), (3.0, 5.0, 5.0, 5));
        assert_eq!((figures[1].p50, figures[1].p99, figures[1].n), (1.5, 1.5, 1));
        assert_eq!((rank(50, 200), rank(99, 200), rank(100, 200)), (99, 197, 199));
    }
}
