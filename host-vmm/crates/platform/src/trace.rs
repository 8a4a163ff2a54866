//! The timeline of forks as a trace that Perfetto's viewer (ui.perfetto.dev) and Chrome's open: the Trace
//! Event Format, as a JSON array.
//!
//! Each VM is a process of the trace, by the number of its node's process. Times are CLOCK_MONOTONIC of this
//! host, so that a parent and its children stand on one line of time.

use std::{fs::File, time::Duration};

use base::{
    clock::monotonic_ns,
    output::{Kind, Output, Unit, Way},
};
use serde::Serialize;
use types::StepTiming;

use super::Error;

/// Bytes of the trace that wait to be written: those of some thousand forks.
const WAITING_BYTES: usize = 4 << 20;

/// Where the trace goes.
#[derive(Debug)]
pub(super) struct Trace {
    output: Option<Output>,
}

/// An entry of the trace.
#[derive(Debug, Serialize)]
#[serde(tag = "ph")]
enum Entry<'a> {
    /// Something that took a while.
    #[serde(rename = "X")]
    Slice { name: &'a str, cat: &'a str, ts: f64, dur: f64, pid: u32, tid: u32, args: Arguments },
    /// What a process is called.
    #[serde(rename = "M")]
    Name { name: &'a str, pid: u32, args: Named<'a> },
    /// Sides of forks that are missing: the file did not take them.
    #[serde(rename = "i")]
    Missing { name: &'a str, ts: f64, pid: u32, tid: u32, s: &'a str, args: Count },
}

/// How many something is told of.
#[derive(Debug, Clone, Copy, Serialize)]
struct Count {
    count: u64,
}

/// What is told of a slice.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Arguments {
    /// Number of the guest's request.
    pub(super) seq: u64,
    /// Error code of the fork; 0 where it was made.
    pub(super) code: u32,
}

#[derive(Debug, Serialize)]
struct Named<'a> {
    name: &'a str,
}

impl Trace {
    /// A trace into a file, or nowhere.
    pub(super) fn new(file: Option<File>) -> Result<Self, Error> {
        let Some(file) = file else { return Ok(Self { output: None }) };
        let kind = Kind {
            name: "the file for the trace",
            capacity: WAITING_BYTES,
            unit: Unit::Messages,
            note: are_missing,
            way: Way::Direct,
        };
        let output = Output::new(file, kind).map_err(Error::Trace)?;
        // The format leaves the closing bracket to whoever wants it, so that a trace is whole at any time.
        output.push(b"[\n");
        Ok(Self { output: Some(output) })
    }

    /// Says what the VM in the process `pid` is called.
    pub(super) fn name(&self, pid: u32, vm: &str) {
        self.write(&[Entry::Name { name: "process_name", pid, args: Named { name: vm } }]);
    }

    /// Tells one side of a fork: as a whole, under the name `what`, and each of its steps.
    pub(super) fn side(&self, pid: u32, what: &str, arguments: Arguments, steps: &[StepTiming]) {
        let (Some((_, began_ns, _)), Some((_, _, ended_ns))) = (steps.first(), steps.last()) else { return };
        let slice = |name, cat, began_ns: u64, ended_ns: u64| Entry::Slice {
            name,
            cat,
            ts: microseconds(began_ns),
            dur: microseconds(ended_ns.saturating_sub(began_ns)),
            pid,
            tid: pid,
            args: arguments,
        };
        let mut entries = vec![slice(what, "fork", *began_ns, *ended_ns)];
        entries.extend(
            steps.iter().map(|(step, began_ns, ended_ns)| slice(step.name(), "step", *began_ns, *ended_ns)),
        );
        self.write(&entries);
    }

    /// Waits until all of it is written, for so long at most.
    pub(super) fn flush(&self, limit: Duration) {
        if let Some(output) = &self.output {
            output.flush(limit);
        }
    }

    fn write(&self, entries: &[Entry<'_>]) {
        let Some(output) = &self.output else { return };
        match text(entries) {
            Ok(text) => output.push(&text),
            Err(error) => tracing::warn!(%error, "an entry of the trace is lost"),
        }
    }
}

fn text(entries: &[Entry<'_>]) -> serde_json::Result<Vec<u8>> {
    let mut text = Vec::new();
    for entry in entries {
        serde_json::to_writer(&mut text, entry)?;
        text.extend_from_slice(b",\n");
    }
    Ok(text)
}

/// The note in the place of what is missing, which the viewer shows across all processes.
fn are_missing(count: u64) -> Vec<u8> {
    let (ts, args) = (microseconds(monotonic_ns()), Count { count });
    text(&[Entry::Missing { name: "missing", ts, pid: 0, tid: 0, s: "g", args }]).unwrap_or_default()
}

fn microseconds(nanoseconds: u64) -> f64 {
    Duration::from_nanos(nanoseconds).as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;
    use types::ForkStep;
    use vmm::memory;

    #[test]
    fn a_trace_is_json_once_it_is_closed() {
        let mut file = memory::unsealed("test", 0).unwrap();
        let trace = Trace::new(Some(file.try_clone().unwrap())).unwrap();
        trace.name(7, "web.1");
        let steps = [(ForkStep::HandOver, 1_000_500, 1_002_000), (ForkStep::Restore, 1_002_000, 1_010_000)];
        trace.side(7, "child", Arguments { seq: 3, code: 0 }, &steps);
        trace.side(7, "nothing", Arguments { seq: 4, code: 0 }, &[]);
        trace.flush(Duration::from_secs(60));
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let entries: serde_json::Value =
            serde_json::from_str(&format!("{}]", text.trim_end_matches(",\n"))).unwrap();
        assert_eq!(entries[0]["args"]["name"], "web.1");
        assert_eq!((&entries[1]["name"], &entries[1]["dur"]), (&"child".into(), &9.5.into()));
        assert_eq!((&entries[2]["name"], &entries[2]["ts"]), (&"hand-over".into(), &1000.5.into()));
        assert_eq!(entries.as_array().unwrap().len(), 4);
    }
}
