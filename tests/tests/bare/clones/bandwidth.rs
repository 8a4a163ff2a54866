//! How fast a clone may be sent, and how far it is.

use std::{
    thread,
    time::{Duration, Instant},
};

use capsule::CHUNK_BYTES;
use serde_json::Value;
use tempfile::NamedTempFile;
use vmfork_abi::{Role, flags};
use vmfork_tests::{
    bare_guest::{Script, control},
    cluster::Platforms,
    proxy::{Fault, Proxy},
    user_guest::{self, Order},
    vmm::{Running, Vmm},
};

use super::{FLAGS, LOOK, ROLE, know_each_other, vms};

const BYTES_PER_SECOND: u64 = 4 << 20;
const MEMORY_BYTES: u64 = 8 << 20;
const PAGE_BYTES: u64 = 4096;

/// What may come at once: what was not used of 50 ms, and the chunk that is the next one, with some that are
/// nearly empty.
const BURST_BYTES: u64 = BYTES_PER_SECOND / 20 + CHUNK_BYTES + (64 << 10);

/// Heads of records and requests, and what platforms tell of themselves meanwhile.
const OTHER_BYTES: u64 = 256 << 10;

/// Where a guest's memory is that it writes to.
const DATA: u64 = 0x100_0000;

/// A guest that has written to its memory, and forks into a clone once it is told to. That reads what it has,
/// the last page first.
fn with_memory() -> Script {
    let pages = || (0..MEMORY_BYTES / PAGE_BYTES).map(|page| DATA + page * PAGE_BYTES);
    let script = pages().fold(Script::new(), |script, page| script.store(page, 1)).print(DATA);
    let script = script.wait_for_input().request(1, "web", 1).store(control(FLAGS), flags::REMOTE).ring();
    let read = pages().rev().step_by(256).fold(Script::new(), Script::print).hang();
    script.only_if(control(ROLE), Role::Child.number(), read).hang()
}

/// What a guest with all of its program at CPL 3 is told so that it does the same.
fn order(flags: u32) -> [u8; Order::BYTES] {
    let dirty_pages = u32::try_from(MEMORY_BYTES / PAGE_BYTES).expect("small");
    Order { count: 1, dirty_pages, stay: true, flags, ..Order::default() }.to_bytes()
}

/// Two platforms, with all that passes between them counted.
struct Paced {
    ways: [Proxy; 2],
    source: Running,
    target: Running,
    _kernel: NamedTempFile,
}

impl Paced {
    /// Starts both, the one with a guest that says when it takes orders; its configuration says so of clones
    /// too.
    fn start(kernel: NamedTempFile, clone: &str) -> Self {
        let platforms = Platforms::new(&["a", "b"]);
        let ways = ["a", "b"].map(|name| Proxy::start(platforms.address(name)).expect("a proxy"));
        let config = platforms.config_by_way("b", Some(("a", ways[0].address())), "");
        let target = Vmm::serve(&config).start().expect("a platform");
        let config = format!("[clone]\nbandwidth = {BYTES_PER_SECOND}\n{clone}");
        let config = platforms.config_by_way("a", Some(("b", ways[1].address())), &config);
        let mut source = Vmm::kernel(kernel.path())
            .option("--mem", "64M")
            .config(&config)
            .start()
            .expect("host-vmm starts");
        source.wait_for_line("00000001").expect("a guest that takes orders");
        know_each_other(&source, 2);
        know_each_other(&target, 2);
        Self { ways, source, target, _kernel: kernel }
    }

    /// Gives the guest an order to fork, and waits until that is reported.
    fn fork(source: &mut Running, order: &[u8]) {
        source.type_bytes(order).expect("a guest that takes orders");
        let code = |event: &Value| (event["event"] == "forked").then(|| event["code"].clone());
        assert_eq!(source.wait_for("a report", code).expect("a report"), 0);
    }

    /// Has the guest fork into a clone, and sees to it that no more passes meanwhile than may, until the
    /// clone has all of its memory.
    fn clone_within_bandwidth(self, order: &[u8]) {
        let Self { ways, mut source, target, _kernel } = self;
        ways.iter().for_each(|way| way.set(Fault::None));
        let begun = Instant::now();
        let passed = || ways.iter().map(Proxy::passed).sum::<u64>();
        let is_within = || {
            // Looked at in this order, a slow test sees less of what has passed, and not more.
            let passed = passed();
            let elapsed = begun.elapsed();
            let most = u128::from(BYTES_PER_SECOND) * elapsed.as_nanos() / 1_000_000_000;
            let most = most + u128::from(BURST_BYTES + OTHER_BYTES);
            assert!(u128::from(passed) <= most, "{passed} bytes have passed within {elapsed:?}");
        };
        let _alive = thread::scope(|scope| {
            let clone = scope.spawn(move || {
                Self::fork(&mut source, order);
                vms(&target, 1);
                (source, target)
            });
            while !clone.is_finished() {
                is_within();
                thread::sleep(LOOK);
            }
            clone.join().expect("a clone")
        });
        assert!(passed() >= MEMORY_BYTES, "{} bytes have passed", passed());
        is_within();
    }
}

#[test]
fn a_clone_takes_no_more_than_its_bandwidth_on_all_connections_together() {
    Paced::start(user_guest::kernel(), "connections = 4").clone_within_bandwidth(&order(flags::REMOTE));
}

#[test]
fn a_lazy_clone_takes_no_more_than_its_bandwidth_before_and_while_it_runs() {
    Paced::start(with_memory().to_kernel(), "lazy = true").clone_within_bandwidth(b"!");
}

#[test]
fn an_operator_sees_how_far_a_clone_of_a_vm_is() {
    let Paced { mut source, ways: _ways, target, _kernel } = Paced::start(user_guest::kernel(), "");
    Paced::fork(&mut source, &order(flags::LOCAL));
    let begun = Instant::now();
    let clone = source.start(&["clone", "--vm", "vm", "--to", "b"]).expect("host-vmm clone");
    let output = clone.wait_with_output().expect("an end");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(begun.elapsed() > Duration::from_secs(1), "it takes long enough to be seen");
    assert!(told.contains("of memory go to b; 0 B of it are there already"), "{told}");
    vms(&target, 1);
}
