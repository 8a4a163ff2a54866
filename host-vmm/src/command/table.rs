//! Tables and JSON, as commands print them. A platform that was taken over may send anything to be printed.

use base::text::Reason;
use indicatif::BinaryBytes;
use serde::Serialize;

/// Whether a column holds words, which stand to the left, or numbers, which stand to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    Words,
    Numbers,
}

/// A value as JSON, in a line.
///
/// # Errors
/// Where it can't be put into JSON.
pub(super) fn json(value: &impl Serialize) -> serde_json::Result<String> {
    Ok(in_ascii(&serde_json::to_string(value)?))
}

/// A value as JSON, with a line for each field.
///
/// # Errors
/// As [`json`].
pub(super) fn json_lines(value: &impl Serialize) -> serde_json::Result<String> {
    Ok(in_ascii(&serde_json::to_string_pretty(value)?))
}

/// The same JSON in ASCII, in which no terminal finds control characters. Beyond ASCII, JSON has strings
/// alone.
fn in_ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for character in json.chars() {
        match character {
            '\x7f'.. => {
                let mut units = [0; 2];
                let escaped = character.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}"));
                ascii.extend(escaped);
            }
            _ => ascii.push(character),
        }
    }
    ascii
}

/// A table: its head, and its rows, with columns that line up.
pub(super) fn table<const N: usize>(
    head: [(&str, Column); N],
    rows: impl Iterator<Item = [String; N]>,
) -> String {
    let rows: Vec<[String; N]> =
        std::iter::once(head.map(|(title, _)| title.to_owned())).chain(rows.map(shown)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            match head[column].1 {
                Column::Words => format!("{cell:<width$}"),
                Column::Numbers => format!("{cell:>width$}"),
            }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn shown<const N: usize>(row: [String; N]) -> [String; N] {
    row.map(|cell| Reason::from(cell).into())
}

/// A size for people.
pub(super) fn size(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [["vm", "5"], ["a-longer-name", "12345"]].map(|row| row.map(str::to_owned));
        let text = table([("NAME", Column::Words), ("PID", Column::Numbers)], rows.into_iter());
        assert_eq!(text, "NAME             PID\nvm                 5\na-longer-name  12345\n");
    }

    #[test]
    fn nothing_that_is_printed_is_an_order_for_a_terminal() {
        let hostile = "\x1b]2;x\x07\u{9b}2J\u{202e}\n€😀\x7f\"";
        let rows = [[hostile.to_owned(), "é".to_owned()], ["a".to_owned(), "b".to_owned()]];
        let text = table([("A", Column::Words), ("B", Column::Words)], rows.into_iter());
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(
            text.lines()
                .all(|line| !line.chars().any(|character| character.is_control() || character == '\u{202e}'))
        );
        for json in [json(&[hostile]).unwrap(), json_lines(&[hostile]).unwrap()] {
            assert!(json.bytes().all(|byte| matches!(byte, b'\n' | b' '..=b'~')), "{json}");
            assert_eq!(serde_json::from_str::<[String; 1]>(&json).unwrap(), [hostile]);
        }
    }
}
