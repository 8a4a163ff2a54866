//! Arrows between the crates of the workspace, and what a crate must not link.

use anyhow::Result;
use cargo_metadata::{DependencyKind, Metadata, Package};

use super::Finding;
use super::rules::{CRATES, Crate};
use crate::cargo;

/// Dependencies that [`CRATES`] does not allow.
pub(super) fn check(metadata: &Metadata) -> Result<Vec<Finding>> {
    let packages = metadata.workspace_packages();
    let own: Vec<&str> = packages.iter().map(|package| package.name.as_str()).collect();
    let mut findings: Vec<_> =
        CRATES.iter().enumerate().filter_map(|(index, rule)| upwards(index, rule)).collect();
    for package in packages {
        let place = place(metadata, package);
        let Some(rule) = CRATES.iter().find(|rule| rule.name == package.name.as_str()) else {
            let fault = format!("the crate {} is in no table of allowed arrows", package.name);
            findings.push(Finding::new(place, fault, "add it to CRATES"));
            continue;
        };
        findings.extend(arrows(package, rule, &own).into_iter().map(|fault| {
            Finding::new(
                &place,
                fault,
                "depend on a crate below, or let CRATES allow it if that is what is meant",
            )
        }));
        if !rule.links_none_of.is_empty() {
            let tree = ["tree", "--package", rule.name, "--edges=normal", "--prefix=none", "--format={p}"];
            let linked = linked(&cargo::text(&tree)?, rule.links_none_of);
            findings.extend(linked.into_iter().map(|name| {
                let fault = format!("{} links {name}, which it must not", rule.name);
                let remedy =
                    format!("see by `cargo tree -p {} -e normal -i {name}` what needs it", rule.name);
                Finding::new(&place, fault, remedy)
            }));
        }
    }
    Ok(findings)
}

fn place(metadata: &Metadata, package: &Package) -> String {
    let manifest = &package.manifest_path;
    manifest.strip_prefix(&metadata.workspace_root).unwrap_or(manifest).to_string()
}

/// A row of the table that allows an arrow to a crate which is not above its own row.
fn upwards(index: usize, rule: &Crate) -> Option<Finding> {
    let is_below = |name: &&&str| CRATES[..index].iter().any(|other| other.name == **name);
    let above = rule.may_use.iter().find(|name| !is_below(name))?;
    let fault = format!("{} may use {above}, which is not below it in CRATES", rule.name);
    Some(Finding::new("tests/xtask/src/tidy/rules.rs", fault, "list the lower one first"))
}

/// Crates of the workspace that `package` depends on and may not.
fn arrows(package: &Package, rule: &Crate, own: &[&str]) -> Vec<String> {
    let linked =
        package.dependencies.iter().filter(|dependency| dependency.kind != DependencyKind::Development);
    let inside = linked.map(|dependency| dependency.name.as_str()).filter(|name| own.contains(name));
    let not_allowed = inside.filter(|name| !rule.may_use.contains(name));
    not_allowed.map(|name| format!("{} depends on {name}, which is no allowed arrow", rule.name)).collect()
}

/// Those of `forbidden` that are in what `cargo tree` printed.
fn linked<'a>(tree: &str, forbidden: &[&'a str]) -> Vec<&'a str> {
    let names: Vec<_> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    forbidden.iter().filter(|name| names.contains(name)).copied().collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_has_no_arrow_upwards() {
        let findings: Vec<_> =
            CRATES.iter().enumerate().filter_map(|(index, rule)| upwards(index, rule)).collect();
        assert_eq!(findings, []);
        let rule = Crate { name: "low", may_use: &["xtask"], links_none_of: &[] };
        assert!(upwards(0, &rule).is_some());
    }

    #[test]
    fn arrows_that_are_not_allowed_are_found() {
        let dependency = |name: &str, kind: Option<&str>| {
            json!({
                "name": name, "req": "*", "kind": kind, "optional": false, "uses_default_features": true,
                "features": [], "target": null, "rename": null, "registry": null, "source": null,
            })
        };
        let package: Package = serde_json::from_value(json!({
            "name": "vmm", "version": "0.1.0", "id": "vmm", "manifest_path": "/vmm/Cargo.toml", "targets": [],
            "features": {},
            "dependencies": [
                dependency("types", None), dependency("libc", None), dependency("platform", None),
                dependency("tests", Some("dev")), dependency("xtask", Some("build")),
            ],
        }))
        .unwrap();
        let rule = Crate { name: "vmm", may_use: &["types"], links_none_of: &[] };
        let found = arrows(&package, &rule, &["vmm", "types", "platform", "tests", "xtask"]);
        let expected =
            ["platform", "xtask"].map(|name| format!("vmm depends on {name}, which is no allowed arrow"));
        assert_eq!(found, expected);
    }

    #[test]
    fn forbidden_packages_are_found_at_any_depth() {
        let tree = "node v0.1.0 (/x/node)\nserde v1.0.0\nhyper-util v0.1.0\ntokio v1.54.1 (*)\n";
        assert_eq!(linked(tree, &["hyper", "tokio"]), ["tokio"]);
    }
}
