//! Tables of text.

use indicatif::BinaryBytes;

/// Whether a column holds words, which stand to the left, or numbers, which stand to the right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Column {
    Words,
    Numbers,
}

/// A table: its head, and its rows, with columns that line up.
pub(super) fn table<const N: usize>(head: [(&str, Column); N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(head.map(|(title, _)| title.to_owned())).chain(rows).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
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
}
