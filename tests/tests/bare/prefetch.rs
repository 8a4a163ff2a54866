//! Pages that copies write to first: made ready for those that come later.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use vmfork_tests::{
    user::{self, Order},
    vmm::Vmm,
};

/// What a child writes to: 4 MiB, and more than anything else that it does.
const PAGES: u32 = 1024;
const BYTES: u64 = PAGES as u64 * 4096;

fn private_bytes(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:"));
    line.map_or(0, |line| line.trim().trim_end_matches(" kB").parse::<u64>().expect("a size") << 10)
}

/// Has copies write to much, one after another, up to `most` of them: how many it takes until a node other than the booted VM's has as much
/// memory of its own, while none of them is there.
fn copies_until_ready(options: &[&str], most: usize) -> Option<usize> {
    let kernel = user::kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "1");
    let mut running = options.iter().fold(vmm, |vmm, option| vmm.flag(option)).start().expect("host-vmm starts");
    running.wait_for_line("00000001").expect("a guest that takes orders");
    let vm = running.node("vm").expect("a node");
    (0..most).find(|_| {
        let order = Order { count: 1, rewrite_pages: PAGES, ..Order::default() };
        running.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
        let mut awaited = BTreeSet::from(["forked", "ended"]);
        let both = |event: &serde_json::Value| {
            awaited.remove(event["event"].as_str().expect("a kind of event"));
            awaited.is_empty().then_some(())
        };
        running.wait_for("a fork, and the child's end", both).expect("a fork, and the child's end");
        // On a machine with nothing else to do, it takes 50 ms.
        thread::sleep(Duration::from_millis(300));
        let mut others = running.nodes().expect("processes").into_iter().filter(|pid| *pid != vm);
        others.any(|pid| private_bytes(pid) >= BYTES)
    })
}

/// Where the machine has much else to do, a child may not be recorded to its end, and another one is after 64 forks.
#[test]
fn a_shell_that_stands_by_has_what_copies_write_to() {
    assert!(copies_until_ready(&[], 150).is_some());
}

#[test]
fn nothing_is_made_ready_where_the_operator_does_not_want_it() {
    assert_eq!(copies_until_ready(&["--no-prefetch"], 4), None);
}
