//! What happens on a platform, as JSON lines for a script to read.

use std::{fs::File, io::Write, sync::Mutex};

use serde::Serialize;
use uuid::Uuid;

use crate::{
    clock::monotonic_ns,
    machine::{End, VmIdentity},
    sync::lock,
    wire::{Report, Timing},
};

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
        steps: &'a [Timing],
    },
    /// A copy runs on another platform.
    Sent { id: Uuid, name: &'a str, platform: &'a str, seq: u64 },
    /// A VM wrote a line to its console.
    Console { name: &'a str, line: &'a str },
    /// A VM has ended; `how` is null where its node died.
    Ended {
        #[serde(flatten)]
        vm: &'a VmIdentity,
        how: Option<&'a End>,
    },
}

/// Where events go.
#[derive(Debug)]
pub(super) struct Events {
    file: Option<Mutex<File>>,
}

#[derive(Serialize)]
struct Line<'a> {
    /// CLOCK_MONOTONIC of this host, in nanoseconds.
    t_ns: u64,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

impl Events {
    /// Events into a file, or nowhere.
    pub(super) fn new(file: Option<File>) -> Self {
        Self { file: file.map(Mutex::new) }
    }

    /// Writes an event with the present time.
    pub(super) fn write(&self, event: &Event<'_>) {
        let Some(file) = &self.file else { return };
        let mut file = lock(file);
        let written =
            serde_json::to_vec(&Line { t_ns: monotonic_ns(), event }).map_err(Into::into).and_then(|mut line| {
                line.push(b'\n');
                file.write_all(&line)
            });
        if let Err(error) = written {
            tracing::warn!(%error, "an event is lost");
        }
    }
}
