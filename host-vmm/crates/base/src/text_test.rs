use proptest::prelude::*;

use super::*;

/// Room for a few characters.
type Short = Text<16>;

/// Whether a terminal shows a character as it is: no control (C0, DEL, C1), no format character.
fn is_harmless(character: char) -> bool {
    !character.is_control()
        && !matches!(character, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
        && !matches!(character, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}')
        && !matches!(character, '\u{e0000}'..='\u{e007f}')
}

#[test]
fn what_can_disturb_a_terminal_is_escaped() {
    for (text, shown) in [
        ("a reason: \"x\" isn't C:\\y", "a reason: \"x\" isn't C:\\y"),
        ("für 5 €", "für 5 €"),
        ("\x1b]52;c;eA==\x07", "\\u{1b}]52;c;eA==\\u{7}"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\u{9b}2J\u{7f}", "\\u{9b}2J\\u{7f}"),
        ("\u{202e}txt\u{2066}\u{200b}", "\\u{202e}txt\\u{2066}\\u{200b}"),
    ] {
        assert_eq!(Reason::from(text).as_str(), shown);
    }
    assert_eq!(lines("a\n\tb\n\x1bc"), "a\n\\tb\n\\u{1b}c");
}

#[test]
fn what_is_too_long_is_cut_between_characters() {
    for (text, shown) in [
        ("0123456789abcdef", "0123456789abcdef"),
        ("0123456789abcdefg", "0123456789abc…"),
        ("ääääääääx", "ääääää…"),
        ("0123456789\x1b", "0123456789\\u{1b}"),
        ("01234567890\x1b", "01234567890…"),
    ] {
        assert_eq!(Short::from(text).as_str(), shown);
    }
    assert_eq!(format!("{:>4}|{:<4}|", Short::from("a"), Short::from("b")), "   a|b   |");
    assert_eq!(Reason::of("x".repeat(64 << 20)).len(), 4096);
}

#[test]
fn an_error_has_its_causes_and_a_broken_display_is_cut() {
    #[derive(Debug, thiserror::Error)]
    #[error("can't {0}")]
    struct Failed(&'static str, #[source] std::num::ParseIntError);
    let cause = "x".parse::<u8>().unwrap_err();
    let reason = Reason::of_error(&Failed("count", cause));
    assert_eq!(reason.as_str(), "can't count: invalid digit found in string");

    struct Broken;
    impl Display for Broken {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("0123456789abcdef")?;
            Err(fmt::Error)
        }
    }
    assert_eq!(Short::of(Broken).as_str(), "0123456789abc…");
}

proptest! {
    #[test]
    fn any_text_is_short_and_harmless_and_stays_what_it_is(text in "\\PC*|.{0,40}|\\p{Any}{0,300}") {
        let shown = Short::from(text.as_str());
        prop_assert!(shown.len() <= 16 && shown.chars().all(is_harmless), "{:?}", shown);
        prop_assert_eq!(&Short::from(shown.as_str()), &shown);
        let reason = Reason::from(text);
        prop_assert!(reason.len() <= 4096 && reason.chars().all(is_harmless));
        prop_assert_eq!(&Reason::from(reason.as_str()), &reason);
    }

    #[test]
    fn whoever_reads_a_text_cuts_it_too(text in "\\p{Any}{0,300}") {
        let shown = Short::from(text.as_str());
        let json = serde_json::to_string(&text).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Short>(&json).unwrap(), &shown);
        let sent = serde_json::to_string(&shown).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Short>(&sent).unwrap(), &shown);
    }
}
