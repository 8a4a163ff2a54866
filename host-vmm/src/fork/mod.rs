//! VM_fork, in the order in which it happens.
//!
//! ```text
//! validate -> quiesce -> complete -> capture -> freeze -> place, launch -> signal -> commit -> thaw
//! ```
//!
//! [`Engine::vm_fork`] is the table of contents: a line a step. What a step has done is undone by dropping its result, last
//! step first, so that a fork that fails anywhere leaves the parent running and nothing behind.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Instant,
};

use vmfork_abi::{ErrorCode, Request};

mod children;
mod request;
mod signal;
mod timeline;

pub use children::Replies;
pub use signal::identify;

use crate::{
    capsule::{self, Capsule},
    clock::monotonic_ns,
    kvm::{self, Vcpu},
    machine::{GateError, Machine, MachineState, Stopped},
    memory::{self, Aside},
    sync::lock,
    wire::{NodeLink, Step, ToPlatform, link},
};
use signal::Signal;
use timeline::Timeline;

/// Why a fork was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is not one that can be served.
    #[error("the request is refused: {0}")]
    Refused(ErrorCode),
    /// The vCPUs could not be stopped.
    #[error("can't stop the vCPUs")]
    Quiesce(#[from] GateError),
    /// A vCPU's state could not be made consistent.
    #[error("can't complete the doorbell's exit")]
    Complete(#[source] kvm::Error),
    /// The state could not be read.
    #[error("can't capture the state")]
    Capture(#[source] kvm::Error),
    /// The memory could not be frozen.
    #[error("can't freeze the memory")]
    Freeze(#[from] memory::Error),
    /// State and image could not be packed.
    #[error("can't pack the capsule")]
    Pack(#[from] capsule::Error),
    /// The platform refused, or could not launch the children.
    #[error("the platform launched no children: {why}")]
    Platform {
        /// What the guest is told.
        code: ErrorCode,
        /// The platform's reason.
        why: String,
    },
    /// The platform can't be reached.
    #[error("the platform does not answer")]
    Link(#[from] link::Error),
    /// The roles could not be written.
    #[error("can't signal the roles")]
    Signal(#[from] signal::Error),
    /// A failure that was asked for.
    #[error("{0} was made to fail")]
    Injected(Step),
}

impl Error {
    /// What the guest is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused(code) | Self::Platform { code, .. } => *code,
            Self::Quiesce(GateError::Busy) => ErrorCode::Busy,
            Self::Quiesce(GateError::Ended) => ErrorCode::NotLaunched,
            Self::Quiesce(GateError::Timeout(_)) | Self::Complete(_) => ErrorCode::Quiesce,
            Self::Quiesce(GateError::Save(_)) | Self::Capture(_) => ErrorCode::Capture,
            Self::Freeze(_) | Self::Pack(_) => ErrorCode::Freeze,
            Self::Link(_) => ErrorCode::Internal,
            Self::Signal(_) => ErrorCode::Signal,
            Self::Injected(step) => step.code(),
        }
    }
}

/// Serves the doorbell of one VM.
#[derive(Debug)]
pub struct Engine {
    machine: Arc<Machine>,
    link: Arc<NodeLink>,
    /// What the platform answers to a fork; whoever holds it is the one who forks.
    replies: Mutex<Replies>,
    /// Steps at which the next forks are to fail, one for each.
    faults: Mutex<VecDeque<Step>>,
}

impl Engine {
    /// The engine of `machine`, whose platform answers by `replies`.
    pub fn new(machine: Arc<Machine>, link: Arc<NodeLink>, replies: Replies, faults: Vec<Step>) -> Self {
        Self { machine, link, replies: Mutex::new(replies), faults: Mutex::new(faults.into()) }
    }

    /// Serves a ring of the doorbell. Called on the thread of the vCPU that rang; when it returns, the vCPU goes on, and finds the
    /// answer in the control page.
    pub fn ring(&self, vcpu: &mut Vcpu, command: Option<u32>) {
        let (rung, rung_ns) = (Instant::now(), monotonic_ns());
        let fault = lock(&self.faults).pop_front();
        let mut timeline = Timeline::new(fault);
        // The request is copied out once; from here on only the copy is looked at.
        let request = self.machine.control_page.request();
        let outcome = request.map_err(Error::from).and_then(|request| {
            let outcome = self.vm_fork(vcpu, command, &request, &mut timeline);
            // Another vCPU's fork is under way: the page is that one's to answer.
            if let Err(error) = &outcome
                && error.code() != ErrorCode::Busy
            {
                signal::refuse(&self.machine, request.seq, error.code())?;
            }
            outcome
        });
        if let Err(error) = vcpu.tell_paused() {
            tracing::warn!(%error, "can't tell the guest that it was stopped");
        }
        let report = timeline.into_report(rung_ns, rung.elapsed(), outcome);
        if let Err(error) = self.link.send(&ToPlatform::Report(report), &[]) {
            tracing::warn!(%error, "can't report a fork to the platform");
        }
    }

    fn vm_fork(
        &self,
        vcpu: &mut Vcpu,
        command: Option<u32>,
        request: &Request,
        timeline: &mut Timeline,
    ) -> Result<u32, Error> {
        let machine = &self.machine;
        let order = timeline.step(Step::Validate, || request::validate(command, request).map_err(Error::Refused))?;
        let stopped = timeline.step(Step::Quiesce, || machine.gate.stop_others(vcpu.id()).map_err(Error::Quiesce))?;
        timeline.step(Step::Complete, || vcpu.complete_exit().map_err(Error::Complete))?;
        let state = timeline.step(Step::Capture, || capture(machine, vcpu, &stopped))?;
        let mut memory = lock(&machine.memory);
        let frozen = timeline.step(Step::Freeze, || memory.freeze().map_err(Error::Freeze))?;
        let capsule = timeline.step(Step::Pack, || Capsule::pack(state, frozen.image()).map_err(Error::Pack))?;
        let replies = lock(&self.replies);
        let fault = timeline.fault();
        let children =
            timeline.step(Step::Launch, || children::launch(&self.link, &replies, &order, &capsule, fault))?;
        let signal = timeline.step(Step::Signal, || Signal::to_parent(machine, &order).map_err(Error::Signal))?;
        timeline.step(Step::Commit, || children.commit())?;
        clear_away(frozen.keep());
        signal.give(machine)?;
        timeline.step(Step::Thaw, || {
            drop(stopped);
            Ok(order.count)
        })
    }
}

/// Reads the state of the machine. All vCPUs are stopped, and have completed their exits.
fn capture(machine: &Machine, vcpu: &Vcpu, stopped: &Stopped<'_>) -> Result<MachineState, Error> {
    Ok(MachineState {
        config: machine.config,
        // Before the VM's part: reading a vCPU's run state takes in what is pending.
        vcpus: stopped.states(vcpu.save().map_err(Error::Capture)?)?,
        vm: machine.vm.save().map_err(Error::Capture)?,
        devices: machine.devices.save(),
    })
}

/// Clears away what a freeze has moved aside, without letting the VM wait for it.
fn clear_away(aside: Option<Aside>) {
    let Some(aside) = aside else { return };
    let cleared = std::thread::Builder::new().name("clear-away".into()).spawn(move || {
        if let Err(error) = aside.clear_away() {
            tracing::warn!(%error, "an image could not be sealed for good");
        }
    });
    if let Err(error) = cleared {
        tracing::warn!(%error, "can't start a thread to clear away the parent's old mapping; it was done at once");
    }
}
