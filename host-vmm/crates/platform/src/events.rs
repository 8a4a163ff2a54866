//! What happens on a platform, as JSON lines for a script to read.

use std::{fs::File, io, sync::Mutex, time::Duration};

use base::{
    clock::monotonic_ns,
    output::{Kind, Output, Unit, Way},
    sync::lock,
};
use node::wire::Report;
use serde::Serialize;
use types::{ExitReason, StepTiming, VmIdentity};
use uuid::Uuid;

/// Bytes of events that wait to be written: those of some hundred forks at once, with all that their copies
/// print.
const WAITING_BYTES: usize = 16 << 20;

/// Something that happened.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub(super) enum Event<'a> {
    /// A VM is about to run.
    Started {
        #[serde(flatten)]
        vm: &'a VmIdentity,
        /// Process of its node.
        pid: u32,
    },
    /// A VM was forked, or was not though somebody has asked for it.
    Forked {
        parent: &'a VmIdentity,
        #[serde(flatten)]
        report: &'a Report,
    },
    /// A copy has come to its first exit.
    Launched {
        #[serde(flatten)]
        vm: &'a VmIdentity,
        seq: u64,
        /// Its side of the fork.
        steps: &'a [StepTiming],
    },
    /// A copy runs on another platform.
    Sent { id: Uuid, name: &'a str, platform: &'a str, seq: u64 },
    /// A VM wrote a line to its console.
    Console { name: &'a str, line: &'a str },
    /// A VM has ended; `how` is null where its node died.
    Ended {
        #[serde(flatten)]
        vm: &'a VmIdentity,
        how: Option<&'a ExitReason>,
    },
    /// Events are missing at this place: the file did not take them.
    Missing { count: u64 },
}

/// Where events go.
#[derive(Debug)]
pub(super) struct Events {
    /// Locked until a line is in its place, so that times only grow from line to line.
    output: Option<Mutex<Output>>,
}

#[derive(Serialize)]
struct Line<'a> {
    /// CLOCK_MONOTONIC of this host, in nanoseconds.
    t_ns: u64,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

impl Line<'_> {
    fn of(event: &Event<'_>) -> serde_json::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(&Line { t_ns: monotonic_ns(), event })?;
        line.push(b'\n');
        Ok(line)
    }
}

/// The note in the place of events.
fn are_missing(count: u64) -> Vec<u8> {
    Line::of(&Event::Missing { count }).unwrap_or_default()
}

impl Events {
    /// Events into a file, or nowhere.
    ///
    /// # Errors
    /// Where there is no thread that writes them.
    pub(super) fn new(file: Option<File>) -> io::Result<Self> {
        let kind = Kind {
            name: "the file for events",
            capacity: WAITING_BYTES,
            unit: Unit::Messages,
            note: are_missing,
            way: Way::Direct,
        };
        let output = file.map(|file| Output::new(file, kind)).transpose()?;
        Ok(Self { output: output.map(Mutex::new) })
    }

    /// Writes an event with the present time. It waits for no reader.
    pub(super) fn write(&self, event: &Event<'_>) {
        let Some(output) = &self.output else { return };
        let output = lock(output);
        match Line::of(event) {
            Ok(line) => output.push(&line),
            Err(error) => tracing::warn!(%error, "an event is lost"),
        }
    }

    /// Waits until all of them are written, for so long at most.
    pub(super) fn flush(&self, limit: Duration) {
        if let Some(output) = &self.output {
            lock(output).flush(limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, pipe};

    use super::*;

    #[test]
    fn whoever_reads_late_gets_whole_lines_and_is_told_what_is_missing() {
        let (reader, writer) = pipe().unwrap();
        let events = Events::new(Some(File::from(std::os::fd::OwnedFd::from(writer)))).unwrap();
        let line = "x".repeat(4000);
        let written = 2 * WAITING_BYTES / line.len();
        for _ in 0..written {
            events.write(&Event::Console { name: "vm", line: &line });
        }
        drop(events);
        let lines = BufReader::new(reader).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap());
        let lines: Vec<serde_json::Value> = lines.collect();
        assert!(lines.is_sorted_by_key(|line| line["t_ns"].as_u64().unwrap()));
        let found = lines.iter().filter(|line| line["event"] == "console").count();
        let missing: u64 = lines.iter().filter_map(|line| line["count"].as_u64()).sum();
        assert!(lines.len() > found && missing > 0);
        assert_eq!(found as u64 + missing, written as u64);
    }
}
