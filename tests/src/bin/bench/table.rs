//! The figures as a table, with the ratios that matter.

use std::fmt::Write;

use crate::stats::Figure;

/// Figures that are told in relation to another one: what, to what.
const RATIOS: &[(&str, &str)] = &[
    ("fork.child.512m", "floor.child.512m"),
    ("fork.child.8g", "fork.child.128m"),
    ("fork.pause.8g", "fork.pause.128m"),
    ("switch.over.64m", "switch.spare.64m"),
    ("fork.gen16", "fork.gen2"),
    ("fork.dirty.64m", "floor.copy.64m"),
    ("fork.dirty.64m", "floor.memcpy.64m"),
    ("fork.dirty.512m", "floor.copy.512m"),
    ("fork.ws16m", "fork.ws16m.cold"),
    ("firecracker.spawn", "fork.child.512m"),
    ("firecracker.ws16m", "fork.ws16m"),
    ("fork.thousand", "floor.thousand"),
    ("clone.full", "floor.tls"),
    ("clone.lazy.4g", "clone.lazy.256m"),
    ("clone.lazy.256m", "fork.child.128m"),
    ("trip.port", "floor.trip.port"),
    ("trip.mmio", "floor.trip.mmio"),
    ("trip.hypercall", "floor.trip.hypercall"),
    ("trip.mmio", "trip.port"),
    ("trip.hypercall", "trip.port"),
    ("trip.hypercall.answered", "trip.port.answered"),
];

/// The table.
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text = String::new();
    let mut line = |what: std::fmt::Arguments<'_>| {
        // A String takes everything.
        if writeln!(text, "{what}").is_err() {
            unreachable!("a String can be written to");
        }
    };
    line(format_args!(
        "{:<26} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "figure", "unit", "p50", "p90", "p99", "max", "n"
    ));
    for Figure { name, unit, n, p50, p90, p99, max } in figures {
        let digits = if matches!(*unit, "us" | "ns") { 0 } else { 2 };
        line(format_args!(
            "{name:<26} {unit:>5} {p50:>10.digits$} {p90:>10.digits$} {p99:>10.digits$} \
             {max:>10.digits$} {n:>10}"
        ));
    }
    line(format_args!(""));
    for (what, to) in RATIOS {
        let find = |name: &str| figures.iter().find(|figure| figure.name == name);
        if let (Some(what), Some(to)) = (find(what), find(to)) {
            let name = format!("{} / {}", what.name, to.name);
            line(format_args!("{name:<44} {:>8.2} at p50", what.p50 / to.p50));
        }
    }
    text
}
