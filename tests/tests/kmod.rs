//! The lean kernel, and what the kernel module offers in it.

use vmfork_tests::vmm::{Ended, Vmm};

const TEST_GUEST: &str = "/usr/bin/test-guest";

/// What a kernel's log has only where something is wrong.
const COMPLAINTS: [&str; 10] = [
    "WARNING:",
    "cut here",
    "Call Trace",
    "Unhandled",
    "unchecked MSR",
    "soft lockup",
    "BUG:",
    "Oops",
    "Failed",
    "failed",
];

/// A guest with the lean kernel that runs a command of `test-guest`.
fn guest(command: &[&str]) -> Vmm {
    Vmm::lean("minimal.cpio", &[&[TEST_GUEST], command].concat())
}

/// Runs to the end, which must be a good one.
fn run(vmm: Vmm) -> Ended {
    let ended = vmm.start().expect("host-vmm starts").end().expect("host-vmm ends");
    assert_eq!(ended.code, Some(0), "{:?}", ended.lines(""));
    ended
}

#[test]
fn lean_kernel_boots_without_complaints_and_takes_input() {
    let mut running = guest(&["hello"]).option("--cpus", "2").start().expect("host-vmm starts");
    running.wait_for_line("READY").expect("a guest that is ready");
    running.type_line("are you there").expect("a console that takes input");
    running.wait_for_line("HELLO are you there").expect("an answer");
    assert_eq!(running.end().expect("host-vmm ends").code, Some(0));

    let log = run(guest(&["kernel-log"])).lines("LOG ");
    assert!(log.len() > 50, "{log:?}");
    let complaints = log.iter().filter(|(_, line)| COMPLAINTS.iter().any(|bad| line.contains(bad)));
    assert_eq!(complaints.collect::<Vec<_>>(), [] as [&(String, String); 0]);
}
