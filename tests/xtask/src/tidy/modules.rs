//! Imports between the top-level modules of a crate, as its tokens have them: `crate::x` and `super::x`,
//! outside comments and tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Pairs of top-level modules, of which the first imports the second, and the first file:line where it does.
pub(super) type Arrows = BTreeMap<(String, String), String>;

/// Reads the modules of the crate whose root is the file `root`; paths are told from `base`.
pub(super) fn arrows(root: &Path, base: &Path) -> Result<Arrows> {
    let mut crate_root = Scan { dir: folder(root), ..Scan::default() };
    crate_root.read(root)?;
    let top: BTreeSet<String> = crate_root.children.iter().map(|child| child.name.clone()).collect();
    let mut arrows = Arrows::new();
    for child in crate_root.children {
        let name = child.name.clone();
        for (to, place) in imports(child, base)? {
            if to != name && top.contains(&to) {
                arrows.entry((name.clone(), to)).or_insert(place);
            }
        }
    }
    Ok(arrows)
}

/// Names from the crate's root that a module and all below it use.
fn imports(module: Child, base: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut waiting = vec![module];
    while let Some(Child { name, dir, path }) = waiting.pop() {
        let mut scan = Scan { path: [path, vec![name.clone()]].concat(), ..Scan::default() };
        let candidates = [dir.join(format!("{name}.rs")), dir.join(&name).join("mod.rs")];
        let file = candidates.iter().find(|file| file.is_file());
        let file =
            file.with_context(|| format!("there is no {}, nor a mod.rs for it", candidates[0].display()))?;
        scan.dir = dir.join(&name);
        scan.read(file)?;
        let shown = file.strip_prefix(base).unwrap_or(file).display();
        found.extend(scan.names.into_iter().map(|(to, line)| (to, format!("{shown}:{line}"))));
        waiting.extend(scan.children);
    }
    Ok(found)
}

fn folder(file: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new(".")).to_owned()
}

/// A module with a file of its own, which its parent declares.
#[derive(Debug)]
struct Child {
    name: String,
    /// Directory in which its file is looked for.
    dir: PathBuf,
    /// Modules above it, from the top.
    path: Vec<String>,
}

/// The scan of one file.
#[derive(Debug, Default)]
struct Scan {
    /// The module that is being read, from the top; empty in the crate's root.
    path: Vec<String>,
    /// Directory of its children's files.
    dir: PathBuf,
    children: Vec<Child>,
    /// Names from the crate's root, with the lines where they are used.
    names: Vec<(String, usize)>,
}

impl Scan {
    fn read(&mut self, file: &Path) -> Result<()> {
        let text = fs::read_to_string(file).with_context(|| format!("can't read {}", file.display()))?;
        let tokens: Result<TokenStream, _> = text.parse();
        // proc-macro2's error says no more than that it is one.
        self.tokens(tokens.map_err(|error| anyhow!("{} is no Rust: {error}", file.display()))?);
        Ok(())
    }

    fn tokens(&mut self, stream: TokenStream) {
        let tokens: Vec<TokenTree> = stream.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            at += match &tokens[at..] {
                [TokenTree::Punct(mark), TokenTree::Group(group), ..]
                    if mark.as_char() == '#' && is_test(group) =>
                {
                    2 + item_length(&tokens[at + 2..])
                }
                [TokenTree::Ident(word), TokenTree::Ident(name), TokenTree::Punct(end), ..]
                    if word == "mod" && end.as_char() == ';' =>
                {
                    self.children.push(self.child(name.to_string()));
                    3
                }
                [TokenTree::Ident(word), TokenTree::Ident(name), TokenTree::Group(body), ..]
                    if word == "mod" =>
                {
                    self.inline(&name.to_string(), body);
                    3
                }
                [TokenTree::Ident(word), rest @ ..] if word == "crate" => 1 + self.root_path(rest, 0),
                [TokenTree::Ident(word), rest @ ..] if word == "super" => 1 + self.root_path(rest, 1),
                [TokenTree::Group(group), ..] => {
                    self.tokens(group.stream());
                    1
                }
                _ => 1,
            };
        }
    }

    fn child(&self, name: String) -> Child {
        Child { name, dir: self.dir.clone(), path: self.path.clone() }
    }

    /// Reads a module whose body stands in this file.
    fn inline(&mut self, name: &str, body: &Group) {
        self.path.push(name.to_owned());
        self.dir.push(name);
        self.tokens(body.stream());
        self.dir.pop();
        self.path.pop();
    }

    /// Notes the names that follow `crate` (`supers` is 0) or `super`, if they are the root's; returns how
    /// many tokens were read.
    fn root_path(&mut self, rest: &[TokenTree], supers: usize) -> usize {
        let mut read = 0;
        let mut supers = supers;
        while let [TokenTree::Punct(first), TokenTree::Punct(second), next, ..] = &rest[read..]
            && first.as_char() == ':'
            && second.as_char() == ':'
        {
            read += 2;
            match next {
                TokenTree::Ident(word) if supers > 0 && word == "super" => {
                    supers += 1;
                    read += 1;
                }
                // A group is read again for what is in it.
                next => {
                    if supers == 0 || supers == self.path.len() {
                        self.names.extend(first_names(next));
                    }
                    break;
                }
            }
        }
        read
    }
}

