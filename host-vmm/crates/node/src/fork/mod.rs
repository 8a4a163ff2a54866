//! VM_fork, in the order in which it happens.
//!
//! ```text
//!  parent    validate -> place -> quiesce -> complete -> capture -> freeze -> hand over -> restore -> launch -> signal -> commit -> thaw
//!  platform                └─► chooses warm VMs, and gives them their orders
//!  child                         └─► (awake; one that stands by: woken by the parent) -> hand over -> restore -> launch  -> thaw -> first run
//! ```
//!
//! [`Engine::vm_fork`] is the table of contents: a line a step. What a step has done is undone by dropping
//! its result, last step first, so that a fork that fails anywhere leaves the parent running and nothing
//! behind.
//!
//! A guest asks by its doorbell ([`Engine::ring`]), an operator by the platform ([`Engine::order`]). Either
//! way the thread of a vCPU goes through the steps: of the one that rang, or of one that was requested,
//! between two instructions ([`Engine::carry_out`]). Only a guest that has asked is told of the fork. One
//! that has not may be about to ring, or about to read the answer to its own request: its page stays as it
//! is, and its copies find request and response in theirs as it has them, beside who they are.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use base::{clock::monotonic_ns, descriptors, error::chain, sync::lock, text::Reason};
use types::{ForkStep, Requester};
use vmfork_abi::ErrorCode;
use vmm::{
    devices::{self, ControlPageState, Device, PausedDevices},
    kvm::{self, TscRate, Vcpu},
    machine::{self, BarrierError, FirstExit, Machine, MachineState, RetiredVm, StoppedVcpus, VmSwitch},
    memory::{self, Changes, Rebase},
};

mod child;
mod children;
mod copy_list;
mod fork_lock;
mod prepared;
pub mod rendezvous;
mod request;
mod role_signal;
mod standby;
mod timeline;

pub use child::Child;
pub use children::Replies;
pub use role_signal::RoleSignal;
pub use standby::{CopySource, Standby};

