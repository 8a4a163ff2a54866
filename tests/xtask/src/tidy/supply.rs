//! The supply chain: licences, sources, and dependencies that nobody uses.
//!
//! `deny.toml` has the rules, and `cargo deny` checks them where it is on the PATH. Elsewhere this does, but
//! for advisories, whose list it would have to fetch.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cargo_metadata::{Dependency, Metadata, Package, Source, Target};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use super::rules::USED_UNNAMED;
use super::{File, Finding, conclude, files};
use crate::cargo::{self, Workspace};

/// The only kind of machine that this is built for. Packages for others are not looked at, nor fetched.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Parts of deny.toml that are read here.
#[derive(Debug, Deserialize)]
struct Rules {
    licenses: Licenses,
    sources: Sources,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

/// Checks all packages that are linked, and prints what is wrong.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let metadata = cargo::metadata(&["--locked", "--filter-platform", TARGET])?;
    let mut findings = unused(&metadata, &files(&workspace.root)?);
    let is_there =
        Command::new("cargo-deny").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if is_there.is_ok_and(|status| status.success()) {
        deny()?;
    } else {
        eprintln!(
            "xtask: there is no cargo-deny: licences and sources are checked without it, advisories not"
        );
        findings.extend(packages(&metadata, &workspace.root)?);
    }
    conclude(findings)
}

/// Lets cargo-deny check everything; advisories where their list can be fetched.
fn deny() -> Result<()> {
    let check = ["deny", "check", "--hide-inclusion-graph"];
    cargo::run(&[&check, ["bans", "licenses", "sources"].as_slice()].concat())?;
    if let Err(error) = cargo::run(&["deny", "fetch", "db"]) {
        eprintln!("xtask: advisories are not checked: their list can't be fetched: {error:#}");
        return Ok(());
    }
    cargo::run(&[&check, ["--disable-fetch", "advisories"].as_slice()].concat())
}

/// Packages with a licence or a source that deny.toml does not allow.
fn packages(metadata: &Metadata, root: &Path) -> Result<Vec<Finding>> {
    let text = fs::read_to_string(root.join("deny.toml")).context("can't read deny.toml")?;
    let rules: Rules =
        toml::from_str(&text).context("deny.toml has no [licenses] or [sources] as this reads them")?;
    let allowed = licensees(&rules.licenses.allow)?;
    // With a platform as a filter, `packages` still has what only others need.
    let linked: BTreeSet<_> =
        metadata.resolve.iter().flat_map(|resolve| &resolve.nodes).map(|node| &node.id).collect();
    if linked.is_empty() {
        bail!("cargo metadata has told of no packages that are linked");
    }
    let linked = || metadata.packages.iter().filter(|package| linked.contains(&package.id));
    let licences =
        linked().filter(|package| !has_licence(package.license.as_deref(), &allowed)).map(|package| {
            let fault = format!(
                "its licence is not allowed: {}",
                package.license.as_deref().unwrap_or("none is named")
            );
            Finding::new(name(package), fault, "allow it in deny.toml, if the project may be bound by it")
        });
    let sources =
        linked().filter(|package| !has_source(package.source.as_ref(), &rules.sources)).map(|package| {
            let fault =
                format!("it comes from {}", package.source.as_ref().map_or("nowhere", |source| &source.repr));
            Finding::new(name(package), fault, "take it from crates.io")
        });
    Ok(licences.chain(sources).collect())
}

fn name(package: &Package) -> String {
    format!("package {} {}", package.name, package.version)
}

fn licensees(names: &[String]) -> Result<Vec<Licensee>> {
    let parse = |name: &String| {
        Licensee::parse(name)
            .with_context(|| format!("deny.toml allows \"{name}\", which is no licence of SPDX's list"))
    };
    names.iter().map(parse).collect()
}

/// True if the terms of `licence` can be met by allowed licences alone.
fn has_licence(licence: Option<&str>, allowed: &[Licensee]) -> bool {
    let terms = licence.and_then(|licence| Expression::parse_mode(licence, ParseMode::LAX).ok());
    terms
        .is_some_and(|terms| terms.evaluate(|needed| allowed.iter().any(|licence| licence.satisfies(needed))))
}

