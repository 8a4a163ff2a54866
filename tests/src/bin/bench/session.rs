//! A `host-vmm` with a bare guest in it that forks when it is told to.

use std::{collections::HashMap, thread, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    libc,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::NamedTempFile;
use vmfork_tests::{
    user_guest::{self, Order},
    vmm::{Running, Vmm},
};

use crate::REST;

/// How a guest is run.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    /// Guest memory, as for `host-vmm run --mem`; all of it resident.
    pub(crate) mem: &'static str,
    /// Number of vCPUs.
    pub(crate) cpus: u8,
    /// Warm VMs.
    pub(crate) ready: usize,
    /// Whether children get pages ready that others have written to.
    pub(crate) prefetch: bool,
    /// Whether the booted VM leaves the processors to its offspring: it has nothing to do, but can't sleep.
    pub(crate) yields: bool,
}

impl Shape {
    /// One vCPU, and all that speeds a fork up.
    pub(crate) fn new(mem: &'static str, ready: usize) -> Self {
        Self { mem, cpus: 1, ready, prefetch: true, yields: false }
    }
}

/// A guest that waits for orders. Its waiting is a loop; so its process is stopped until there is one.
#[derive(Debug)]
pub(crate) struct Session {
    running: Running,
    node: Pid,
    _kernel: NamedTempFile,
}

/// Times of one child: CLOCK_MONOTONIC in nanoseconds.
#[derive(Debug, Default, Clone)]
pub(crate) struct Child {
    /// How many forks lie between it and the booted VM.
    pub(crate) generation: u64,
    /// The doorbell of the fork that it comes from.
    pub(crate) rung_ns: u64,
    /// Its first exit.
    pub(crate) first_exit_ns: u64,
    /// Its line on the console, where it wrote one.
    pub(crate) line_ns: Option<u64>,
    /// Its steps: when each began and ended.
    pub(crate) steps: Vec<(String, u64, u64)>,
}

/// One fork of one parent.
#[derive(Debug, Default, Clone)]
pub(crate) struct Fork {
    /// From the doorbell to the parent's next exit.
    pub(crate) pause_ns: u64,
    /// The parent's steps.
    pub(crate) steps: Vec<(String, u64, u64)>,
}

/// What came of an order.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) forks: Vec<Fork>,
    pub(crate) children: Vec<Child>,
}

impl Session {
    /// Boots a guest.
    pub(crate) fn start(shape: &Shape) -> Result<Self> {
        let kernel = user_guest::kernel();
        let vmm = Vmm::kernel(kernel.path()).option("--mem", shape.mem).flag("--prealloc");
        let vmm = vmm.option("--cpus", &shape.cpus.to_string()).option("--ready", &shape.ready.to_string());
        let vmm = if shape.prefetch { vmm } else { vmm.flag("--no-prefetch") };
        let mut running = vmm.start()?;
        running.wait_for_line("00000001").context("the bare guest does not start")?;
        let node = Pid::from_raw(running.node("vm")?.cast_signed());
        if shape.yields {
            leave_processors_to_others(node)?;
        }
        thread::sleep(REST);
        kill(node, Signal::SIGSTOP)?;
        Ok(Self { running, node, _kernel: kernel })
    }

