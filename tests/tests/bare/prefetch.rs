//! Pages that copies write to first: made ready for those that come later.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use vmfork_tests::{
    user::{self, Order},
    vmm::{Running, Vmm},
};

use super::left_behind::become_equal;

/// What a child writes to: 4 MiB, and more than anything else that it does.
const PAGES: u32 = 1024;
const BYTES: u64 = PAGES as u64 * 4096;

fn private_bytes(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:"));
    line.map_or(0, |line| line.trim().trim_end_matches(" kB").parse::<u64>().expect("a size") << 10)
}

/// A platform on which copies have written to much, and what tells the most private memory that any node has but the booted VM's.
fn start(options: &[&str]) -> (Running, impl Fn(&Running) -> u64) {
    let kernel = user::kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "1");
    let mut running = options.iter().fold(vmm, |vmm, option| vmm.flag(option)).start().expect("host-vmm starts");
    running.wait_for_line("00000001").expect("a guest that takes orders");
    let vm = running.node("vm").expect("a node");
    let others = move |running: &Running| {
        let nodes = running.nodes().expect("processes").into_iter().filter(|pid| *pid != vm);
        nodes.map(private_bytes).max().unwrap_or(0)
    };
    for _ in 0..3 {
        let order = Order { count: 1, rewrite_pages: PAGES, ..Order::default() };
        running.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
        let mut awaited = BTreeSet::from(["forked", "ended"]);
        let both = |event: &serde_json::Value| {
            awaited.remove(event["event"].as_str().expect("a kind of event"));
            awaited.is_empty().then_some(())
        };
        running.wait_for("a fork, and the child's end", both).expect("a fork, and the child's end");
    }
    (running, others)
}

#[test]
fn a_shell_that_stands_by_has_what_copies_write_to() {
    let (running, others) = start(&[]);
    become_equal(|| others(&running) >= BYTES, || true);
}

#[test]
fn nothing_is_made_ready_where_the_operator_does_not_want_it() {
    let (running, others) = start(&["--no-prefetch"]);
    // Where it is wanted, it is there after 50 ms.
    thread::sleep(Duration::from_secs(1));
    assert!(others(&running) < BYTES);
}
