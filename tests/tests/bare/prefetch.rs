//! Pages that copies write to first: made ready for those that come later.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use vmfork_tests::{
    user_guest::{self, Order},
    vmm::Vmm,
};

/// What a child writes to: 4 MiB.
const PAGES: u32 = 1024;
/// What a warm VM then has, at the least: more than anything else that a child does (28 KiB). It is not all
/// that a child writes to, for no child is recorded for more than 200 ms.
const BYTES: u64 = 256 << 10;

/// How much of guests' memory a process has for itself, in bytes.
fn private_bytes(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut is_guests = false;
    let mut bytes = 0;
    for line in maps.lines() {
        match line.split_once(':') {
            // The first line of a mapping has its name, and those that follow begin with words.
            Some((word, value))
                if word.chars().all(|letter| letter.is_ascii_alphabetic() || letter == '_') =>
            {
                if is_guests && word == "Private_Dirty" {
                    bytes += value.trim().trim_end_matches(" kB").parse::<u64>().expect("a size") << 10;
                }
            }
            _ => is_guests = line.contains("/memfd:vm-ram"),
        }
    }
    bytes
}

/// Has copies write to much, one after another, up to `most` of them: how many it takes until a warm VM has
/// as much of their memory.
fn copies_until_ready(options: &[&str], most: usize) -> Option<usize> {
    let kernel = user_guest::kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "1");
    let mut running =
        options.iter().fold(vmm, |vmm, option| vmm.flag(option)).start().expect("host-vmm starts");
    running.wait_for_line("00000001").expect("a guest that takes orders");
    let mut vms = BTreeSet::from([running.node("vm").expect("a node")]);
    (0..most).find(|_| {
        let order = Order { count: 1, rewrite_pages: PAGES, ..Order::default() };
        running.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
        let mut awaited = BTreeSet::from(["forked", "started", "ended"]);
        while !awaited.is_empty() {
            let event = running.next_event().expect("a fork, a child, and its end");
            let kind = event["event"].as_str().expect("a kind of event");
            if kind == "started" {
                vms.insert(event["pid"].as_u64().expect("a process").try_into().expect("its number"));
            }
            awaited.remove(kind);
        }
        // On a machine with nothing else to do, it takes 50 ms.
        thread::sleep(Duration::from_millis(300));
        let mut nodes = running.nodes().expect("processes").into_iter();
        nodes.any(|pid| !vms.contains(&pid) && private_bytes(pid) >= BYTES)
    })
}

/// Where the machine has much else to do, a child may not be recorded to its end, and another one is after 64
/// forks.
#[test]
fn a_warm_vm_that_stands_by_has_what_copies_write_to() {
    assert!(copies_until_ready(&[], 150).is_some());
}

#[test]
fn nothing_is_made_ready_where_the_operator_does_not_want_it() {
    assert_eq!(copies_until_ready(&["--no-prefetch"], 4), None);
}