/// First names of a path, or of all paths in a group of them, with their lines.
fn first_names(token: &TokenTree) -> Vec<(String, usize)> {
    match token {
        TokenTree::Ident(name) => vec![(name.to_string(), name.span().start().line)],
        TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
            let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
            let paths =
                tokens.split(|token| matches!(token, TokenTree::Punct(mark) if mark.as_char() == ','));
            paths.filter_map(<[TokenTree]>::first).flat_map(first_names).collect()
        }
        _ => Vec::new(),
    }
}

/// True if an attribute is `cfg(test)`, or `cfg(all(test, ...))`.
fn is_test(attribute: &Group) -> bool {
    fn words(stream: TokenStream) -> Vec<String> {
        let words = |token| match token {
            TokenTree::Ident(word) => vec![word.to_string()],
            TokenTree::Group(group) => words(group.stream()),
            _ => Vec::new(),
        };
        stream.into_iter().flat_map(words).collect()
    }
    let words = words(attribute.stream());
    let has = |wanted: &str| words.iter().any(|word| word == wanted);
    words.first().is_some_and(|word| word == "cfg") && has("test") && !has("not")
}

/// Number of tokens of an item: up to its body or semicolon.
fn item_length(tokens: &[TokenTree]) -> usize {
    let ends = |token: &TokenTree| match token {
        TokenTree::Punct(mark) => mark.as_char() == ';',
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        _ => false,
    };
    tokens.iter().position(ends).map_or(tokens.len(), |last| last + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(path: &[&str], text: &str) -> Scan {
        let mut scan = Scan { path: path.iter().map(|&name| name.to_owned()).collect(), ..Scan::default() };
        scan.tokens(text.parse().unwrap());
        scan
    }

    fn names(scan: &Scan) -> Vec<(&str, usize)> {
        scan.names.iter().map(|(name, line)| (name.as_str(), *line)).collect()
    }

    #[test]
    fn names_of_the_root_are_found_in_imports_paths_and_macros() {
        let text = "
use crate::alpha::{Alpha, beta};
use crate::{
    gamma::Gamma,
    delta,
};
fn f() -> crate::epsilon::E { println!(\"{}\", crate::zeta::Z) }
use std::eta;
";
        let expected = [("alpha", 2), ("gamma", 4), ("delta", 5), ("epsilon", 7), ("zeta", 7)];
        assert_eq!(names(&scan(&["x"], text)), expected);
    }

    #[test]
    fn super_is_the_root_from_a_top_level_module_alone() {
        let text = "use super::alpha; pub(super) fn f() {} \
                    mod inner { use super::super::{beta, gamma}; use super::f; }";
        assert_eq!(names(&scan(&["x"], text)), [("alpha", 1), ("beta", 1), ("gamma", 1)]);
        assert_eq!(names(&scan(&["x", "y"], "use super::a; use super::super::b;")), [("b", 1)]);
        assert_eq!(names(&scan(&[], "mod a; use self::a::A;")), []);
    }

    #[test]
    fn comments_and_tests_have_no_imports() {
        let text = "
// use crate::comment;
/// See crate::doc::Comment.
fn f() {}
#[cfg(test)]
use crate::single::{A, B};
#[cfg(all(test, target_os = \"linux\"))]
mod tests { use crate::tested; }
#[cfg(test)]
#[path = \"a_test.rs\"]
mod other;
#[cfg(not(test))]
use crate::real;
mod child;
";
        let scan = scan(&["x"], text);
        assert_eq!(names(&scan), [("real", 13)]);
        assert_eq!(scan.children.iter().map(|child| child.name.as_str()).collect::<Vec<_>>(), ["child"]);
    }

    #[test]
    fn arrows_are_between_top_level_modules() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("src/lib.rs", "mod a;\nmod b;\npub use a::A;\n");
        write("src/a.rs", "mod deep;\nuse crate::Error;\n");
        write("src/a/deep.rs", "\nuse crate::b::B;\nuse super::A;\n");
        write("src/b/mod.rs", "use super::a;\nuse super::a::A;\n");
        let arrows = arrows(&dir.path().join("src/lib.rs"), dir.path()).unwrap();
        let arrow = |from: &str, to: &str, place: &str| ((from.to_owned(), to.to_owned()), place.to_owned());
        assert_eq!(
            arrows,
            Arrows::from([arrow("a", "b", "src/a/deep.rs:2"), arrow("b", "a", "src/b/mod.rs:1")])
        );
        write("src/b/mod.rs", "mod lost;");
        assert!(super::arrows(&dir.path().join("src/lib.rs"), dir.path()).is_err());
    }
}
