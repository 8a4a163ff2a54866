//! Doc comments that begin without their subject: a count to bring down, no failure.

use std::path::Path;

use anyhow::Result;

use super::rules::HEADLESS;
use super::{File, git};

/// Branches from which work sets out, best first.
const BASES: [&str; 2] = ["origin/main", "main"];

/// Prints how many doc comments begin without their subject, in files touched since the merge base with the
/// main branch; in all files where nothing was touched, or there is no main branch.
pub(super) fn report(files: &[File], root: &Path) {
    let touched = BASES.iter().find_map(|base| touched(root, base).ok()).unwrap_or_default();
    let (looked_at, of): (Vec<_>, _) = if touched.is_empty() {
        (files.iter().collect(), "all files")
    } else {
        (files.iter().filter(|file| touched.contains(&file.path)).collect(), "files touched on this branch")
    };
    let sources = looked_at.iter().filter(|file| file.path.ends_with(".rs"));
    let counts: Vec<_> = sources.map(|file| headless(&file.text)).filter(|count| *count > 0).collect();
    let count = counts.iter().sum::<usize>();
    eprintln!("xtask: {count} doc comments begin without their subject, in {} of {of}", counts.len());
}

/// Files that differ from the last commit in common with `base`.
fn touched(root: &Path, base: &str) -> Result<Vec<String>> {
    let common = git(root, &["merge-base", "HEAD", base])?;
    let changed = git(root, &["diff", "--name-only", common.trim()])?;
    Ok(changed.lines().map(str::to_owned).collect())
}

/// Number of doc comments in `text` that begin with one of [`HEADLESS`].
fn headless(text: &str) -> usize {
    let mut before = None;
    let mut count = 0;
    for line in text.lines() {
        let doc = ["///", "//!"].iter().find_map(|mark| Some((*mark, line.trim_start().strip_prefix(mark)?)));
        let begins = doc.is_some() && doc.map(|(mark, _)| mark) != before;
        before = doc.map(|(mark, _)| mark);
        count += usize::from(begins && doc.is_some_and(|(_, words)| is_headless(words.trim_start())));
    }
    count
}

fn is_headless(words: &str) -> bool {
    let follows = |rest: &str| !rest.starts_with(|next: char| next.is_alphanumeric() || next == '-');
    HEADLESS.iter().any(|head| words.strip_prefix(head).is_some_and(follows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_without_their_subject_are_counted() {
        let text = "\
//! What this is.
//! It goes on.

/// How many there are.
/// Where they are.
fn a() {}
/// Number of things.
/// What they do.
fn b() {}
    /// Itself a noun.
    fn c() {}
// What is no doc comment.
";
        assert_eq!(headless(text), 2);
    }

    #[test]
    fn a_word_counts_as_a_whole() {
        assert!(is_headless("Its name.") && is_headless("Whether: it is.") && is_headless("The same."));
        assert!(!is_headless("Items.") && !is_headless("In-memory file.") && !is_headless("The sameness."));
    }
}
