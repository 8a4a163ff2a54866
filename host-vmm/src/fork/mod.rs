//! VM_fork, in the order in which it happens.
//!
//! ```text
//!  parent    validate -> place -> quiesce -> complete -> capture -> freeze -> hand over -> restore -> launch -> signal -> commit -> thaw
//!  platform                └─► chooses shells, and gives them their orders
//!  child                         └─► (awake; one that stands by: woken by the parent) -> hand over -> restore -> launch  -> thaw -> first run
//! ```
//!
//! [`Engine::vm_fork`] is the table of contents: a line a step. What a step has done is undone by dropping its result, last
//! step first, so that a fork that fails anywhere leaves the parent running and nothing behind.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
};

use vmfork_abi::{ErrorCode, Request};

mod child;
mod children;
pub mod rendezvous;
mod request;
mod signal;
mod standby;
mod supplies;
mod timeline;
mod whereabouts;

pub use child::Child;
pub use children::Replies;
pub use signal::Signal;
pub use standby::{Meeting, Standby};

use crate::{
    capsule,
    clock::monotonic_ns,
    descriptors,
    devices::{ControlPageState, Paused},
    error::chain,
    kvm::{self, Vcpu},
    machine::{self, FirstExit, GateError, LeftBehind, Machine, MachineState, Stopped, Successor},
    memory::{self, Changes, Onward},
    sync::lock,
    wire::{NodeLink, Report, Step, link},
};
use children::Met;
use supplies::Supplies;
use timeline::Timeline;

