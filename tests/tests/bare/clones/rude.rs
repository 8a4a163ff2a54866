//! Peers that say more than anybody wants to read, and what a terminal should not.

use serde_json::Value;
use vmfork_abi::{Role, flags};
use vmfork_tests::{
    bare_guest::{Script, control},
    cluster::Platforms,
    peer::{Answer, Peer},
    vmm::{Running, Vmm},
};

use super::{
    FORKED, INDEX, NO_PLACE, ROLE, describes_itself, fork_again, know_each_other, then_fork_when_told, vms,
};

/// Longest text that anybody is told of what a peer has said, in bytes: a reason, and what is said around it.
const MOST_BYTES: usize = 4096 + 200;

/// Orders for a terminal: its title, its clipboard, a C1 control, text in another order.
const ORDERS: &str = "\x1b]2;mine\x07\x1b]52;c;eA==\x07\u{9b}2J\u{202e}\r";

/// Checks that a text is one for people.
#[track_caller]
fn assert_decent(text: &str) {
    assert!(text.len() <= MOST_BYTES, "{} bytes", text.len());
    let is_order = |character: char| character.is_control() && character != '\n' || character == '\u{202e}';
    assert!(!text.contains(is_order), "{text:?}");
}

/// Checks what was reported of so many forks.
fn assert_reports(running: &mut Running, count: usize) {
    let mut reports = Vec::new();
    let all = |event: &Value| {
        reports.extend(
            (event["event"] == "forked").then(|| event["why"].as_str().unwrap_or_default().to_owned()),
        );
        (reports.len() == count).then_some(())
    };
    running.wait_for("all reports", all).expect("all reports");
    reports.iter().for_each(|why| assert_decent(why));
}

#[test]
fn whatever_a_peer_says_the_vm_goes_on() {
    let platforms = Platforms::new(&["a", "b"]);
    let long = |bytes: usize| format!("{}{ORDERS}", "x".repeat(bytes));
    // From 4 KiB on it was too long for one message, from 64 KiB and 200 KiB on for others.
    let answers = [0, 4090, 5_000, 70_000, 300_000].map(|bytes| Answer::Refuses(long(bytes)));
    let answers = answers.into_iter().chain([Answer::Undoes(long(70_000))]);
    let forks = answers.clone().count();
    // It forks elsewhere, and at last here.
    let away = (1..=forks as u64 + 1)
        .fold(Script::new(), |script, seq| then_fork_when_told(script, seq, 1, flags::REMOTE));
    let here = away.wait_for_input().request(99, "web", 1).store(control(super::FLAGS), 0).ring();
    let script =
        here.only_if(control(ROLE), Role::Child.number(), Script::new().print(control(INDEX)).hang());
    let kernel = script.hang().to_kernel();
    let source =
        Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", super::LONG_LEASE));
    let mut source = source.start().expect("host-vmm starts");
    let peer = Peer::start("b", platforms.address("b"), &describes_itself(&source, "a"));
    know_each_other(&source, 2);
    let mut outcomes = Vec::new();
    for answer in answers {
        peer.answer(answer);
        // The guest's own fork fails, and says so to the guest.
        outcomes.push(NO_PLACE);
        assert_eq!(fork_again(&mut source, outcomes.len()), outcomes);
        // So does an operator's, of the same VM.
        let refused = source.ask(&["clone", "--vm", "vm", "--to", "b"]).expect_err("a refusal").to_string();
        assert!(refused.contains("the VM vm was not forked") || refused.contains("can't"), "{refused}");
        assert_decent(&refused);
    }
    assert_reports(&mut source, 2 * forks);
    // One that claims to run copies gives them names.
    peer.answer(Answer::Runs(long(70_000)));
    outcomes.push(FORKED);
    assert_eq!(fork_again(&mut source, outcomes.len()), outcomes);
    let named = |event: &Value| (event["event"] == "sent").then(|| event["name"].clone());
    assert_decent(source.wait_for("a copy", named).expect("a copy").as_str().expect("a name"));
    assert_decent(&source.ask(&["clone", "--vm", "vm", "--to", "b"]).expect("a copy"));
    // The VM is as it was, and forks here.
    source.type_bytes(b"!").expect("a guest that waits");
    vms(&source, 2);
}
