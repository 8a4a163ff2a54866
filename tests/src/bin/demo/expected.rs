//! The right answers, worked out from the same texts without a database.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde_json::{Value, json};

/// The words of each text, in order, by the text's name.
pub(crate) type Texts = BTreeMap<String, Vec<String>>;

/// Reads all texts of a folder.
pub(crate) fn read_texts(folder: &Path) -> io::Result<Texts> {
    let mut texts = Texts::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            texts.insert(entry.file_name().to_string_lossy().into_owned(), words(&fs::read(entry.path())?));
        }
    }
    Ok(texts)
}

/// The words: runs of the letters a to z, in lower case.
fn words(text: &[u8]) -> Vec<String> {
    let pieces = text.split(|byte| !byte.is_ascii_alphabetic()).filter(|piece| !piece.is_empty());
    pieces.map(|piece| String::from_utf8_lossy(piece).to_ascii_lowercase()).collect()
}

/// The phrases that children complete, by their index, counted round.
const PHRASES: [&str; 4] = ["you may not", "source", "the terms", "under the terms of"];

/// What the child with this index must answer: the phrase that it completes, and the words that follow it.
pub(crate) fn answer(texts: &Texts, index: u64) -> Value {
    let phrase = PHRASES[usize::from(index.to_le_bytes()[0] % 4)];
    let wanted: Vec<&str> = phrase.split(' ').collect();
    let next = texts.values().flat_map(|words| {
        let places = words.windows(wanted.len() + 1);
        places
            .filter(|place| place.iter().zip(&wanted).all(|(word, wanted)| word == wanted))
            .filter_map(|place| place.last())
    });
    json!({ "index": index, "phrase": phrase, "next": top(next.map(String::as_str)) })
}

/// The five most frequent, most frequent first, then by name.
fn top<'a>(items: impl Iterator<Item = &'a str>) -> Value {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for item in items {
        *counts.entry(item).or_default() += 1;
    }
    let mut counts: Vec<(&str, u64)> = counts.into_iter().collect();
    counts.sort_by_key(|(item, count)| (std::cmp::Reverse(*count), *item));
    counts.truncate(5);
    json!(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_come_in_order() {
        let texts = Texts::from([
            ("A".to_owned(), words(b"Source code, source\nand source CODE; the terms")),
            ("B".to_owned(), words(b"source")),
        ]);
        assert_eq!(answer(&texts, 1)["next"], json!([["code", 2], ["and", 1]]));
        assert_eq!(answer(&texts, 2), json!({ "index": 2, "phrase": "the terms", "next": [] }));
    }
}
