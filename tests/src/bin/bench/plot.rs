//! Plots of the figures, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::stats::Figure;

/// A plot: its file, its title, what the figures' names begin with, and what stands on the axis below.
const PLOTS: &[(&str, &str, &str, &str)] = &[
    (
        "memory.svg",
        "Doorbell to a child's first exit, by memory size",
        "fork.child.",
        "MiB of memory, all resident",
    ),
    ("pause.svg", "The parent's pause, by memory size", "fork.pause.", "MiB of memory, all resident"),
    (
        "dirty.svg",
        "Doorbell to a child's first exit, by what the parent has dirtied",
        "fork.dirty.",
        "MiB dirty",
    ),
    ("generation.svg", "Doorbell to a child's first exit, by generation", "fork.gen", "generation"),
    ("children.svg", "Doorbell to the last child's first exit", "fork.last.of", "children"),
];

/// Draws all plots for which there are figures.
pub(crate) fn draw(figures: &[Figure], folder: &Path) -> Result<()> {
    for (file, title, prefix, axis) in PLOTS {
        let points =
            figures.iter().filter_map(|figure| Some((number(figure.name.strip_prefix(prefix)?)?, figure)));
        let mut points: Vec<(f64, &Figure)> = points.collect();
        points.sort_by(|(one, _), (other, _)| one.total_cmp(other));
        if points.len() > 1 {
            plot(&folder.join(file), title, axis, &points)
                .map_err(|error| anyhow!("can't draw {file}: {error}"))?;
        }
    }
    Ok(())
}

/// `512m` and `8g` in MiB; other numbers as they are.
fn number(text: &str) -> Option<f64> {
    match text.strip_suffix('g') {
        Some(gib) => gib.parse().ok().map(|gib: f64| gib * 1024.0),
        None => text.trim_end_matches('m').parse().ok(),
    }
}

fn plot(
    path: &Path,
    title: &str,
    axis: &str,
    points: &[(f64, &Figure)],
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let lines = [("p50", BLUE), ("p90", GREEN), ("p99", RED)];
    let end = points.last().map_or(1.0, |(at, _)| *at);
    let top = points.iter().map(|(_, figure)| figure.p99).fold(0.0, f64::max) * 1.1;
    let area = SVGBackend::new(path, (800, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart.configure_mesh().x_desc(axis).y_desc("us").draw()?;
    for (label, colour) in lines {
        let series = points.iter().map(|(at, figure)| match label {
            "p50" => (*at, figure.p50),
            "p90" => (*at, figure.p90),
            _ => (*at, figure.p99),
        });
        chart
            .draw_series(LineSeries::new(series, colour).point_size(3))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_with_numbers() {
        assert_eq!(number("512m"), Some(512.0));
        assert_eq!(number("8g"), Some(8192.0));
        assert_eq!(number("16"), Some(16.0));
        assert_eq!(number("4vcpu"), None);
    }
}