/// True if a package is one of the workspace, or from an allowed registry.
fn has_source(source: Option<&Source>, allowed: &Sources) -> bool {
    let registry = source.map(|source| source.repr.strip_prefix("registry+"));
    registry.is_none_or(|registry| {
        registry.is_some_and(|url| allowed.allow_registry.iter().any(|known| known == url))
    })
}

/// Dependencies of the workspace's packages that their sources don't name.
fn unused(metadata: &Metadata, files: &[File]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let packages = metadata.workspace_packages();
    let dir_of = |package: &Package| {
        let dir =
            package.manifest_path.parent().and_then(|dir| dir.strip_prefix(&metadata.workspace_root).ok());
        dir.map(|dir| format!("{dir}/")).unwrap_or_default()
    };
    let dirs: Vec<_> = packages.iter().map(|package| dir_of(package)).collect();
    for (package, dir) in packages.iter().zip(&dirs) {
        let is_own = |path: &str| {
            let others = dirs.iter().filter(|other| other.len() > dir.len());
            path.starts_with(dir.as_str())
                && !others.into_iter().any(|other| path.starts_with(other.as_str()))
        };
        let sources: Vec<_> =
            files.iter().filter(|file| file.path.ends_with(".rs") && is_own(&file.path)).collect();
        for dependency in &package.dependencies {
            let name = dependency.rename.as_ref().unwrap_or(&dependency.name);
            let in_code = name_in_code(dependency, metadata);
            let is_excepted =
                USED_UNNAMED.iter().any(|(of, what, _)| *of == package.name.as_str() && *what == name);
            let is_named = sources.iter().any(|file| names(&file.text, &in_code));
            if is_named == is_excepted {
                let (fault, remedy) = if is_named {
                    (
                        format!("{name} is named in the sources, and USED_UNNAMED lists it"),
                        "remove it from USED_UNNAMED",
                    )
                } else {
                    (format!("no source of {} names the dependency {name}", package.name), "remove it")
                };
                findings.push(Finding::new(format!("{dir}Cargo.toml"), fault, remedy));
            }
        }
    }
    findings
}

/// Name by which code calls a dependency: a package's library can have another name than the package.
fn name_in_code(dependency: &Dependency, metadata: &Metadata) -> String {
    let package = metadata.packages.iter().find(|package| package.name.as_str() == dependency.name);
    // `vmfork` is a library for Rust and a static one for C.
    let is_library = |target: &&Target| target.is_lib() || target.is_rlib() || target.is_proc_macro();
    let library = package.and_then(|package| package.targets.iter().find(is_library));
    let own = library.map_or(&dependency.name, |target| &target.name);
    dependency.rename.as_ref().unwrap_or(own).replace('-', "_")
}

/// True if `word` is in a line of code of `text`, as a whole word.
fn names(text: &str, word: &str) -> bool {
    let is_part = |part: char| part.is_alphanumeric() || part == '_';
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.into_iter().any(|line| line.split(|part| !is_part(part)).any(|part| part == word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_read_as_terms() {
        let allowed =
            licensees(&["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned)).unwrap();
        let is_allowed = |licence| has_licence(Some(licence), &allowed);
        assert!(is_allowed("MIT") && is_allowed("MIT/Apache-2.0") && is_allowed("Unlicense OR MIT"));
        assert!(is_allowed("Apache-2.0 WITH LLVM-exception AND MIT"));
        assert!(!is_allowed("GPL-2.0-only") && !is_allowed("MIT AND Unicode-3.0") && !is_allowed("my own"));
        assert!(!has_licence(None, &allowed));
        assert!(licensees(&["my own".to_owned()]).is_err());
    }

    #[test]
    fn packages_come_from_the_workspace_or_an_allowed_registry() {
        let source = |repr: &str| serde_json::from_value::<Source>(repr.into()).unwrap();
        let allowed = Sources { allow_registry: vec!["https://index".to_owned()] };
        assert!(has_source(None, &allowed));
        assert!(has_source(Some(&source("registry+https://index")), &allowed));
        assert!(!has_source(Some(&source("registry+https://other")), &allowed));
        assert!(!has_source(Some(&source("git+https://index")), &allowed));
    }

    #[test]
    fn a_dependency_is_used_where_code_names_it() {
        assert!(names("use serde_json::json;", "serde_json"));
        assert!(!names("use serde_json::json;", "serde"));
        assert!(!names("// serde is for later.", "serde"));
    }
}