use crate::wire::{ForkOrder, NodeLink, Report, ToPlatform, link};
use children::CommittedChildren;
use fork_lock::ForkLock;
use prepared::PreparedForks;
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
    Quiesce(#[from] BarrierError),
    /// A vCPU's state could not be made consistent.
    #[error("can't complete the doorbell's exit")]
    Complete(#[source] kvm::Error),
    /// The state could not be read.
    #[error("can't capture the state")]
    Capture(#[source] kvm::Error),
    /// The devices could not be saved.
    #[error("can't save the devices' state")]
    Devices(#[from] devices::Error),
    /// The memory could not be frozen.
    #[error("can't freeze the memory")]
    Freeze(#[from] memory::Error),
    /// State and image could not be packed.
    #[error("can't pack the state")]
    Pack(#[from] capsule::Error),
    /// The children can't be met.
    #[error("can't meet the children")]
    Rendezvous(#[from] rendezvous::Error),
    /// A warm VM can't be woken up.
    #[error("can't have a warm VM stand by")]
    Standby(#[from] standby::Error),
    /// It is certain already what becomes of the children.
    #[error("the children run, or were called off")]
    Committed,
    /// The parent can't go on in another VM.
    #[error("can't bring the parent to where it goes on")]
    Switch(#[from] machine::Error),
    /// The copies are not ready in time.
    #[error(
        "the copies were not ready to run within {0:?}, which is as long as a VM may stand still for a fork here: \
         where they need longer, raise --max-pause or max_pause_seconds"
    )]
    Late(Duration),
    /// A fork of this VM is under way, for which somebody has asked.
    #[error("a fork of this VM is under way")]
    Busy(Requester),
    /// The platform refused, or could not launch the children.
    #[error("the platform launched no children: {why}")]
    Platform {
        /// What whoever has asked is told.
        code: ErrorCode,
        /// The platform's reason.
        why: Reason,
    },
    /// The platform can't be reached.
    #[error("the platform does not answer")]
    Link(#[from] link::Error),
    /// The roles could not be written.
    #[error("can't signal the roles")]
    Signal(#[from] role_signal::Error),
    /// A failure that was asked for.
    #[error("{0} was made to fail")]
    Injected(ForkStep),
}

impl Error {
    /// What whoever has asked is told.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Refused(code) | Self::Platform { code, .. } => *code,
            Self::Busy(_) | Self::Quiesce(BarrierError::Busy) => ErrorCode::Busy,
            Self::Quiesce(BarrierError::Ended) => ErrorCode::NotLaunched,
            Self::Quiesce(BarrierError::Timeout(_)) | Self::Complete(_) => ErrorCode::Quiesce,
            Self::Quiesce(BarrierError::Save(_)) | Self::Capture(_) | Self::Devices(_) => ErrorCode::Capture,
            Self::Freeze(_) | Self::Pack(_) => ErrorCode::Freeze,
            Self::Rendezvous(_) | Self::Standby(_) => ErrorCode::Launch,
            Self::Late(_) => ErrorCode::Timeout,
            Self::Link(_) | Self::Switch(_) | Self::Committed => ErrorCode::Internal,
            Self::Signal(_) => ErrorCode::Signal,
            Self::Injected(step) => step.code(),
        }
    }
}

/// Outcome of a fork that was made or not, for the control thread to report and to clean up after.
#[derive(Debug)]
pub struct ForkOutcome {
    /// How it went.
    pub report: Report,
    /// When the VM shows a sign of life again.
    pub first_exit: Arc<FirstExit>,
    /// Cleanup of a fork: not done while the guest waits.
    pub cleanup: Option<DeferredCleanup>,
}

/// Cleanup after a fork, put off until its guest runs. It takes milliseconds where the VM was rebased.
#[derive(Debug)]
pub struct DeferredCleanup {
    count: u32,
    children: CommittedChildren,
    retired: Option<RetiredVm>,
}

/// Forks one VM.
#[derive(Debug)]
pub struct Engine {
    machine: Arc<Machine>,
    link: Arc<NodeLink>,
    prepared_forks: PreparedForks,
    fork_lock: ForkLock,
    /// How long the VM may stand still for a fork.
    max_pause: Duration,
    /// The children for which an operator has asked, until a vCPU's thread takes that up.
    ordered: Mutex<Option<u32>>,
    /// Whether the VM is one that forks.
    forks: AtomicBool,
    /// Whether the VM that a rebase has left is still there.
    is_cleaning_up: AtomicBool,
    /// Steps at which the next forks are to fail, one for each.
    faults: Mutex<VecDeque<ForkStep>>,
}

impl Engine {
    /// The engine of `machine`, whose platform answers by `replies`, and lets it stand still for as long as
    /// `max_pause` for a fork.
    pub fn new(
        machine: Arc<Machine>,
        link: Arc<NodeLink>,
        replies: Replies,
        max_pause: Duration,
        faults: Vec<ForkStep>,
    ) -> Self {
        let (prepared_forks, fork_lock, faults) =
            (PreparedForks::default(), ForkLock::new(replies), Mutex::new(faults.into()));
        // Copies are made to work, and booted VMs to be copied.
        let forks = AtomicBool::new(lock(&machine.identity).generation == 0);
        let is_cleaning_up = AtomicBool::new(false);
        Self {
            machine,
            link,
            prepared_forks,
            fork_lock,
            max_pause,
            ordered: Mutex::default(),
            forks,
            is_cleaning_up,
            faults,
        }
    }

    /// Makes what the next fork will use up, where there is time for it. Without it, that fork takes longer.
    pub fn prepare_next(&self) {
        // The image of a late generation has a file for each of its layers.
        if let Err(error) = descriptors::make_room(&*self.link, DESCRIPTORS) {
            tracing::warn!(%error, "there is no room for the files of the next fork");
        }
        let forks = self.forks.load(Ordering::Relaxed);
        if let Err(error) = self.prepared_forks.prepare_next(&self.machine, &self.link, forks) {
            tracing::warn!(error = chain(&error), "can't get ready for the next fork");
        }
        if lock(&self.machine.memory).own_file().is_some() {
            self.machine.spare_vm.prepare(&self.machine);
        }
    }

    /// Does the cleanup that a fork has put off.
    pub fn clean_up(&self, cleanup: DeferredCleanup) {
        let DeferredCleanup { children, retired, .. } = cleanup;
        drop(children);
        if let Some(retired) = retired {
            retired.take_down(&self.machine);
            self.is_cleaning_up.store(false, Ordering::Relaxed);
        }
    }

    /// Whether the VM is rebased by a fork with these changes. It is not where it need not be, and the VM
    /// that it has left before is still there: a guest that forks as fast as it can would take ever more
    /// memory.
    fn rebase(&self, changes: &Changes) -> Rebase {
        match changes.rebase() {
            Rebase::Preferred if self.is_cleaning_up.load(Ordering::Relaxed) => Rebase::No,
            rebase => rebase,
        }
    }

    /// Serves a ring of the doorbell. Called on the thread of the vCPU that rang; when it returns, the vCPU
    /// goes on, and finds the answer in the control page.
    pub fn ring(&self, vcpu: &mut Vcpu, command: Option<u32>) -> ForkOutcome {
        // The request is copied out once; from here on only the copy is looked at.
        let request = self.machine.control_page.request();
        let seq = request.as_ref().map_or(0, |request| request.seq);
        let vm_id = lock(&self.machine.identity).id;
        let check = || request::validate(command, &request?, vm_id).map_err(Error::Refused);
        self.serve(vcpu, Requester::Guest, seq, check, |outcome| match outcome {
            // Another vCPU has rung before: the page is that one's to answer.
            Ok(_) | Err(Error::Busy(Requester::Guest)) => Ok(()),
            Err(error) => role_signal::refuse(&self.machine, seq, error.code()),
        })
    }

    /// Takes an operator's order for so many children. Where there is no fork under way, the thread of a vCPU
    /// is requested to [carry it out](Self::carry_out). The platform hears what comes of it.
    ///
    /// # Errors
    /// [`link::Error`]: the platform hears nothing any more.
    pub fn order(&self, count: u32) -> Result<(), link::Error> {
        let mut ordered = lock(&self.ordered);
        let free =
            if ordered.is_some() { Err(Error::Busy(Requester::Operator)) } else { self.fork_lock.check() };
        if let Err(error) = free {
            return self.answer(Err(&error));
        }
        *ordered = Some(count);
        drop(ordered);
        self.machine.vcpu_barrier.request_service();
        Ok(())
    }

    /// Carries out the order of an operator, if there is one. Called on the thread of a vCPU that has left
    /// its guest for that.
    pub fn carry_out(&self, vcpu: &mut Vcpu) -> Option<ForkOutcome> {
        let count = lock(&self.ordered).take()?;
        let check = || Ok(ForkOrder::Operator { count });
        Some(
            self.serve(vcpu, Requester::Operator, 0, check, |outcome| {
                self.answer(outcome.as_ref().map(drop))
            }),
        )
    }

    /// Tells the platform what has come of an operator's order.
    fn answer(&self, outcome: Result<(), &Error>) -> Result<(), link::Error> {
        let code = outcome.map_or_else(Error::code, |()| ErrorCode::None).number();
        let why = outcome.map_or_else(|error| Reason::of_error(error), |()| Reason::default());
        self.link.send(&ToPlatform::Answer { code, why }, &[])
    }

    /// Forks the VM as `check` says, and gives whoever has asked his `answer`. What it gives is for
    /// [`Engine::clean_up`] and a report.
    fn serve<E: Into<Error>>(
        &self,
        vcpu: &mut Vcpu,
        asked_by: Requester,
        seq: u64,
        check: impl FnOnce() -> Result<ForkOrder, Error>,
        answer: impl FnOnce(&Result<DeferredCleanup, Error>) -> Result<(), E>,
    ) -> ForkOutcome {
        let began_ns = monotonic_ns();
        let mut timeline = Timeline::new(lock(&self.faults).pop_front());
        let outcome = self.vm_fork(vcpu, asked_by, check, &mut timeline);
        let answered = answer(&outcome).map_err(Into::into);
        if let Err(error) = vcpu.tell_paused() {
            tracing::warn!(%error, "can't tell the guest that it was stopped");
        }
        let (outcome, cleanup) = match outcome {
            Ok(cleanup) => (Ok(cleanup.count), Some(cleanup)),
            Err(error) => (Err(error), None),
        };
        let report = timeline.into_report(asked_by, seq, began_ns, answered.and(outcome));
        ForkOutcome { report, first_exit: self.machine.exits.watch(), cleanup }
    }

    fn vm_fork(
        &self,
        vcpu: &mut Vcpu,
        asked_by: Requester,
        check: impl FnOnce() -> Result<ForkOrder, Error>,
        timeline: &mut Timeline,
    ) -> Result<DeferredCleanup, Error> {
        let (machine, began) = (&self.machine, Instant::now());
        let order = timeline.step(ForkStep::Validate, || {
            let order = check()?;
            if machine.is_whole() { Ok(order) } else { Err(Error::Refused(ErrorCode::Incomplete)) }
        })?;
        let guard = self.fork_lock.take(asked_by)?;
        let mut memory = lock(&machine.memory);
        let fault = timeline.fault();
        let (plan, mut children) = timeline.step(ForkStep::Place, || {
            let mut prepared = self.prepared_forks.take()?;
            let plan = memory.plan(&prepared.delta);
            let wake_event = prepared.take_wake_event(&plan);
            let rendezvous = prepared.rendezvous;
            let children = children::place(
                &self.link,
                guard.replies(),
                &order,
                rendezvous,
                plan.files(),
                wake_event,
                fault,
            )?;
            Ok((plan, children))
        })?;
        let stopped =
            timeline.step(ForkStep::Quiesce, || Ok(machine.vcpu_barrier.stop_others(vcpu.id())?))?;
        timeline.step(ForkStep::Complete, || vcpu.complete_exit().map_err(Error::Complete))?;
        let devices = machine.devices.pause();
        let state =
            timeline.step(ForkStep::Capture, || capture(machine, &order, vcpu, &stopped, &devices))?;
        children.wake()?;
        let files = plan.files().to_vec();
        let (image, rebase) = timeline.step(ForkStep::Freeze, || {
            let changes = memory.changes(&machine.handles.page_map)?;
            let rebase = self.rebase(&changes);
            if rebase != Rebase::No {
                // Where there is no spare VM yet, it is being built while memory is copied.
                machine.spare_vm.prepare(machine);
            }
            Ok((memory.freeze(plan, changes)?, rebase))
        })?;
        timeline.step(ForkStep::HandOver, || children.hand_over(&capsule::pack(&state, &image, &files)?))?;
        let switch = timeline.step(ForkStep::Restore, || {
            let switch = (rebase != Rebase::No).then(|| VmSwitch::prepare(machine, &state, &image));
            match switch {
                Some(Err(error)) if rebase == Rebase::Preferred => {
                    tracing::warn!(error = chain(&error), "a VM whose memory was copied keeps it");
                    Ok(None)
                }
                switch => Ok(switch.transpose()?),
            }
        })?;
        timeline.step(ForkStep::Launch, || children.wait(began, self.max_pause))?;
        let signal = timeline.step(ForkStep::Signal, || match &order {
            ForkOrder::Guest { seq, count, .. } => {
                Ok(Some(RoleSignal::to_parent(machine, *seq, *count, children.copy_list()?)?))
            }
            ForkOrder::Operator { .. } => Ok(None),
        })?;
        let children = timeline.step(ForkStep::Commit, || children.commit())?;
        timeline.step(ForkStep::Thaw, || {
            let retired = switch.map(|switch| switch.take_over(machine, &mut memory, vcpu, &stopped));
            self.is_cleaning_up.fetch_or(retired.is_some(), Ordering::Relaxed);
            signal.map_or(Ok(()), |signal| signal.give(machine))?;
            drop((devices, stopped));
            self.forks.store(true, Ordering::Relaxed);
            Ok(DeferredCleanup { count: order.count(), children, retired })
        })
    }
}

/// Reads the state of the machine. All vCPUs are stopped, and have completed their exits.
fn capture(
    machine: &Machine,
    order: &ForkOrder,
    vcpu: &Vcpu,
    stopped: &StoppedVcpus<'_>,
    devices: &PausedDevices<'_>,
) -> Result<MachineState, Error> {
    // Before the VM's part: reading a vCPU's run state takes in what is pending.
    let mut vcpus = stopped.states(vcpu.save().map_err(Error::Capture)?)?;
    let (vm, clock_read_at) = machine.vm.get().save().map_err(Error::Capture)?;
    let host = &machine.handles.host.model;
    kvm::align(&mut vcpus, clock_read_at, TscRate::new(machine.tsc_khz, host.tsc_khz), host.tsc_steady);
    Ok(MachineState {
        config: machine.config,
        vcpus,
        vm,
        devices: devices.save()?,
        control_page: match order {
            ForkOrder::Guest { seq, .. } => ControlPageState::forked(*seq),
            ForkOrder::Operator { .. } => machine.control_page.save()?,
        },
        tsc_khz: machine.tsc_khz,
        capabilities: host.capabilities.clone(),
    })
}