/// Descriptors that a VM that forks has room for.
const DESCRIPTORS: u64 = 256;

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
    #[error("can't pack the state")]
    Pack(#[from] capsule::Error),
    /// The children can't be met.
    #[error("can't meet the children")]
    Rendezvous(#[from] rendezvous::Error),
    /// A shell can't be woken up.
    #[error("can't have a shell stand by")]
    Standby(#[from] standby::Error),
    /// It is certain already what becomes of the children.
    #[error("the children run, or were called off")]
    Committed,
    /// The parent can't go on in another VM.
    #[error("can't bring the parent to where it goes on")]
    Successor(#[from] machine::Error),
    /// A fork of this VM is under way.
    #[error("a fork of this VM is under way")]
    Busy,
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
            Self::Busy | Self::Quiesce(GateError::Busy) => ErrorCode::Busy,
            Self::Quiesce(GateError::Ended) => ErrorCode::NotLaunched,
            Self::Quiesce(GateError::Timeout(_)) | Self::Complete(_) => ErrorCode::Quiesce,
            Self::Quiesce(GateError::Save(_)) | Self::Capture(_) => ErrorCode::Capture,
            Self::Freeze(_) | Self::Pack(_) => ErrorCode::Freeze,
            Self::Rendezvous(_) | Self::Standby(_) => ErrorCode::Launch,
            Self::Link(_) | Self::Successor(_) | Self::Committed => ErrorCode::Internal,
            Self::Signal(_) => ErrorCode::Signal,
            Self::Injected(step) => step.code(),
        }
    }
}

/// A ring of the doorbell that was served, for somebody else to report and to clear up after.
#[derive(Debug)]
pub struct Served {
    /// How it went.
    pub report: Report,
    /// When the VM shows a sign of life again.
    pub first_exit: Arc<FirstExit>,
    /// What is left of a fork: not cleared away while the guest waits.
    pub remains: Option<Remains>,
}

/// What a fork leaves behind. To clear it away takes milliseconds where a large VM was left.
#[derive(Debug)]
pub struct Remains {
    count: u32,
    met: Met,
    left_behind: Option<LeftBehind>,
}

/// Serves the doorbell of one VM.
#[derive(Debug)]
pub struct Engine {
    machine: Arc<Machine>,
    link: Arc<NodeLink>,
    supplies: Supplies,
    /// What the platform answers to a fork; whoever holds it is the one who forks.
    replies: Mutex<Replies>,
    /// Whether the VM is one that forks.
    forks: AtomicBool,
    /// Whether something is still there that the VM has left behind.
    is_clearing: AtomicBool,
    /// Steps at which the next forks are to fail, one for each.
    faults: Mutex<VecDeque<Step>>,
}

impl Engine {
    /// The engine of `machine`, whose platform answers by `replies`.
    pub fn new(machine: Arc<Machine>, link: Arc<NodeLink>, replies: Replies, faults: Vec<Step>) -> Self {
        let (supplies, replies, faults) = (Supplies::default(), Mutex::new(replies), Mutex::new(faults.into()));
        // Copies are made to work, and booted VMs to be copied.
        let forks = AtomicBool::new(lock(&machine.identity).generation == 0);
        let is_clearing = AtomicBool::new(false);
        Self { machine, link, supplies, replies, forks, is_clearing, faults }
    }

    /// Makes what the next fork will use up, where there is time for it. Without it, that fork takes longer.
    pub fn get_ready(&self) {
        // The image of a late generation has a file for each of its layers.
        if let Err(error) = descriptors::make_room(&*self.link, DESCRIPTORS) {
            tracing::warn!(%error, "there is no room for the files of the next fork");
        }
        let forks = self.forks.load(Ordering::Relaxed);
        if let Err(error) = self.supplies.restock(&self.machine, &self.link, forks) {
            tracing::warn!(error = chain(&error), "can't get ready for the next fork");
        }
        if lock(&self.machine.memory).own_file().is_some() {
            self.machine.spare.prepare(&self.machine);
        }
    }

    /// Clears away what a fork has left behind.
    pub fn clear_away(&self, remains: Remains) {
        let Remains { met, left_behind, .. } = remains;
        drop(met);
        if let Some(left_behind) = left_behind {
            left_behind.clear_away(&self.machine);
            self.is_clearing.store(false, Ordering::Relaxed);
        }
    }

    /// Where the VM goes on after a fork with these changes. It leaves no more behind while there is something to clear away: a guest that
    /// forks as fast as it can would take ever more memory.
    fn onward(&self, changes: &Changes) -> Onward {
        match changes.onward() {
            Onward::Prefer if self.is_clearing.load(Ordering::Relaxed) => Onward::Stay,
            onward => onward,
        }
    }

    /// Serves a ring of the doorbell. Called on the thread of the vCPU that rang; when it returns, the vCPU goes on, and finds the
    /// answer in the control page. What it gives is for [`Engine::clear_away`] and a report.
    pub fn ring(&self, vcpu: &mut Vcpu, command: Option<u32>) -> Served {
        let rung_ns = monotonic_ns();
        let mut timeline = Timeline::new(lock(&self.faults).pop_front());
        // The request is copied out once; from here on only the copy is looked at.
        let request = self.machine.control_page.request();
        let seq = request.as_ref().map_or(0, |request| request.seq);
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
        let (outcome, remains) = match outcome {
            Ok(remains) => (Ok(remains.count), Some(remains)),
            Err(error) => (Err(error), None),
        };
        let report = timeline.into_report(seq, rung_ns, outcome);
        Served { report, first_exit: self.machine.exits.watch(), remains }
    }

    fn vm_fork(
        &self,
        vcpu: &mut Vcpu,
        command: Option<u32>,
        request: &Request,
        timeline: &mut Timeline,
    ) -> Result<Remains, Error> {
        let machine = &self.machine;
        let order = timeline.step(Step::Validate, || {
            let order = request::validate(command, request).map_err(Error::Refused)?;
            if machine.is_whole() { Ok(order) } else { Err(Error::Refused(ErrorCode::Incomplete)) }
        })?;
        let replies = match self.replies.try_lock() {
            Ok(replies) => replies,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(Error::Busy),
        };
        let mut view = lock(&machine.memory);
        let fault = timeline.fault();
        let (plan, mut children) = timeline.step(Step::Place, || {
            let mut supply = self.supplies.take()?;
            let plan = view.plan(&supply.delta);
            let bell = supply.take_bell(&plan);
            let rendezvous = supply.rendezvous;
            let children = children::place(&self.link, &replies, &order, rendezvous, plan.files(), bell, fault)?;
            Ok((plan, children))
        })?;
        let stopped = timeline.step(Step::Quiesce, || Ok(machine.gate.stop_others(vcpu.id())?))?;
        timeline.step(Step::Complete, || vcpu.complete_exit().map_err(Error::Complete))?;
        let devices = machine.devices.pause();
        let state = timeline.step(Step::Capture, || capture(machine, order.seq, vcpu, &stopped, &devices))?;
        children.wake()?;
        let files = plan.files().to_vec();
        let (image, onward) = timeline.step(Step::Freeze, || {
            let changes = view.changes(&machine.workshop.page_map)?;
            let onward = self.onward(&changes);
            if onward != Onward::Stay {
                // Where there is no spare VM yet, it is being built while memory is copied.
                machine.spare.prepare(machine);
            }
            Ok((view.freeze(plan, changes)?, onward))
        })?;
        timeline.step(Step::HandOver, || children.hand_over(&capsule::pack(&state, &image, &files)?))?;
        let successor = timeline.step(Step::Restore, || {
            let successor = (onward != Onward::Stay).then(|| Successor::prepare(machine, &state, &image));
            match successor {
                Some(Err(error)) if onward == Onward::Prefer => {
                    tracing::warn!(error = chain(&error), "a VM whose memory was copied keeps it");
                    Ok(None)
                }
                successor => Ok(successor.transpose()?),
            }
        })?;
        timeline.step(Step::Launch, || children.wait())?;
        let signal =
            timeline.step(Step::Signal, || Ok(Signal::to_parent(machine, &order, children.whereabouts()?)?))?;
        let met = timeline.step(Step::Commit, || children.commit())?;
        timeline.step(Step::Thaw, || {
            let left_behind = successor.map(|successor| successor.take_over(machine, &mut view, vcpu, &stopped));
            self.is_clearing.fetch_or(left_behind.is_some(), Ordering::Relaxed);
            signal.give(machine)?;
            drop((devices, stopped));
            self.forks.store(true, Ordering::Relaxed);
            Ok(Remains { count: order.count, met, left_behind })
        })
    }
}

/// Reads the state of the machine, as its copies are to have it. All vCPUs are stopped, and have completed their exits.
fn capture(
    machine: &Machine,
    seq: u64,
    vcpu: &Vcpu,
    stopped: &Stopped<'_>,
    devices: &Paused<'_>,
) -> Result<MachineState, Error> {
    Ok(MachineState {
        config: machine.config,
        // Before the VM's part: reading a vCPU's run state takes in what is pending.
        vcpus: stopped.states(vcpu.save().map_err(Error::Capture)?)?,
        vm: machine.vm.get().save().map_err(Error::Capture)?,
        devices: devices.save(),
        control_page: ControlPageState::forked(seq),
        tsc_khz: machine.tsc_khz,
        capabilities: machine.workshop.host.model.capabilities.clone(),
    })
}
