//! `cargo xtask tidy`: style as a test. Each check compares the repository with a table of [`rules`], reads
//! sources alone, and builds nothing: all of them take seconds.

mod circles;
mod crates;
mod docs;
mod modules;
mod rules;
mod supply;
mod text;

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cargo::{self, Workspace};
use crate::steps::Steps;

pub(crate) use self::supply::check as check_supply;

/// A place that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// File, or file:line, from the repository's root.
    place: String,
    fault: String,
    remedy: String,
}

/// A file of the repository.
#[derive(Debug)]
struct File {
    /// Path from the repository's root.
    path: String,
    text: String,
}

/// Runs all checks; the exit code is 1 where a rule is broken.
pub(crate) fn command(steps: &mut Steps) -> Result<u8> {
    let workspace = Workspace::find()?;
    steps.part("tidy", || check(&workspace));
    steps.part("supply", || check_supply(&workspace));
    Ok(steps.exit_code(false))
}

/// Prints each place that breaks a rule of style, and fails if there is one.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let files = files(&workspace.root)?;
    let metadata = cargo::metadata(&["--no-deps"])?;
    let mut findings = text::check(&files);
    findings.extend(crates::check(&metadata)?);
    findings.extend(circles::check(&metadata, &workspace.root)?);
    docs::report(&files, &workspace.root);
    toolchain(&workspace.root)?;
    conclude(findings)
}

/// Prints `findings`, and fails if there is one.
fn conclude(mut findings: Vec<Finding>) -> Result<()> {
    findings.sort();
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} places break a rule; tests/xtask/src/tidy/rules.rs has all rules", findings.len());
    }
    Ok(())
}

/// Files that are in the repository, or are not ignored and so will be.
fn files(root: &Path) -> Result<Vec<File>> {
    let list = git(root, &["ls-files", "--cached", "--others", "--exclude-standard"])?;
    let mut paths: Vec<_> = list.lines().filter(|path| root.join(path).is_file()).collect();
    paths.sort_unstable();
    paths.dedup();
    let read = |path: &str| {
        let bytes = fs::read(root.join(path)).with_context(|| format!("can't read {path}"))?;
        Ok(File { path: path.to_owned(), text: String::from_utf8_lossy(&bytes).into_owned() })
    };
    paths.into_iter().map(read).collect()
}

/// Output of git.
fn git(root: &Path, arguments: &[&str]) -> Result<String> {
    let line = format!("git {}", arguments.join(" "));
    let output = Command::new("git").current_dir(root).args(arguments).output();
    let output = output.with_context(|| format!("can't run `{line}`: install git"))?;
    if !output.status.success() {
        bail!("`{line}` failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Prints a line if another version of Rust is at work than the one that rust-toolchain.toml names: then
/// lints that fail may be new ones.
fn toolchain(root: &Path) -> Result<()> {
    const FILE: &str = "rust-toolchain.toml";
    let text = fs::read_to_string(root.join(FILE)).with_context(|| format!("can't read {FILE}"))?;
    let table: toml::Table = text.parse().with_context(|| format!("{FILE} is no TOML"))?;
    let named = table.get("tested").and_then(|tested| tested.get("version")).and_then(toml::Value::as_str);
    let named = named.with_context(|| format!("{FILE} names no version: it needs `version` in [tested]"))?;
    let output = Command::new("rustc").arg("--version").output().context("can't run rustc")?;
    let own = String::from_utf8_lossy(&output.stdout);
    let own = own.split_whitespace().nth(1).unwrap_or_default();
    if own != named {
        eprintln!("xtask: this is Rust {own}; {FILE} names {named}: other lints and formats may hold here");
    }
    Ok(())
}

impl Finding {
    fn new(place: impl Into<String>, fault: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { place: place.into(), fault: fault.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.place, self.fault, self.remedy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_names_place_fault_and_remedy() {
        let finding = Finding::new("a/b.rs:3", "it has 120 columns", "break it at 110");
        assert_eq!(finding.to_string(), "a/b.rs:3: it has 120 columns: break it at 110");
        assert!(conclude(vec![finding]).is_err());
        assert!(conclude(Vec::new()).is_ok());
    }
}
