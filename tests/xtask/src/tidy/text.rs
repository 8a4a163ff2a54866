//! Checks of a file's text alone: columns, lengths, names.

use std::path::Path;

use super::rules::{COLUMNS, FILE_LINES, ONE_USER, OTHER_COLUMNS, README_LINES, README_WORDS, TOP_LEVEL};
use super::{File, Finding};

/// All places in `files` that break a rule.
pub(super) fn check(files: &[File]) -> Vec<Finding> {
    let mut findings: Vec<_> = files.iter().flat_map(columns).collect();
    findings.extend(files.iter().filter_map(length));
    findings.extend(files.iter().filter(|file| file.path == "README.md").flat_map(readme));
    findings.extend(top_level(files));
    findings.extend(ONE_USER.iter().flat_map(|package| one_user(package, files)));
    findings
}

/// Lines that are too wide.
fn columns(file: &File) -> Vec<Finding> {
    if !has_columns(file) {
        return Vec::new();
    }
    let other = OTHER_COLUMNS.iter().find(|(dir, _)| file.path.starts_with(dir));
    let limit = other.map_or(COLUMNS, |(_, limit)| *limit);
    let widths = file.text.lines().map(|line| line.chars().count()).enumerate();
    let too_wide = widths.filter(|(_, width)| *width > limit);
    let remedy = format!("wrap it at {COLUMNS}");
    let finding = |(index, width)| {
        let place = format!("{}:{}", file.path, index + 1);
        Finding::new(place, format!("the line has {width} columns, more than {limit}"), &remedy)
    };
    too_wide.map(finding).collect()
}

/// True if a file is Rust, TOML or shell.
fn has_columns(file: &File) -> bool {
    let is_script =
        file.text.lines().next().is_some_and(|line| line.starts_with("#!") && line.ends_with("sh"));
    let extension = Path::new(&file.path).extension().and_then(|extension| extension.to_str());
    is_script || matches!(extension, Some("rs" | "toml" | "sh"))
}

fn length(file: &File) -> Option<Finding> {
    let lines = file.text.lines().count();
    let is_too_long = has_extension(file, "rs") && lines > FILE_LINES;
    let fault = format!("the file has {lines} lines, more than {FILE_LINES}");
    is_too_long.then(|| Finding::new(&file.path, fault, "split it by subject"))
}

fn has_extension(file: &File, wanted: &str) -> bool {
    Path::new(&file.path).extension().is_some_and(|extension| extension == wanted)
}

fn readme(file: &File) -> Vec<Finding> {
    let counts = [
        (file.text.split_whitespace().count(), README_WORDS, "words"),
        (file.text.lines().count(), README_LINES, "lines"),
    ];
    let too_many = counts.into_iter().filter(|(count, limit, _)| count > limit);
    let finding = |(count, limit, unit)| {
        let fault = format!("the README has {count} {unit}, more than {limit}");
        Finding::new(&file.path, fault, "move details to docs/")
    };
    too_many.map(finding).collect()
}

/// Entries of the top level that should not be there.
fn top_level(files: &[File]) -> Vec<Finding> {
    let mut names: Vec<_> = files.iter().filter_map(|file| file.path.split('/').next()).collect();
    names.dedup();
    let others = names.into_iter().filter(|name| !TOP_LEVEL.contains(name));
    let fault = "the repository's top level has no such entry";
    let finding = |name| Finding::new(name, fault, "move it into a directory, or add it to TOP_LEVEL");
    others.map(finding).collect()
}

/// Files that use `package`, if there are several.
fn one_user(package: &str, files: &[File]) -> Vec<Finding> {
    let path = format!("{package}::");
    let line_of = |file: &File| {
        let mut lines = file.text.lines().enumerate();
        let (index, _) =
            lines.find(|(_, line)| !line.trim_start().starts_with("//") && line.contains(&path))?;
        Some(format!("{}:{}", file.path, index + 1))
    };
    let sources = files.iter().filter(|file| has_extension(file, "rs"));
    let users: Vec<_> = sources.filter_map(line_of).collect();
    if users.len() < 2 {
        return Vec::new();
    }
    let fault = format!("{package} is used by {} files, and may be by one alone", users.len());
    let finding = |place| Finding::new(place, &fault, "have the others call that one");
    users.into_iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: impl Into<String>) -> File {
        File { path: path.into(), text: text.into() }
    }

    fn places(findings: &[Finding]) -> Vec<&str> {
        findings.iter().map(|finding| finding.place.as_str()).collect()
    }

    #[test]
    fn columns_are_counted_in_rust_toml_and_shell() {
        let wide = format!("short\n{}\n{}\n", "ä".repeat(COLUMNS), "b".repeat(COLUMNS + 1));
        for path in ["tests/a.rs", "Cargo.toml", "initramfs/a.sh"] {
            assert_eq!(places(&columns(&file(path, &*wide))), [format!("{path}:3")]);
        }
        assert_eq!(places(&columns(&file("run", format!("#!/bin/sh\n{wide}")))), ["run:4"]);
        assert!(columns(&file("docs/a.md", &*wide)).is_empty());
        assert!(columns(&file("host-vmm/src/a.rs", &*wide)).is_empty());
    }

    #[test]
    fn long_files_of_rust_fail() {
        assert!(length(&file("a.rs", "\n".repeat(FILE_LINES))).is_none());
        assert!(length(&file("a.rs", "\n".repeat(FILE_LINES + 1))).is_some());
        assert!(length(&file("a.md", "\n".repeat(FILE_LINES + 1))).is_none());
    }

    #[test]
    fn the_readme_has_few_words_and_lines() {
        assert!(readme(&file("README.md", "a ".repeat(README_WORDS))).is_empty());
        assert_eq!(readme(&file("README.md", "a ".repeat(README_WORDS + 1))).len(), 1);
        assert_eq!(readme(&file("README.md", "a\n".repeat(README_WORDS + 1))).len(), 2);
    }

    #[test]
    fn the_top_level_has_known_entries_alone() {
        let files =
            [file("README.md", ""), file("notes/a.md", ""), file("notes/b.md", ""), file("tests/a.rs", "")];
        assert_eq!(places(&top_level(&files)), ["notes"]);
    }

    #[test]
    fn a_package_with_one_user_gets_no_second_one() {
        let first = || file("a.rs", "use packer::config;\npacker::config();");
        let comment = file("b.rs", "// packer::config is not for this.");
        assert!(one_user("packer", &[first(), comment]).is_empty());
        let second = file("b.rs", "\nlet bytes = packer::encode();");
        assert_eq!(places(&one_user("packer", &[first(), second])), ["a.rs:1", "b.rs:2"]);
    }
}
