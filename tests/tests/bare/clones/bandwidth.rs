//! How fast a clone may be sent.

use std::{thread, time::Instant};

use host_vmm::capsule::CHUNK_BYTES;
use serde_json::Value;
use vmfork_abi::flags;
use vmfork_tests::{
    cluster::Platforms,
    proxy::{Fault, Proxy},
    user::{self, Order},
    vmm::Vmm,
};

use super::{LOOK, know_each_other};

#[test]
fn a_clone_takes_no_more_than_its_bandwidth_on_all_connections_together() {
    const BYTES_PER_SECOND: u64 = 4 << 20;
    const MEMORY_BYTES: u64 = 8 << 20;
    /// What may come at once: what was not used of 50 ms, and the chunk that is the next one.
    const BURST_BYTES: u64 = BYTES_PER_SECOND / 20 + CHUNK_BYTES;
    /// Heads of records and requests, and what platforms tell of themselves meanwhile.
    const OTHER_BYTES: u64 = 256 << 10;
    let platforms = Platforms::new(&["a", "b"]);
    let way = Proxy::start(platforms.address("b")).expect("a proxy");
    let _target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let config = format!("[clone]\nconnections = 4\nbandwidth = {BYTES_PER_SECOND}");
    let config = platforms.config_by_way("a", Some(("b", way.address())), &config);
    let kernel = user::kernel();
    let mut source =
        Vmm::kernel(kernel.path()).option("--mem", "64M").config(&config).start().expect("host-vmm starts");
    source.wait_for_line("00000001").expect("a guest that takes orders");
    know_each_other(&source, 2);
    way.set(Fault::None);
    let begun = Instant::now();
    let is_within = || {
        // Looked at in this order, a slow test sees less of what has passed, and not more.
        let passed = way.passed();
        let elapsed = begun.elapsed();
        let most = u128::from(BYTES_PER_SECOND) * elapsed.as_nanos() / 1_000_000_000;
        let most = most + u128::from(BURST_BYTES + OTHER_BYTES);
        assert!(u128::from(passed) <= most, "{passed} bytes have passed within {elapsed:?}");
    };
    let dirty_pages = u32::try_from(MEMORY_BYTES / 4096).expect("small");
    let order = Order { count: 1, dirty_pages, flags: flags::REMOTE, ..Order::default() };
    source.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
    let code = thread::scope(|scope| {
        let code = scope.spawn(|| {
            let code = |event: &Value| (event["event"] == "forked").then(|| event["code"].clone());
            source.wait_for("a report", code).expect("a report")
        });
        while !code.is_finished() {
            is_within();
            thread::sleep(LOOK);
        }
        code.join().expect("a report")
    });
    assert_eq!(code, 0);
    assert!(way.passed() >= MEMORY_BYTES, "{} bytes have passed", way.passed());
    is_within();
}
