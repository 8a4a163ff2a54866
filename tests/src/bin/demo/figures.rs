//! What the demo has measured, as a table and as JSON.

use std::{fmt, time::Duration};

use serde_json::{Value, json};

/// One child.
#[derive(Debug)]
pub(crate) struct Child {
    /// Name of the VM.
    pub(crate) name: String,
    /// From the doorbell to its answer on the console.
    pub(crate) first_answer: Duration,
    /// Memory that its node shares with no other process, after the answer, in KiB.
    pub(crate) private_kib: u64,
    /// The answer, which was right.
    pub(crate) answer: Value,
}

impl Child {
    fn private_mib(&self) -> f64 {
        f64::from(u32::try_from(self.private_kib).unwrap_or(u32::MAX)) / 1024.0
    }
}

/// All figures.
#[derive(Debug)]
pub(crate) struct Figures {
    /// What they were measured on.
    pub(crate) kvm: String,
    /// The guest's kernel.
    pub(crate) kernel: String,
    /// The guest's memory.
    pub(crate) mem: String,
    /// From the start of `host-vmm` until the application was warm.
    pub(crate) boot_to_ready: Duration,
    /// For how long the fork stopped the parent.
    pub(crate) parent_pause: Duration,
    /// The children, by index.
    pub(crate) children: Vec<Child>,
}

impl Figures {
    fn last_answer(&self) -> Duration {
        self.children.iter().map(|child| child.first_answer).max().unwrap_or_default()
    }

    /// How many times faster all children answered than a new VM would have been ready.
    fn speed_up(&self) -> f64 {
        self.boot_to_ready.as_secs_f64() / self.last_answer().as_secs_f64().max(f64::EPSILON)
    }

    /// One JSON object. Times are in seconds, memory in KiB.
    pub(crate) fn to_json(&self) -> Value {
        let children = self.children.iter().map(|child| {
            json!({
                "name": child.name,
                "first_answer_s": child.first_answer.as_secs_f64(),
                "private_kib": child.private_kib,
                "phrase": child.answer["phrase"],
                "next": child.answer["next"],
            })
        });
        json!({
            "kvm": self.kvm,
            "kernel": self.kernel,
            "mem": self.mem,
            "boot_to_ready_s": self.boot_to_ready.as_secs_f64(),
            "parent_pause_s": self.parent_pause.as_secs_f64(),
            "last_answer_s": self.last_answer().as_secs_f64(),
            "speed_up": self.speed_up(),
            "children": children.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let row = |f: &mut fmt::Formatter<'_>, what: &str, time: Duration, more: &str| {
            writeln!(f, "  {what:<34}{:>9.3} s   {more}", time.as_secs_f64())
        };
        writeln!(f, "\nA guest with {} of memory and {}, on {}:\n", self.mem, self.kernel, self.kvm)?;
        row(f, "boot to ready", self.boot_to_ready, "")?;
        row(f, "the fork's pause of the parent", self.parent_pause, "")?;
        for child in &self.children {
            let own = format!("{:.1} MiB of its own", child.private_mib());
            row(f, &format!("fork to the first answer of {}", child.name), child.first_answer, &own)?;
        }
        let speed_up = format!("{:.0} times as fast as another boot", self.speed_up());
        row(f, "fork to the last child's answer", self.last_answer(), &speed_up)?;
        writeln!(f)?;
        for child in &self.children {
            writeln!(f, "  {} completes {}: {}", child.name, child.answer["phrase"], child.answer["next"])?;
        }
        writeln!(f)
    }
}
