//! Running a machine: a thread for each vCPU, and what each exit means.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use base::{clock, text::Reason};
use types::ExitReason;
use vmfork_abi::doorbell;

use super::{Machine, vcpu_barrier::Resume};
use crate::{
    arch::layout::CONTROL_PAGE,
    devices::bus::{Action, Space},
    kvm::{self, Exit, Vcpu},
};

/// Multiple of a head start that others without work are waited for.
const MOST_AWAITED: u32 = 20;

/// What to do after an exit, once the exit's data are let go.
enum Next {
    Run,
    /// The doorbell was rung with this command, if it was one.
    Ring(Option<u32>),
    /// The vCPU was kicked.
    Checkpoint,
    End(ExitReason),
}

/// The request for which a vCPU's thread has left its guest, between two instructions. The guest goes on when
/// it is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceRequest {
    /// The guest has rung the doorbell: with this command, or `None` where the access was malformed.
    Doorbell(Option<u32>),
    /// A thread of this process [has asked](super::VcpuBarrier::request_service) for a vCPU's thread.
    Host,
}

/// Runs the vCPUs until the VM ends, and says how it did: the first one on the calling thread, each of the
/// others on its own. The others [have a head start](await_others) before the first one, which is none but
/// where a test asks for it.
///
/// `answer` is called on the thread of the vCPU that has left its guest for a request.
pub fn run(
    machine: &Arc<Machine>,
    vcpus: Vec<Vcpu>,
    head_start: Duration,
    answer: impl Fn(&mut Vcpu, ServiceRequest) + Send + Sync,
) -> ExitReason {
    let mut vcpus = vcpus.into_iter();
    let first = vcpus.next();
    thread::scope(|scope| {
        for vcpu in vcpus {
            let name = vcpu.id().to_string();
            let answer = &answer;
            let run = move || run_vcpu(machine, vcpu, answer);
            let spawned = thread::Builder::new().name(name).spawn_scoped(scope, run);
            if let Err(error) = spawned {
                machine.vcpu_barrier.end(ExitReason::Broken(Reason::of(format_args!(
                    "can't start a vCPU's thread: {error}"
                ))));
            }
        }
        if let Some(first) = first {
            if !head_start.is_zero() {
                await_others(head_start);
            }
            run_vcpu(machine, first, &answer);
        }
    });
    // Each vCPU has left because of it.
    machine.vcpu_barrier.ended().unwrap_or_else(|| ExitReason::Broken("no vCPU is left".into()))
}

/// Waits until this process has used `head_start` of processor time, which only the vCPUs do that run: on a
/// busy machine they get theirs late. Where they have nothing to do, it waits no longer than some times that.
fn await_others(head_start: Duration) {
    let (began, used) = (Instant::now(), clock::processor_time());
    while clock::processor_time().saturating_sub(used) < head_start
        && began.elapsed() < MOST_AWAITED * head_start
    {
        thread::sleep(head_start / 20);
    }
}

/// Runs a vCPU until the VM ends. Where it can't go on, the VM has ended.
fn run_vcpu(machine: &Machine, vcpu: Vcpu, answer: impl Fn(&mut Vcpu, ServiceRequest)) {
    if let Err(error) = serve_vcpu(machine, vcpu, answer) {
        machine.vcpu_barrier.end(ExitReason::Broken(Reason::of_error(&error)));
    }
}

fn serve_vcpu(
    machine: &Machine,
    mut vcpu: Vcpu,
    answer: impl Fn(&mut Vcpu, ServiceRequest),
) -> Result<(), kvm::Error> {
    vcpu.kicker().adopt();
    loop {
        let exit = vcpu.run()?;
        machine.exits.happened();
        match serve(machine, exit) {
            Next::Run => {}
            Next::Ring(command) => answer(&mut vcpu, ServiceRequest::Doorbell(command)),
            Next::Checkpoint => match machine.vcpu_barrier.checkpoint(&mut vcpu)? {
                Resume::Guest => {}
                Resume::Service => answer(&mut vcpu, ServiceRequest::Host),
                Resume::Ended => return Ok(()),
            },
            Next::End(end) => {
                machine.vcpu_barrier.end(end);
                return Ok(());
            }
        }
    }
}

fn serve(machine: &Machine, exit: Exit<'_>) -> Next {
    match exit {
        Exit::PortWrite { port, data } => act(machine.devices.write(Space::Ports, port.into(), data)),
        Exit::PortRead { port, data } => {
            machine.devices.read(Space::Ports, port.into(), data);
            Next::Run
        }
        Exit::MmioWrite { gpa, data } => act(machine.devices.write(Space::Memory, gpa.0, data)),
        Exit::MmioRead { gpa, data } => {
            machine.devices.read(Space::Memory, gpa.0, data);
            Next::Run
        }
        Exit::Hypercall { number, arguments, result } => {
            let (answer, next) = hypercall(number, arguments);
            *result = answer.cast_unsigned();
            next
        }
        Exit::Interrupted => Next::Checkpoint,
        Exit::Shutdown => Next::End(ExitReason::Reset),
        Exit::Broken(why) => Next::End(ExitReason::Broken(why.into())),
    }
}

/// Does what a device asks for.
fn act(action: Option<Action>) -> Next {
    match action {
        None => Next::Run,
        Some(Action::Ring(command)) => Next::Ring(command),
        Some(Action::PowerOff) => Next::End(ExitReason::PoweredOff),
        Some(Action::Reset) => Next::End(ExitReason::Reset),
    }
}

/// The hypercall as a doorbell: only on the control page, and only for it as a whole.
fn hypercall(number: u64, [gpa, pages, command, _]: [u64; 4]) -> (i64, Next) {
    if number != doorbell::HYPERCALL || gpa != CONTROL_PAGE.0 || pages != 1 {
        return (doorbell::HYPERCALL_INVALID, Next::Run);
    }
    (doorbell::HYPERCALL_ANSWERED, Next::Ring(u32::try_from(command).ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_control_page_is_a_doorbell() {
        let ours = [CONTROL_PAGE.0, 1, 1, 0];
        assert!(matches!(hypercall(12, ours), (0, Next::Ring(Some(1)))));
        for (number, arguments) in [
            (11, ours),
            (12, [CONTROL_PAGE.0 + 4096, 1, 1, 0]),
            (12, [0, 1, 1, 0]),
            (12, [CONTROL_PAGE.0, 2, 1, 0]),
            (12, [CONTROL_PAGE.0, 0, 1, 0]),
        ] {
            assert!(matches!(hypercall(number, arguments), (doorbell::HYPERCALL_INVALID, Next::Run)));
        }
        assert!(matches!(hypercall(12, [CONTROL_PAGE.0, 1, u64::MAX, 0]), (0, Next::Ring(None))));
    }
}
