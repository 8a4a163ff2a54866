//! Circles of imports between the top-level modules of each crate.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cargo_metadata::{Metadata, Target};

use super::Finding;
use super::modules::{self, Arrows};
use super::rules::{CIRCLES, Circle, ROOTS_WITHOUT_PACKAGE};

/// Modules of one circle, sorted.
type Modules = BTreeSet<String>;

/// Circles that [`CIRCLES`] does not have, and those that it has and that are not there.
pub(super) fn check(metadata: &Metadata, root: &Path) -> Result<Vec<Finding>> {
    let mut found: BTreeMap<String, Vec<(Modules, Arrows)>> = BTreeMap::new();
    for (name, file) in roots(metadata, root) {
        let arrows = modules::arrows(&file, root)?;
        let circles = circles(&arrows).into_iter().map(|circle| (circle, arrows.clone()));
        found.entry(name).or_default().extend(circles);
    }
    Ok(compare(&found, CIRCLES))
}

/// Each crate's package and root file; those of tests apart.
fn roots(metadata: &Metadata, root: &Path) -> Vec<(String, PathBuf)> {
    let is_test = |target: &&Target| target.is_test() || target.is_bench() || target.is_custom_build();
    let packages = metadata.workspace_packages().into_iter();
    let targets = packages.flat_map(|package| package.targets.iter().map(move |target| (package, target)));
    let targets = targets.filter(|(_, target)| !is_test(target));
    let others = ROOTS_WITHOUT_PACKAGE.iter().map(|(name, file)| ((*name).to_owned(), root.join(file)));
    targets
        .map(|(package, target)| (package.name.to_string(), target.src_path.clone().into()))
        .chain(others)
        .collect()
}

/// Sets of modules each of which reaches all others of its set: strongly connected components with two
/// modules or more.
fn circles(arrows: &Arrows) -> BTreeSet<Modules> {
    let all: BTreeSet<&str> = arrows.keys().flat_map(|(from, to)| [from.as_str(), to.as_str()]).collect();
    let reach: BTreeMap<&str, BTreeSet<&str>> =
        all.iter().map(|&name| (name, reachable(name, arrows))).collect();
    let circle = |&name: &&str| -> Modules {
        let is_mutual = |other: &&&str| reach[name].contains(**other) && reach[**other].contains(name);
        all.iter().filter(is_mutual).map(|&other| other.to_owned()).collect()
    };
    all.iter().map(circle).filter(|circle| circle.len() > 1).collect()
}

/// Modules that can be reached from `start` by one arrow or more.
fn reachable<'a>(start: &'a str, arrows: &'a Arrows) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut waiting = vec![start];
    while let Some(name) = waiting.pop() {
        let next = arrows.keys().filter(|(from, _)| from == name).map(|(_, to)| to.as_str());
        waiting.extend(next.filter(|to| reached.insert(*to)));
    }
    reached
}

fn compare(found: &BTreeMap<String, Vec<(Modules, Arrows)>>, listed: &[Circle]) -> Vec<Finding> {
    let of = |circle: &Circle| -> Modules { circle.modules.iter().map(|&name| name.to_owned()).collect() };
    let is_listed = |name: &str, modules: &Modules| {
        listed.iter().any(|circle| circle.of == name && of(circle) == *modules)
    };
    let is_found = |circle: &&Circle| {
        found.get(circle.of).is_some_and(|found| found.iter().any(|(modules, _)| *modules == of(circle)))
    };
    let all = found.iter().flat_map(|(name, circles)| circles.iter().map(move |circle| (name, circle)));
    let new = all.filter(|(name, (modules, _))| !is_listed(name, modules));
    let new = new.map(|(name, (modules, arrows))| {
        let known: Modules = listed
            .iter()
            .filter(|circle| circle.of == name)
            .flat_map(of)
            .filter(|known| modules.contains(known))
            .collect();
        unlisted(name, modules, &known, arrows)
    });
    let gone = listed.iter().filter(|circle| !is_found(circle)).map(|circle| {
        let Circle { of, modules, why } = circle;
        let fault = format!("{of} has no circle of just {} any more ({why})", modules.join(", "));
        Finding::new(
            "tests/xtask/src/tidy/rules.rs",
            fault,
            "remove it from CIRCLES, or list what is left of it",
        )
    });
    new.chain(gone).collect()
}

