//! Copies of one fork over many platforms, and a platform that is not the one it says.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use vmfork_abi::{ErrorCode, Role, Status, flags};
use vmfork_tests::{
    assets,
    bare_guest::{Script, control},
    cluster::Platforms,
    process,
    vmm::{Running, Vmm},
};

use super::{INDEX, forker, know_each_other, numbers, vms, wait_until};

#[test]
fn a_platform_that_serves_nobody_else_needs_no_address() {
    let platform = Vmm::serve("name = \"a\"\n").start().expect("a platform");
    let known = wait_until(&platform, &["platforms", "--json"], |known| known["platforms"].is_array());
    assert_eq!(known["platforms"].as_array().expect("an array").len(), 1, "{known}");
    platform.signal(Signal::SIGTERM).expect("a signal");
    assert!(platform.end().is_ok());
}

#[test]
fn copies_are_spread_over_all_platforms() {
    const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
    // Making a VM takes 20 ms in the lab.
    let share = if assets::in_lab() { 2 } else { 8 };
    let count = u32::try_from(share * NAMES.len()).expect("small");
    let platforms = Platforms::new(&NAMES);
    let serve = |name: &&str| Vmm::serve(&platforms.config(name, "")).start().expect("a platform");
    let mut targets: Vec<Running> = NAMES[1..].iter().map(serve).collect();
    let fork = Script::new().wait_for_input().request(1, "web", count).ring();
    let kernel = fork.print(control(INDEX)).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
    let spread = "[placement.\"*\"]\npolicy = \"spread\"";
    let mut source = source.config(&platforms.config("a", spread)).start().expect("host-vmm starts");
    know_each_other(&source, NAMES.len());
    source.type_bytes(b"!").expect("a guest that waits");
    let own =
        source.wait_for_lines("", share + 1).expect("the parent goes on, and its share of the copies runs");
    assert_eq!(numbers(&own, "vm"), [0]);
    let mut lines = own;
    let mut ids: BTreeSet<String> = vms(&source, share + 1).iter().map(|vm| vm["id"].to_string()).collect();
    for target in &mut targets {
        lines.extend(target.wait_for_lines("", share).expect("its share of the copies runs"));
        ids.extend(vms(target, share).iter().map(|vm| vm["id"].to_string()));
    }
    let copies = lines.iter().filter(|(name, _)| name != "vm");
    let mut indices: Vec<u32> =
        copies.map(|(_, line)| u32::from_str_radix(line, 16).expect("a number")).collect();
    indices.sort_unstable();
    assert_eq!(indices, (1..=count).collect::<Vec<_>>());
    assert_eq!(ids.len(), indices.len() + 1, "an ID stands for two VMs");
    for target in targets {
        let pid = target.pid();
        target.signal(Signal::SIGTERM).expect("a signal");
        assert_eq!(target.end().expect("a platform that ends").code, Some(0));
        assert!(process::children(pid).expect("processes").is_empty());
    }
}

#[test]
fn a_platform_with_a_certificate_of_another_ca_gets_no_copies() {
    let platforms = Platforms::with_certificates(&["a", "b"]);
    let target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let kernel = forker(1, flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
    // It is not forgotten while another one takes its place.
    let mut source =
        source.config(&platforms.config("a", "lease_seconds = 60")).start().expect("host-vmm starts");
    know_each_other(&source, 2);
    drop(target);
    let others = platforms.with_own_ca();
    let impostor = Vmm::serve(&others.config("b", "ready = 0")).start().expect("a platform");
    wait_until(&impostor, &["ps", "--json"], |list| list["vms"].is_array());
    know_each_other(&source, 2);
    source.type_bytes(b"!").expect("a guest that waits");
    let lines = source.wait_for_lines("", 5).expect("the parent goes on");
    let failed = [Status::Failed.number(), ErrorCode::Place.number(), Role::Booted.number(), 0, 0xda7a];
    assert_eq!(numbers(&lines, "vm"), failed);
    vms(&impostor, 0);
    assert!(impostor.nodes().expect("processes").is_empty());
    vms(&source, 1);
}
