//! Where vCPU threads stop, and how they end.
//!
//! A vCPU that was kicked comes to [`Gate::pass`]. While somebody holds [`Stopped`], it completes its pending exit, reads its own
//! state (KVM wants a vCPU's calls from its own thread), and waits there. Each vCPU of a fork thus saves itself, all at once.
//!
//! Who needs the thread of a vCPU, whichever it is, [calls](Gate::call): the next one that passes hears of it.

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
pub enum GateError {
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

/// How a vCPU comes out of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passage {
    /// It runs on.
    Free,
    /// It is called, and runs on when it has seen what for.
    Called,
    /// The VM has ended.
    Ended,
}

/// The gate of one VM.
#[derive(Debug)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// A handle to each vCPU.
    kickers: Vec<Kicker>,
    /// The vCPUs as which those that wait are to go on.
    successors: Vec<Option<Vcpu>>,
    /// What they have been until then.
    left_behind: Vec<Vcpu>,
    /// The stop that is in force. Each has a number of its own, so that a vCPU can't take one for the next.
    stop: Option<u64>,
    /// Stops so far.
    stops: u64,
    /// Whether somebody calls, and none has heard of it yet.
    is_called: bool,
    /// What each vCPU that waits at the gate has saved.
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

impl Gate {
    /// The gate for these vCPUs.
    pub fn new(vcpus: &[Vcpu]) -> Self {
        let parked = vcpus.iter().map(|_| None).collect();
        let successors = vcpus.iter().map(|_| None).collect();
        let kickers = vcpus.iter().map(|vcpu| vcpu.kicker().clone()).collect();
        let (left_behind, stop, stops, is_called, end) = (Vec::new(), None, 0, false, None);
        let state = State { kickers, successors, left_behind, stop, stops, is_called, parked, end };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Stops all vCPUs but `me`, which the caller runs. They go on when the result is dropped.
    ///
    /// # Errors
    /// [`GateError`]; the vCPUs run on then.
    pub fn stop_others(&self, me: VcpuId) -> Result<Stopped<'_>, GateError> {
        let mut state = lock(&self.state);
        if state.end.is_some() {
            return Err(GateError::Ended);
        }
        if state.stop.is_some() {
            return Err(GateError::Busy);
        }
        state.stops += 1;
        state.stop = Some(state.stops);
        for (_, kicker) in state.others(me) {
            kicker.kick();
        }
        drop(state);
        // From here on, dropping it lets everybody go on.
        let stopped = Stopped { gate: self, me };
        self.wait_parked(me)?;
        Ok(stopped)
    }

    fn wait_parked(&self, me: VcpuId) -> Result<(), GateError> {
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut state = lock(&self.state);
        loop {
            let Some((missing, _)) = state.others(me).find(|(id, _)| state.parked[id.index()].is_none()) else {
                return Ok(());
            };
            if state.end.is_some() {
                return Err(GateError::Ended);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GateError::Timeout(missing));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Calls the thread of some vCPU out of the guest, between two instructions: of the last one, for the first one has most to do in most
    /// guests.
    pub fn call(&self) {
        let mut state = lock(&self.state);
        state.is_called = true;
        if let Some(last) = state.kickers.last() {
            last.kick();
        }
    }

    /// Waits while the vCPUs are stopped. Called by a vCPU's thread when it was kicked.
    ///
    /// # Errors
    /// [`kvm::Error`] where the guest can't be told that it was stopped.
    pub(super) fn pass(&self, vcpu: &mut Vcpu) -> Result<Passage, kvm::Error> {
        loop {
            // Before the state is looked at: a kick that comes later is for something that comes later.
            vcpu.kicker().clear();
            let mut state = lock(&self.state);
            let Some(stop) = state.wants_stop() else {
                let is_called = std::mem::take(&mut state.is_called);
                return Ok(match state.end {
                    Some(_) => Passage::Ended,
                    None if is_called => Passage::Called,
                    None => Passage::Free,
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
        if let Some(successor) = state.successors[me.index()].take() {
            successor.kicker().adopt();
            state.left_behind.push(std::mem::replace(vcpu, successor));
            self.changed.notify_all();
        }
    }

    /// Waits until each vCPU that was to go on as another one does, and takes what they have been until then.
    pub(super) fn take_left_behind(&self) -> Vec<Vcpu> {
        let mut state = lock(&self.state);
        while state.end.is_none() && state.successors.iter().any(Option::is_some) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut state.left_behind)
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
pub struct Stopped<'g> {
    gate: &'g Gate,
    me: VcpuId,
}

impl Stopped<'_> {
    /// States of all vCPUs, lowest first: those that wait at the gate, and the caller's own. Can be had once.
    ///
    /// # Errors
    /// [`GateError::Save`] where a vCPU could not read its state, [`GateError::Ended`] where the VM ended meanwhile.
    pub fn states(&self, own: VcpuState) -> Result<Vec<VcpuState>, GateError> {
        let mut state = lock(&self.gate.state);
        // The vCPUs go on waiting here: it is the stop that holds them, not what they saved.
        state.parked[self.me.index()] = Some(Ok(own));
        let states = state.parked.iter_mut().map(|slot| slot.take().ok_or(GateError::Ended)?.map_err(GateError::Save));
        states.collect()
    }

    /// Makes each vCPU go on as another one when the stop is over: `vcpu`, which is the caller's, at once.
    pub(super) fn hand_on(&self, successors: Vec<Vcpu>, vcpu: &mut Vcpu) {
        let mut state = lock(&self.gate.state);
        state.kickers = successors.iter().map(|successor| successor.kicker().clone()).collect();
        state.successors = successors.into_iter().map(Some).collect();
        if let Some(own) = state.successors[self.me.index()].take() {
            own.kicker().adopt();
            state.left_behind.push(std::mem::replace(vcpu, own));
        }
        // An end or a call that came meanwhile has kicked those that are left behind.
        if state.end.is_some() || state.is_called {
            state.kickers.iter().for_each(Kicker::kick);
        }
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        lock(&self.gate.state).stop = None;
        self.gate.changed.notify_all();
    }
}
