//! Where what is shown, logged or told goes to nobody: VMs go on.

use std::{
    fs::File,
    io::{PipeReader, PipeWriter, Read, Write, pipe},
    os::fd::AsFd,
    process::Stdio,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::signal::Signal,
};
use vmfork_abi::{Role, Status};
use vmfork_tests::{
    bare_guest::{Script, control},
    process::{self, Resource},
    vmm::{Running, Vmm, console_line},
};

use super::{ERROR, ROLE, STATUS};

/// The least that a pipe holds, in bytes.
const PIPE_BYTES: usize = 4096;

/// Lines that a guest prints at once: more than a pipe holds.
const LINES: usize = 1000;

/// A pipe that takes nothing more until somebody reads from it.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = pipe().expect("a pipe");
    let bytes = i32::try_from(PIPE_BYTES).expect("small");
    fcntl(writer.as_fd(), FcntlArg::F_SETPIPE_SZ(bytes)).expect("a small pipe");
    writer.write_all(&[b'.'; PIPE_BYTES]).expect("room");
    (reader, writer)
}

/// A guest that prints much each time it is told to, and then forks, and prints how that went.
fn printer() -> Script {
    (1..=2).fold(Script::new(), |script, seq| {
        let much = (0..LINES).fold(script.wait_for_input(), |script, _| script.print(control(STATUS)));
        let fork = much.request(seq, "web", 2).ring().print(control(STATUS)).print(control(ERROR));
        let child = (0..LINES).fold(Script::new(), |script, _| script.print(control(ROLE))).off();
        fork.only_if(control(ROLE), Role::Child.number(), child)
    })
}

/// Has the guest print and fork once more, and looks whether it has.
fn goes_on(running: &mut Running, round: usize) {
    running.type_bytes(b"!").expect("a guest that waits");
    let mut lines = Vec::new();
    let of_parent = round * (LINES + 2);
    let printed = running.wait_for("what the guest prints", |event| {
        lines.extend(console_line(event, "").filter(|(name, _)| name == "vm").map(|(_, line)| line));
        (lines.len() == of_parent).then_some(())
    });
    printed.expect("the guest goes on");
    let forked = [format!("{:08x}", Status::Forked.number()), "00000000".to_owned()];
    assert_eq!(lines[of_parent - 2..], forked);
    let mut ended = 0;
    let copies = running.wait_for("the ends of the copies", |event| {
        ended += usize::from(event["event"] == "ended" && event["how"] == "PoweredOff");
        (ended == 2 * round).then_some(())
    });
    copies.expect("the copies go on");
}

#[test]
fn where_nobody_takes_what_is_shown_vms_go_on_and_the_platform_ends_when_it_is_to() {
    let kernel = printer().to_kernel();
    let full = || File::options().write(true).open("/dev/full").expect("/dev/full");
    let stalled = [full_pipe(), full_pipe()];
    let [(_first, stdout), (_second, stderr)] = &stalled;
    let again = |writer: &PipeWriter| Stdio::from(writer.try_clone().expect("a pipe"));
    let gone = || pipe().expect("a pipe").1;
    for (what, output) in [
        ("nobody reads", [again(stdout), again(stderr)]),
        ("whoever has read is gone", [gone().into(), gone().into()]),
        ("the disk is full", [full().into(), full().into()]),
    ] {
        println!("{what}");
        let [stdout, stderr] = output;
        let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").log_level("debug").output(stdout, stderr);
        let mut running = vmm.start().expect("host-vmm starts");
        goes_on(&mut running, 1);
        // What an operator asks does not depend on it either, nor on others who ask and don't listen.
        let mut deaf = running.start(&["logs", "--follow", "vm"]).expect("host-vmm logs");
        running.ask(&["ps"]).expect("a list");
        goes_on(&mut running, 2);
        running.ask(&["fork", "vm"]).expect("a fork");
        assert_eq!(running.log("vm").expect("a log").lines().count(), 2 * (LINES + 2));
        running.signal(Signal::SIGTERM).expect("a signal");
        let ended = running.end().expect("host-vmm ends");
        assert_eq!(ended.code, Some(128 + Signal::SIGTERM as i32));
        deaf.kill().and_then(|()| deaf.wait()).expect("a process that can be ended");
    }
}

#[test]
fn logs_that_can_not_be_written_are_told_of_once_and_not_for_each_write() {
    let kernel = printer().to_kernel();
    let (mut reader, writer) = pipe().expect("a pipe");
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").output(Stdio::null(), writer);
    let mut running = vmm.start().expect("host-vmm starts");
    running.wait_for("the VM", |event| (event["event"] == "started").then_some(())).expect("a VM");
    process::limit(running.pid(), Resource::Fsize, Some(0)).expect("a limit");
    running.type_bytes(b"!").expect("a guest that waits");
    let mut lines = 0;
    let printed = running.wait_for("what the guest prints", |event| {
        lines += usize::from(console_line(event, "").is_some());
        (lines == LINES).then_some(())
    });
    printed.expect("the guest goes on");
    running.signal(Signal::SIGTERM).expect("a signal");
    running.end().expect("host-vmm ends");
    let mut said = String::new();
    reader.read_to_string(&mut said).expect("text");
    for told in ["can't be logged at present", "bytes of console output are missing in the logs"] {
        assert_eq!(said.matches(told).count(), 1, "{said}");
    }
}
