//! Whose request it is that a copy finds itself about to make.

use std::mem::offset_of;

use nix::sys::signal::Signal;
use vmfork_abi::{ErrorCode, Identity, PAGE, Request, Role, Status};
use vmfork_tests::{
    bare_guest::{Script, control},
    vmm::Vmm,
};

use super::{ERROR, ROLE, STATUS, printed};

/// The guest's own memory, out of the way of the script.
const SCRATCH: u64 = 0x100_0000;

/// Bytes of an ID.
const ID_BYTES: u64 = 16;

/// Keeps the ID of this VM, in its copies too.
pub(super) fn keep_id() -> Script {
    Script::new().copy(control(PAGE.identity.offset + offset_of!(Identity, vm_id)), SCRATCH, ID_BYTES)
}

/// Writes a request for a child of the VM whose ID is kept.
pub(super) fn request(script: Script, seq: u64) -> Script {
    let asker = control(PAGE.request.offset + offset_of!(Request, asker));
    script.request(seq, "web", 1).copy(SCRATCH, asker, ID_BYTES)
}

#[test]
fn a_request_is_refused_in_a_copy_that_came_about_after_it_was_written() {
    let waits = request(keep_id(), 1);
    let waits = waits.print(SCRATCH).wait_for_input_or(control(PAGE.generation.offset), 1);
    let once = waits.ring().print(control(STATUS)).print(control(ERROR)).print(control(ROLE));
    let twice = request(once, 2).ring().print(control(STATUS)).print(control(ERROR));
    let kernel = twice.hang().to_kernel();
    let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.wait_for_lines("", 1).expect("a guest that waits");
    running.ask(&["fork", "vm"]).expect("a copy");
    running.wait_for_lines("", 1 + 5).expect("what the operator's copy is told");
    running.type_bytes(b"!").expect("a guest that waits");
    running.wait_for_lines("", 1 + 5 + 5 + 5 + 2).expect("what the others are told");
    running.signal(Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");

    let made = [Status::Forked.number(), ErrorCode::None.number()];
    let refused = [Status::Failed.number(), ErrorCode::Copied.number()];
    let [parent, child] = [Role::Parent, Role::Child].map(|role| [role.number()]);
    assert_eq!(printed(&ended, "vm.1"), [&refused[..], &child, &refused].concat());
    assert_eq!(printed(&ended, "vm")[1..], [&made[..], &parent, &made].concat());
    // Neither may a child make its parent's.
    assert_eq!(printed(&ended, "web.2"), [&made[..], &child, &refused].concat());
    assert_eq!(printed(&ended, "web.3"), made);
}
