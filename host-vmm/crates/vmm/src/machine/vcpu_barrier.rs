//! The barrier at which vCPU threads stop, and by which they end.
//!
//! A vCPU that was kicked comes to [`VcpuBarrier::checkpoint`]. While somebody holds [`StoppedVcpus`], it
//! completes its pending exit, reads its own state (KVM wants a vCPU's calls from its own thread), and waits
//! there. Each vCPU of a fork thus saves itself, all at once.
//!
//! A thread that needs the thread of a vCPU, whichever it is, [asks for one](VcpuBarrier::request_service):
//! the next one that comes to the checkpoint takes the request.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use base::sync::lock;
use types::ExitReason;

use crate::{
    arch::VcpuId,
    kvm::{self, Kicker, Vcpu, VcpuState},
};

/// A vCPU leaves guest code within microseconds; one that has not after so long never will.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the vCPUs can't be stopped.
#[derive(Debug, thiserror::Error)]
pub enum BarrierError {
    /// Somebody else is stopping them.
    #[error("the vCPUs are being stopped already")]
    Busy,
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
    /// A vCPU does not stop.
    #[error("{0} did not stop within {STOP_TIMEOUT:?}")]
    Timeout(VcpuId),
    /// A vCPU's state can't be read.
    #[error("can't stop or save a vCPU")]
    Save(#[source] kvm::Error),
}

/// What a vCPU does after a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resume {
    /// It runs its guest on.
    Guest,
    /// It takes the request that is there, and then runs its guest on.
    Service,
    /// The VM has ended.
    Ended,
}

/// The barrier of one VM's vCPUs.
#[derive(Debug)]
pub struct VcpuBarrier {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// A handle to each vCPU.
    kickers: Vec<Kicker>,
    /// The vCPUs that replace those that wait, when these go on.
    replacements: Vec<Option<Vcpu>>,
    /// The vCPUs that were replaced.
    retired: Vec<Vcpu>,
    /// The stop that is in force. Each has a number of its own, so that a vCPU can't take one for the next.
    stop: Option<u64>,
    /// Stops so far.
    stops: u64,
    /// Whether a request is there that no vCPU has taken yet.
    has_request: bool,
    /// What each vCPU that waits at the barrier has saved.
    parked: Vec<Option<Result<VcpuState, kvm::Error>>>,
    end: Option<ExitReason>,
}

impl State {
    fn wants_stop(&self) -> Option<u64> {
        self.stop.filter(|_| self.end.is_none())
    }

    fn others(&self, me: VcpuId) -> impl Iterator<Item = (VcpuId, &Kicker)> {
        (0..).map(VcpuId).zip(&self.kickers).filter(move |(id, _)| *id != me)
    }
}

impl VcpuBarrier {
    /// The barrier for these vCPUs.
    pub fn new(vcpus: &[Vcpu]) -> Self {
        let parked = vcpus.iter().map(|_| None).collect();
        let replacements = vcpus.iter().map(|_| None).collect();
        let kickers = vcpus.iter().map(|vcpu| vcpu.kicker().clone()).collect();
        let (retired, stop, stops, has_request, end) = (Vec::new(), None, 0, false, None);
        let state = State { kickers, replacements, retired, stop, stops, has_request, parked, end };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Stops all vCPUs but `me`, which the caller runs. They go on when the result is dropped.
    ///
    /// # Errors
    /// [`BarrierError`]; the vCPUs run on then.
    pub fn stop_others(&self, me: VcpuId) -> Result<StoppedVcpus<'_>, BarrierError> {
        let mut state = lock(&self.state);
        if state.end.is_some() {
            return Err(BarrierError::Ended);
        }
        if state.stop.is_some() {
            return Err(BarrierError::Busy);
        }
        state.stops += 1;
        state.stop = Some(state.stops);
        for (_, kicker) in state.others(me) {
            kicker.kick();
        }
        drop(state);
        // From here on, dropping it lets everybody go on.
        let stopped = StoppedVcpus { vcpu_barrier: self, me };
        self.wait_parked(me)?;
        Ok(stopped)
    }

