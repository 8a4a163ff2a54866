//! The generation, as processes look for it: on a page of its own, where the control page's header says. And
//! the VM generation ID, as a kernel looks for it.

use std::{collections::BTreeSet, mem::offset_of};

use nix::sys::signal::Signal;
use vmfork_abi::{Header, PAGE, PAGE_BYTES};
use vmfork_tests::{
    bare_guest::{CONTROL_PAGE, GENERATION_ID, Script, control},
    cluster::Platforms,
    user_guest::{self, Order},
    vmm::{Running, Vmm},
};

use super::{
    clones::{know_each_other, vms},
    printed,
};

/// Where the header has the offset.
const OFFSET: usize = offset_of!(Header, generation_offset);

#[test]
fn user_code_finds_another_generation_in_each_copy_and_none_in_a_parent() {
    let kernel = user_guest::kernel();
    let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.wait_for_line("00000001").expect("a guest that takes orders");
    let order = Order { count: 2, depth: 1, tell_generation: true, stay: true, ..Order::default() };
    running.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
    // Two children, each of which says so as a child and as a parent, and has two children itself.
    let mut lines = running.wait_for_lines("", 2 + 2 * 2 + 4).expect("all generations");
    lines.sort();
    let generations =
        |copies: &[(String, String)]| copies.iter().map(|(_, line)| line.clone()).collect::<Vec<_>>();
    let (booted, copies): (Vec<_>, Vec<_>) = lines.into_iter().partition(|(name, _)| name == "vm");
    // The other one has said that it was ready.
    assert_eq!(generations(&booted), ["00000000", "00000001"]);
    let (mut once, mut twice) = (0, 0);
    for of_one in copies.chunk_by(|one, next| one.0 == next.0) {
        match generations(of_one).iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["00000001", "00000001"] => once += 1,
            ["00000002"] => twice += 1,
            ref other => panic!("{}: {other:?}", of_one[0].0),
        }
    }
    assert_eq!((once, twice), (2, 4));
}

/// A guest that spoils the page, and forks, and then waits until it is another one than the booted one, or
/// for input; in the end it prints what it finds.
fn looker() -> Script {
    let generation = control(PAGE.generation.offset);
    let spoilt = Script::new().fill(generation, 0xff).request(1, "web", 1).ring();
    let script = spoilt.print_behind(CONTROL_PAGE, control(OFFSET)).wait_for_input_or(generation, 1);
    script.print(control(OFFSET)).print_behind(CONTROL_PAGE, control(OFFSET)).print(generation + 4).hang()
}

/// What a VM has printed, once it is so much.
fn lines_of(running: &mut Running, name: &str, count: usize) -> Vec<u32> {
    let lines = running.wait_for_lines("", count).expect("what it finds");
    let lines = lines.into_iter().filter(|(vm, _)| vm == name);
    lines.map(|(_, line)| u32::from_str_radix(&line, 16).expect("a number")).collect()
}

#[test]
fn operators_copies_find_it_here_and_on_another_platform_and_the_parent_finds_nothing_new() {
    let platforms = Platforms::new(&["a", "b"]);
    let mut target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let kernel = looker().to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", ""));
    let mut source = source.start().expect("host-vmm starts");
    know_each_other(&source, 2);
    // What the guest has made of the page is gone with its fork; the copy is not waiting.
    source.wait_for_lines("", 1 + 4).expect("a guest that waits, and its copy");
    let offset = u32::try_from(PAGE.generation.offset).expect("small");
    source.ask(&["fork", "vm"]).expect("a copy");
    source.ask(&["clone", "--vm", "vm", "--to", "b"]).expect("a clone");
    assert_eq!(lines_of(&mut target, "vm.1", 3), [offset, 1, 0]);
    source.wait_for_lines("", 1 + 4 + 3).expect("the copy's");
    // A copy of a copy, and of a clone.
    source.ask(&["fork", "vm.2"]).expect("a copy of a copy");
    vms(&source, 4);
    source.type_bytes(b"!").expect("a guest that waits");
    source.wait_for_lines("", 1 + 4 + 3 + 3).expect("the parent's");
    source.signal(Signal::SIGTERM).expect("a signal");
    let source = source.end().expect("host-vmm ends");
    assert_eq!(printed(&source, "vm"), [0, offset, 0, 0]);
    assert_eq!(printed(&source, "web.1"), [1, offset, 1, 0]);
    assert_eq!(printed(&source, "vm.2"), [offset, 1, 0]);
}