/// A circle that is new, or has changed: with arrows of those that were in none, or else with all its arrows.
fn unlisted(of: &str, modules: &Modules, known: &Modules, arrows: &Arrows) -> Finding {
    let inside = |(from, to): &(String, String)| modules.contains(from) && modules.contains(to);
    let is_new = |name: &String| !known.contains(name) || known == modules;
    let arrows: Vec<_> = arrows.iter().filter(|(arrow, _)| inside(arrow)).collect();
    let new: Vec<_> = arrows.iter().filter(|((from, to), _)| is_new(from) || is_new(to)).copied().collect();
    let shown = if new.is_empty() { arrows } else { new };
    let place = shown.first().map_or_else(String::new, |(_, place)| (*place).clone());
    let shown: Vec<_> = shown.iter().map(|((from, to), place)| format!("{from} -> {to} ({place})")).collect();
    let modules: Vec<_> = modules.iter().map(String::as_str).collect();
    let fault =
        format!("modules of {of} import each other in a circle that is not listed: {}", modules.join(", "));
    Finding::new(place, fault, format!("turn one of these arrows round, or cut it: {}", shown.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrows(arrows: &[(&str, &str)]) -> Arrows {
        let place = |(from, to): &(&str, &str)| (((*from).into(), (*to).into()), format!("{from}.rs:1"));
        arrows.iter().map(place).collect()
    }

    fn modules(names: &[&str]) -> Modules {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_circle_is_what_reaches_itself_by_others() {
        assert!(circles(&arrows(&[("a", "b"), ("b", "c"), ("a", "c")])).is_empty());
        let two =
            arrows(&[("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("e", "d"), ("f", "a")]);
        assert_eq!(circles(&two), [modules(&["a", "b", "c"]), modules(&["d", "e"])].into());
        let joined = arrows(&[("a", "b"), ("b", "a"), ("b", "c"), ("c", "b")]);
        assert_eq!(circles(&joined), [modules(&["a", "b", "c"])].into());
    }

    fn found(pairs: &[(&str, &str)]) -> BTreeMap<String, Vec<(Modules, Arrows)>> {
        let arrows = arrows(pairs);
        [("x".to_owned(), circles(&arrows).into_iter().map(|circle| (circle, arrows.clone())).collect())]
            .into()
    }

    const LISTED: [Circle; 1] = [Circle { of: "x", modules: &["a", "b"], why: "old" }];

    #[test]
    fn a_listed_circle_passes() {
        assert!(compare(&found(&[("a", "b"), ("b", "a"), ("a", "c")]), &LISTED).is_empty());
        assert!(compare(&found(&[]), &[]).is_empty());
    }

    #[test]
    fn a_circle_that_is_new_grows_or_is_gone_fails() {
        let new = compare(&found(&[("a", "b"), ("b", "a")]), &[]);
        assert_eq!(new.len(), 1);
        assert!(new[0].remedy.ends_with("a -> b (a.rs:1), b -> a (b.rs:1)"), "{}", new[0]);
        let grown = compare(&found(&[("a", "b"), ("b", "a"), ("b", "c"), ("c", "a")]), &LISTED);
        assert_eq!(grown.len(), 2);
        assert!(grown[0].remedy.ends_with("b -> c (b.rs:1), c -> a (c.rs:1)"), "{}", grown[0]);
        let gone = compare(&found(&[("a", "b")]), &LISTED);
        assert_eq!(gone.len(), 1);
        assert!(gone[0].fault.contains("no circle of just a, b"), "{}", gone[0]);
    }
}