    fn wait_parked(&self, me: VcpuId) -> Result<(), BarrierError> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut state = lock(&self.state);
        loop {
            let Some((missing, _)) = state.others(me).find(|(id, _)| state.parked[id.index()].is_none())
            else {
                return Ok(());
            };
            if state.end.is_some() {
                return Err(BarrierError::Ended);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(BarrierError::Timeout(missing));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Requests that the thread of some vCPU leaves its guest, between two instructions: of the last one, for
    /// the first one has most to do in most guests.
    pub fn request_service(&self) {
        let mut state = lock(&self.state);
        state.has_request = true;
        if let Some(last) = state.kickers.last() {
            last.kick();
        }
    }

    /// Waits while the vCPUs are stopped. Called by a vCPU's thread when it was kicked.
    ///
    /// # Errors
    /// [`kvm::Error`] where the guest can't be told that it was stopped.
    pub(super) fn checkpoint(&self, vcpu: &mut Vcpu) -> Result<Resume, kvm::Error> {
        loop {
            // Before the state is looked at: a kick that comes later is for something that comes later.
            vcpu.kicker().clear();
            let mut state = lock(&self.state);
            let Some(stop) = state.wants_stop() else {
                let has_request = std::mem::take(&mut state.has_request);
                return Ok(match state.end {
                    Some(_) => Resume::Ended,
                    None if has_request => Resume::Service,
                    None => Resume::Guest,
                });
            };
            drop(state);
            let saved = vcpu.complete_exit().and_then(|()| vcpu.save());
            self.park(vcpu, stop, saved);
            vcpu.tell_paused()?;
        }
    }

    fn park(&self, vcpu: &mut Vcpu, stop: u64, saved: Result<VcpuState, kvm::Error>) {
        let me = vcpu.id();
        let mut state = lock(&self.state);
        if state.stop == Some(stop) {
            state.parked[me.index()] = Some(saved);
            self.changed.notify_all();
        }
        while state.wants_stop() == Some(stop) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked[me.index()] = None;
        if let Some(replacement) = state.replacements[me.index()].take() {
            replacement.kicker().adopt();
            state.retired.push(std::mem::replace(vcpu, replacement));
            self.changed.notify_all();
        }
    }

    /// Waits until each vCPU that is to be replaced is, and takes those that were.
    pub(super) fn take_retired(&self) -> Vec<Vcpu> {
        let mut state = lock(&self.state);
        while state.end.is_none() && state.replacements.iter().any(Option::is_some) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut state.retired)
    }

    /// Ends the VM, unless it has ended already: all vCPU threads leave.
    pub fn end(&self, end: ExitReason) {
        let mut state = lock(&self.state);
        state.end.get_or_insert(end);
        for kicker in &state.kickers {
            kicker.kick();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// How the VM ended, if it has.
    pub fn ended(&self) -> Option<ExitReason> {
        lock(&self.state).end.clone()
    }
}

/// All vCPUs but the caller's own are stopped for as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct StoppedVcpus<'g> {
    vcpu_barrier: &'g VcpuBarrier,
    me: VcpuId,
}

impl StoppedVcpus<'_> {
    /// States of all vCPUs, lowest first: those that wait at the barrier, and the caller's own. Can be had
    /// once.
    ///
    /// # Errors
    /// [`BarrierError::Save`] where a vCPU could not read its state, [`BarrierError::Ended`] where the VM
    /// ended meanwhile.
    pub fn states(&self, own: VcpuState) -> Result<Vec<VcpuState>, BarrierError> {
        let mut state = lock(&self.vcpu_barrier.state);
        // The vCPUs go on waiting here: it is the stop that holds them, not what they saved.
        state.parked[self.me.index()] = Some(Ok(own));
        let states = state
            .parked
            .iter_mut()
            .map(|slot| slot.take().ok_or(BarrierError::Ended)?.map_err(BarrierError::Save));
        states.collect()
    }

    /// Replaces each vCPU when the stop is over: `vcpu`, which is the caller's, at once.
    pub(super) fn replace_vcpus(&self, replacements: Vec<Vcpu>, vcpu: &mut Vcpu) {
        let mut state = lock(&self.vcpu_barrier.state);
        state.kickers = replacements.iter().map(|replacement| replacement.kicker().clone()).collect();
        state.replacements = replacements.into_iter().map(Some).collect();
        if let Some(own) = state.replacements[self.me.index()].take() {
            own.kicker().adopt();
            state.retired.push(std::mem::replace(vcpu, own));
        }
        // An end or a request that came meanwhile has kicked those that were replaced.
        if state.end.is_some() || state.has_request {
            state.kickers.iter().for_each(Kicker::kick);
        }
    }
}

impl Drop for StoppedVcpus<'_> {
    fn drop(&mut self) {
        lock(&self.vcpu_barrier.state).stop = None;
        self.vcpu_barrier.changed.notify_all();
    }
}