#[test]
fn the_region_ends_with_its_page() {
    // Behind it there is the generation ID's page, and behind that, nothing answers.
    let (end, page) = (control(vmfork_abi::REGION_BYTES), u64::try_from(PAGE_BYTES).expect("small"));
    let script = Script::new().print(end - page).print(end - 4).print(end + page - 4).print(end + page);
    let ended = super::run(&script.off());
    assert_eq!(printed(&ended, "vm"), [0, 0, 0, u32::MAX]);
}

/// Registers of the I/O APIC: which one, and its content; the low half of the one for the generation ID's
/// interrupt, 16.
const IO_APIC_SELECT: u64 = 0xfec0_0000;
const IO_APIC_WINDOW: u64 = 0xfec0_0010;
const IO_APIC_PIN_16: u32 = 0x10 + 2 * 16;

/// Registers of the local APIC: the one that enables it, and of the pending interrupts those from 64 to 95.
const APIC_SPURIOUS: u64 = 0xfee0_00f0;
const APIC_PENDING: u64 = 0xfee0_0220;

/// The interrupt's vector, and its bit there.
const VECTOR: u32 = 80;
const PENDING: u32 = 1 << (VECTOR - 64);

/// Prints the generation ID, and which interrupts are pending.
fn print_id(script: Script) -> Script {
    (0..4).fold(script, |script, word| script.print(GENERATION_ID + 4 * word)).print(APIC_PENDING)
}

/// What [`print_id`] has printed.
fn ids(printed: &[u32]) -> Vec<(&[u32], u32)> {
    printed.chunks_exact(5).map(|lines| (&lines[..4], lines[4])).collect()
}

#[test]
fn each_copy_has_a_generation_id_of_its_own_and_an_interrupt_and_the_parent_has_neither() {
    let enabled = Script::new().store(APIC_SPURIOUS, 0x1ff);
    let routed = enabled.store(IO_APIC_SELECT, IO_APIC_PIN_16).store(IO_APIC_WINDOW, VECTOR);
    let before = print_id(routed.store(GENERATION_ID, 0));
    let after = print_id(before.request(1, "web", 2).ring());
    // An operator's copies go on here, and wait for nothing.
    let generation = control(PAGE.generation.offset);
    let script = after.only_if(generation, 0, Script::new().wait_for_input_or(generation, 1));
    let kernel = print_id(script).hang().to_kernel();
    let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.wait_for_lines("", 10 + 2 * 10).expect("a guest that waits, and its copies");
    running.ask(&["fork", "vm", "--count", "2"]).expect("two copies");
    running.wait_for_lines("", 10 + 2 * 10 + 2 * 5).expect("the operator's copies");
    assert!(vms(&running, 5).iter().all(|vm| vm["generation_id"] == true));
    running.type_bytes(b"!").expect("a guest that waits");
    running.wait_for_lines("", 10 + 2 * 10 + 2 * 5 + 5).expect("the parent's");
    running.signal(Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");

    let parent = printed(&ended, "vm");
    let [(booted, 0), (forked, 0), (last, 0)] = ids(&parent)[..] else { panic!("{parent:x?}") };
    assert!(booted == forked && forked == last, "the parent's ID has changed: {parent:x?}");
    assert_ne!(booted, [0; 4], "the guest has written to its ID, or has none");
    let mut all = BTreeSet::from([booted.to_vec()]);
    for (name, times) in [("web.1", 2), ("web.2", 2), ("vm.3", 1), ("vm.4", 1)] {
        let copy = printed(&ended, name);
        let copies_ids = ids(&copy);
        assert_eq!(copies_ids.len(), times, "{name}: {copy:x?}");
        assert!(copies_ids.iter().all(|id| *id == (copies_ids[0].0, PENDING)), "{name}: {copy:x?}");
        assert!(all.insert(copies_ids[0].0.to_vec()), "{name} has another one's ID");
    }
}