    /// Gives an order, waits until it is carried out and all children have ended, or, where they are to stay,
    /// run.
    pub(crate) fn carry_out(&mut self, order: Order) -> Result<Outcome> {
        let expected = usize::try_from(order.count * (order.depth + 1))?;
        kill(self.node, Signal::SIGCONT)?;
        self.running.type_bytes(&order.to_bytes())?;
        let mut outcome = Outcome::default();
        let mut rung = HashMap::new();
        let (mut lines, mut parents) = (HashMap::new(), Vec::new());
        let mut ended = 0;
        let mut forks_left = usize::try_from(order.depth + 1)?;
        // A line may come before its VM is told of; an end comes last.
        while forks_left > 0 || outcome.children.len() < expected || (!order.stay && ended < expected) {
            let event = self.running.next_event()?;
            match event["event"].as_str() {
                Some("forked") => {
                    ensure!(event["code"] == 0, "a fork failed: {event}");
                    let rung_ns = number(&event, "rung_ns")?;
                    rung.insert(text(&event["parent"], "id")?, rung_ns);
                    let steps = steps(&event)?;
                    let resumed_ns = steps.last().map_or(0, |(_, _, end_ns)| *end_ns);
                    outcome.forks.push(Fork { pause_ns: resumed_ns.saturating_sub(rung_ns), steps });
                    forks_left -= 1;
                    if order.depth > 0 && event["parent"]["generation"] == 0 {
                        // It would take a processor from its offspring.
                        kill(self.node, Signal::SIGSTOP)?;
                    }
                }
                Some("launched") => {
                    let steps = steps(&event)?;
                    let parent = text(&event, "parent")?;
                    let first_exit_ns = steps.last().map_or(0, |(_, _, end_ns)| *end_ns);
                    let generation = number(&event, "generation")?;
                    outcome.children.push(Child { generation, first_exit_ns, steps, ..Child::default() });
                    parents.push((text(&event, "name")?, parent));
                }
                Some("console") => {
                    lines.insert(text(&event, "name")?, number(&event, "t_ns")?);
                }
                Some("ended") if event["generation"] == 0 => bail!("the guest has ended: {event}"),
                Some("ended") if order.stay => bail!("a child has not stayed: {event}"),
                Some("ended") => ended += 1,
                _ => {}
            }
        }
        for (child, (name, parent)) in outcome.children.iter_mut().zip(&parents) {
            child.rung_ns = *rung.get(parent).context("a child without a parent's fork")?;
            child.line_ns = lines.get(name).copied();
        }
        kill(self.node, Signal::SIGCONT)?;
        thread::sleep(REST);
        kill(self.node, Signal::SIGSTOP)?;
        Ok(outcome)
    }

    /// How many VMs run.
    pub(crate) fn count(&self) -> Result<usize> {
        let list: Value = serde_json::from_str(&self.running.ask(&["ps", "--json"])?)?;
        let vms = list["vms"].as_array().context("no list of VMs")?;
        Ok(vms.iter().filter(|vm| vm["state"] == "running").count())
    }

    /// Ends all VMs, and says how long that took.
    pub(crate) fn end(self) -> Result<Duration> {
        let started = std::time::Instant::now();
        self.running.signal(Signal::SIGTERM)?;
        self.running.end()?;
        Ok(started.elapsed())
    }
}

/// Has the first vCPU of a node run only where nobody else wants to (SCHED_IDLE).
fn leave_processors_to_others(node: Pid) -> Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the call reads one struct that lives across it.
    let result = unsafe { libc::sched_setscheduler(node.as_raw(), libc::SCHED_IDLE, &raw const parameters) };
    ensure!(result == 0, "a vCPU can't be made unimportant: {}", std::io::Error::last_os_error());
    Ok(())
}

impl Child {
    /// From the doorbell to its first exit.
    pub(crate) fn latency_ns(&self) -> u64 {
        self.first_exit_ns.saturating_sub(self.rung_ns)
    }
}

fn number(event: &Value, field: &str) -> Result<u64> {
    event[field].as_u64().with_context(|| format!("an event without {field}: {event}"))
}

fn text(event: &Value, field: &str) -> Result<String> {
    Ok(event[field].as_str().with_context(|| format!("an event without {field}: {event}"))?.to_owned())
}

fn steps(event: &Value) -> Result<Vec<(String, u64, u64)>> {
    let steps = event["steps"].is_array().then(|| serde_json::from_value(event["steps"].clone()));
    Ok(steps.with_context(|| format!("an event without steps: {event}"))??)
}
