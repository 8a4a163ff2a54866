use std::{
    io::{Read, pipe},
    os::fd::OwnedFd,
};

use super::*;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn kind(capacity: usize, unit: Unit) -> Kind {
    Kind {
        name: "test output",
        capacity,
        unit,
        note: |count| format!("<{count}>\n").into_bytes(),
        way: Way::Background,
    }
}

fn file(writer: io::PipeWriter) -> File {
    File::from(OwnedFd::from(writer))
}

#[test]
fn who_writes_never_waits_and_what_is_left_out_is_told_where_it_was() {
    let (mut reader, writer) = pipe().unwrap();
    // More than a pipe holds, and many times as much comes.
    let output = Output::new(file(writer), kind(100_000, Unit::Messages)).unwrap();
    for number in 0..100_000 {
        output.push(format!("line {number}\n").as_bytes());
    }
    assert!(!output.flush(Duration::from_millis(10)), "nobody reads");
    let mut first = [0; 7];
    reader.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"line 0\n");
    let reads = thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text).unwrap()
    });
    assert!(output.flush(LONG));
    output.push(b"the end\n");
    drop(output);
    let text = reads.join().unwrap();
    let (mut next, mut lost) = (1u64, 0u64);
    for line in text.lines() {
        if let Some(number) = line.strip_prefix("line ") {
            assert_eq!(number.parse(), Ok(next), "each is whole, in order, and the gaps are told");
            next += 1;
        } else if let Some(count) = line.strip_prefix('<') {
            let count: u64 = count.trim_end_matches('>').parse().unwrap();
            (next, lost) = (next + count, lost + count);
        }
    }
    assert_eq!(next, 100_000);
    assert!(lost > 50_000, "{lost}");
    assert!(text.ends_with("the end\n"));
}

#[test]
fn bytes_are_counted_where_lines_are_none() {
    let (mut reader, writer) = pipe().unwrap();
    let output = Output::new(file(writer), kind(4, Unit::Bytes)).unwrap();
    output.push(b"abc");
    assert!(output.flush(LONG));
    output.push(b"more than fits");
    assert!(output.flush(LONG), "the note of it");
    drop(output);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "abc<14>\n");
}

#[test]
fn where_writes_fail_nobody_waits_for_them() {
    let (reader, writer) = pipe().unwrap();
    let output = Output::new(file(writer), kind(100, Unit::Messages)).unwrap();
    drop(reader);
    for _ in 0..1000 {
        output.push(b"nobody will ever read this\n");
    }
    let begun = Instant::now();
    assert!(!output.flush(LONG));
    assert!(begun.elapsed() < LONG);
    let full = Output::new(File::options().write(true).open("/dev/full").unwrap(), kind(100, Unit::Messages))
        .unwrap();
    full.push(b"x");
    assert!(!full.flush(LONG));
}

#[test]
fn what_is_written_directly_is_there_at_once_and_waits_for_nobody() {
    let (mut reader, writer) = pipe().unwrap();
    let output =
        Output::new(file(writer), Kind { way: Way::Direct, ..kind(100_000, Unit::Messages) }).unwrap();
    output.push(b"first\n");
    assert!(lock(&output.0.state).is_done(), "it is written, whatever becomes of this process");
    for _ in 0..100_000 {
        output.push(b"more than a pipe holds\n");
    }
    assert!(!lock(&output.0.state).is_done());
    let reads = thread::spawn(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).map(|_| text).unwrap()
    });
    assert!(output.flush(LONG));
    output.push(b"last\n");
    drop(output);
    let text = reads.join().unwrap();
    assert!(text.starts_with("first\nmore than") && text.ends_with("last\n"));
    let lines = text.lines().filter(|line| *line == "more than a pipe holds").count() as u64;
    let count = |line: &str| line.strip_prefix('<')?.strip_suffix('>')?.parse::<u64>().ok();
    assert_eq!(lines + text.lines().filter_map(count).sum::<u64>(), 100_000);
}

#[test]
fn a_file_that_is_opened_not_to_wait_gets_all() {
    let (mut reader, writer) = pipe().unwrap();
    rustix::fs::fcntl_setfl(&writer, rustix::fs::OFlags::NONBLOCK).unwrap();
    let output = Output::new(file(writer), kind(1 << 20, Unit::Bytes)).unwrap();
    let all = vec![b'x'; 1 << 19];
    output.push(&all);
    drop(output);
    let mut found = Vec::new();
    reader.read_to_end(&mut found).unwrap();
    assert!(found == all);
}
