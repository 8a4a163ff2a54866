//! All state or no fork: what a guest has in its registers, its copies have, and so has it.

use std::collections::BTreeMap;

use vmfork_tests::{cluster::Platforms, state, vmm::Vmm};

use super::clones::{know_each_other, vms};

/// Looks of each VM that are waited for after the last copy was made.
const LOOKS: usize = 3;

#[test]
fn every_register_is_the_same_in_parent_copies_and_clones() {
    let kernel = state::kernel();
    let platforms = Platforms::new(&["a", "b"]);
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", ""));
    let mut source = vmm.start().expect("host-vmm starts");
    let mut target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    know_each_other(&source, 2);
    let told = source.wait_for_lines("", 3).expect("a guest that has looked once");
    let number = |line: &str| u32::from_str_radix(line, 16).expect("a number");
    let (found, changed) = (number(&told[0].1), number(&told[1].1));
    // Among them are all memory types, and the machine-check banks.
    assert!(found > 100 && changed > 60, "{found} registers were found, {changed} of them changed");
    // A first fork, a second one, a copy of a copy, and a clone.
    source.ask(&["fork", "vm", "--count", "1"]).expect("a copy");
    source.ask(&["fork", "vm", "--count", "1"]).expect("a copy");
    source.ask(&["fork", "vm.1", "--count", "1"]).expect("a copy of the copy");
    source.ask(&["clone", "--vm", "vm.2", "--to", "b"]).expect("a clone");
    vms(&source, 4);
    let mut before = 2_u32;
    let mut looks: BTreeMap<String, usize> = BTreeMap::new();
    let all = source.wait_for("looks of all VMs", |event| {
        let (vm, line) = vmfork_tests::vmm::console_line(event, "")?;
        // Before its first look, the guest has told how much it has found, and changed.
        if vm == "vm" && before > 0 {
            before -= 1;
        } else if line.len() == 8 {
            assert_eq!(line, "00000000", "{vm}: a register differs");
            *looks.entry(vm).or_default() += 1;
        }
        (looks.len() == 4 && looks.values().all(|looks| *looks >= LOOKS)).then_some(())
    });
    all.expect("they go on looking");
    let cloned = target.wait_for_lines("", LOOKS).expect("the clone looks too");
    assert!(cloned.iter().all(|(_, line)| line.len() < 8 || line == "00000000"), "{cloned:?}");
}
