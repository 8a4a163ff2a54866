//! `host-vmm` with guests that have no operating system. They run wherever /dev/kvm exists.

use std::fs;

use serde_json::Value;
use vmfork_abi::{CopyList, ErrorCode, Location, PAGE, Role, Status};
use vmfork_tests::{
    assets,
    bare_guest::{CONTROL_PAGE, DOORBELL, Script, control},
    vmm::{Ended, Running, Vmm},
};

mod asker;
mod clones;
mod features;
mod forked;
mod generation;
mod left_behind;
mod memory;
mod older;
mod operator;
mod output;
mod prefetch;
mod sealed;
mod state;
mod time;

use left_behind::become_equal;

const STATUS: usize = PAGE.response.offset + 8;
const ERROR: usize = PAGE.response.offset + 12;
const ROLE: usize = PAGE.identity.offset;
const INDEX: usize = PAGE.identity.offset + 4;
const GENERATION: usize = PAGE.identity.offset + 12;
const ID: usize = PAGE.identity.offset + 16;

/// Runs a script to the end of its VMs.
fn run(script: &Script) -> Ended {
    let kernel = script.to_kernel();
    let running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.end().expect("host-vmm ends")
}

/// What a VM has printed: numbers.
fn printed(ended: &Ended, name: &str) -> Vec<u32> {
    let lines = ended.lines("").into_iter().filter(|(vm, _)| vm == name);
    lines.map(|(_, line)| u32::from_str_radix(&line, 16).expect("a number")).collect()
}

fn answer() -> Script {
    Script::new().print(control(STATUS)).print(control(ERROR)).print(control(ROLE)).print(control(INDEX))
}

fn join(first: Script, then: Script) -> Script {
    // A condition that always holds: the header's magic number.
    first.only_if(CONTROL_PAGE, u32::from_le_bytes(*b"VMFO"), then)
}

#[test]
fn a_fork_tells_each_side_who_it_is() {
    let ended = run(&join(Script::new().request(1, "web", 3).ring(), answer().off()));
    let forked = Status::Forked.number();
    assert_eq!(printed(&ended, "vm"), [forked, 0, Role::Parent.number(), 0]);
    for index in 1..=3 {
        assert_eq!(printed(&ended, &format!("web.{index}")), [forked, 0, Role::Child.number(), index]);
    }
    assert_eq!(ended.code, Some(0));
}

/// Prints what the control page lists of a copy: index, location, and as much of platform and ID as four
/// bytes hold.
fn listed(index: u32) -> Script {
    let number = usize::try_from(index - 1).expect("a copy's number");
    let print = |script: Script, at| script.print(control(PAGE.copies.offset + CopyList::at(number) + at));
    [16, 20, 24, 0].into_iter().fold(Script::new(), print)
}

/// Prints how many copies are listed, and of which request.
fn list() -> Script {
    Script::new().print(control(PAGE.copies.offset)).print(control(PAGE.copies.offset + 8))
}

#[test]
fn a_parent_finds_its_copies_in_a_list_that_reaches_beyond_its_page() {
    let looked_at = [1, 2, 51, 52, 60];
    let parent = looked_at.into_iter().fold(list(), |script, index| join(script, listed(index)));
    let child = Script::new().print(control(PAGE.copies.offset + 8));
    let script = Script::new().request(7, "web", 60).ring().print(control(ID));
    let script = script.only_if(control(ROLE), Role::Child.number(), child);
    let ended = run(&script.only_if(control(ROLE), Role::Parent.number(), parent).off());
    let parent = printed(&ended, "vm");
    assert_eq!(parent[1..3], [7, 60]);
    let mut ids = vec![parent[0]];
    for (index, copy) in looked_at.into_iter().zip(parent[3..].chunks_exact(4)) {
        let own = printed(&ended, &format!("web.{index}"));
        // There is one platform alone, and it has no name. The child has made no copies.
        assert_eq!((copy, &own[..]), (&[index, Location::Local.number(), 0, own[0]][..], &[own[0], 0][..]));
        assert!(!ids.contains(&own[0]));
        ids.push(own[0]);
    }
    assert_eq!(ids.len(), 1 + looked_at.len());
    assert_eq!(ended.code, Some(0));
}

#[test]
fn a_child_forks_again_and_so_does_its_child() {
    let data = 0x40_0000;
    let fork_of = |seq, vm_type| Script::new().request(seq, vm_type, 1).ring();
    let third =
        join(fork_of(1, "c"), Script::new().print(control(GENERATION)).print(data).print(data + 4096));
    let in_child = join(
        Script::new().store(data + 4096, 0xc41d),
        fork_of(1, "b").only_if(control(ROLE), Role::Child.number(), third),
    );
    let script = join(
        Script::new().store(data, 0xda7a),
        fork_of(1, "a").only_if(control(ROLE), Role::Child.number(), in_child).off(),
    );
    let ended = run(&script);
    assert_eq!(printed(&ended, "b.2"), [2, 0xda7a, 0xc41d]);
    assert_eq!(printed(&ended, "c.3"), [3, 0xda7a, 0xc41d]);
    assert_eq!(ended.code, Some(0));
}

#[test]
fn bad_requests_have_their_errors_and_the_vm_goes_on() {
    let outcome = || Script::new().print(control(STATUS)).print(control(ERROR));
    let mut script = Script::new();
    let mut expected = Vec::new();
    let mut expect = |script: Script, code: ErrorCode| {
        expected.extend([Status::Failed.number(), code.number()]);
        join(script, outcome())
    };
    script = expect(script.request(1, "web", 0).ring(), ErrorCode::InvalidCount);
    script = expect(script.request(2, "web", 1025).ring(), ErrorCode::InvalidCount);
    script = expect(script.request(3, "no/slash", 1).ring(), ErrorCode::InvalidType);
    script = expect(script.request(4, "", 1).ring(), ErrorCode::InvalidType);
    script = expect(
        script.request(5, "web", 1).store(control(PAGE.request.offset + 12), 4).ring(),
        ErrorCode::InvalidFlags,
    );
    script = expect(script.request(6, "web", 1).out(DOORBELL, 0, 4), ErrorCode::UnknownCommand);
    script = expect(script.request(7, "web", 1).out(DOORBELL, 1, 1), ErrorCode::UnknownCommand);
    script = expect(script.request(8, "web", 1).out(DOORBELL, 1, 2), ErrorCode::UnknownCommand);
    // 1024 are within what one fork may ask for, but not within what the platform takes.
    script = expect(script.request(9, "web", 1024).ring(), ErrorCode::Place);
    script = join(script.request(10, "web", 1).ring(), outcome()).off();
    expected.extend([Status::Forked.number(), 0]);
    let kernel = script.to_kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--max-vms", "100");
    let ended = vmm.start().expect("host-vmm starts").end().expect("host-vmm ends");
    assert_eq!(printed(&ended, "vm"), expected);
    assert_eq!(ended.code, Some(0));
}

#[test]
fn a_guest_can_not_pass_its_limits() {
    let outcome = || Script::new().print(control(STATUS)).print(control(ERROR));
    let forks = [
        (5, "web", Some(ErrorCode::Children)),
        (2, "web", None),
        // Four children would be five with one of those that are there.
        (3, "web", Some(ErrorCode::Children)),
        // Another name does not help.
        (3, "other", Some(ErrorCode::Children)),
        (1, "tiny", Some(ErrorCode::Memory)),
        (1, "web", None),
    ];
    let mut script = Script::new();
    let mut expected = Vec::new();
    for (seq, (count, vm_type, code)) in (1..).zip(forks) {
        script = join(script.request(seq, vm_type, count).ring(), outcome());
        expected.extend(match code {
            Some(code) => [Status::Failed.number(), code.number()],
            None => [Status::Forked.number(), 0],
        });
        // Children stand still: they are there until the end.
        script = script.only_if(control(ROLE), Role::Child.number(), Script::new().hang());
    }
    let kernel = script.print(control(ROLE)).to_kernel();
    let limits = ["*:fork-children=4,children=4,generations=1", "tiny:memory=32M", "vm:rate=100"];
    let vmm = limits
        .iter()
        .fold(Vmm::kernel(kernel.path()).option("--mem", "64M"), |vmm, limit| vmm.option("--limit", limit));
    let mut running = vmm.start().expect("host-vmm starts");
    running.wait_for_lines("", expected.len() + 1 + 6).expect("all answers");
    running.signal(nix::sys::signal::Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");
    assert_eq!(printed(&ended, "vm")[..expected.len()], expected);
}

#[test]
fn generations_and_forks_a_second_can_be_limited() {
    const SECOND_NS: u64 = 1_000_000_000;
    let again = |seq| Script::new().request(seq, "web", 1).ring();
    let outcome = Script::new().print(control(STATUS)).print(control(ERROR));
    let in_child = join(again(99), outcome).off();
    let first = again(1).only_if(control(ROLE), Role::Child.number(), in_child);
    // Where the machine has much else to do, a second is over now and then.
    let script = (2..10).fold(first, |script, seq| {
        join(script, again(seq).only_if(control(ROLE), Role::Child.number(), Script::new().off()))
    });
    let kernel = script.off().to_kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--limit", "*:generations=1");
    let ended =
        vmm.option("--limit", "vm:rate=1").start().expect("host-vmm starts").end().expect("host-vmm ends");
    assert_eq!(printed(&ended, "web.1"), [Status::Failed.number(), ErrorCode::Generation.number()]);
    let of_parent = ended.forks().into_iter().filter(|fork| fork["parent"]["generation"] == 0);
    let number = |fork: &Value, field: &str| fork[field].as_u64().expect("a number");
    let (made, refused): (Vec<_>, Vec<_>) = of_parent.partition(|fork| number(fork, "code") == 0);
    assert!(
        !refused.is_empty()
            && refused.iter().all(|fork| number(fork, "code") == u64::from(ErrorCode::Rate.number())),
        "{refused:?}"
    );
    // The platform has counted each between its ring and its answer.
    let answered_ns = |fork: &Value| number(fork, "rung_ns") + number(fork, "pause_ns");
    assert!(
        made.is_sorted_by(|one, next| answered_ns(next) >= number(one, "rung_ns") + SECOND_NS),
        "{made:?}"
    );
    assert_eq!(ended.code, Some(0));
}

#[test]
fn the_hypercall_is_a_doorbell_too() {
    if !assets::probe().hypercall {
        assert!(!assets::in_lab(), "the lab's KVM hands hypercalls on");
        eprintln!("SKIPPED: this host's KVM hands no hypercall on; the lab's does");
        return;
    }
    let (invalid, answered) = (0xffff_ffea, 0);
    let script = Script::new()
        .request(1, "web", 1)
        .hypercall(CONTROL_PAGE + 4096, 1, 1)
        .hypercall(0, 1, 1)
        .hypercall(CONTROL_PAGE, 2, 1)
        .print(control(PAGE.response.offset))
        .hypercall(CONTROL_PAGE, 1, 99)
        .print(control(ERROR))
        .hypercall(CONTROL_PAGE, 1, 1);
    let ended = run(&join(script, answer().off()));
    // The first three are not for the control page: nobody has looked at the request. The fourth has an
    // unknown command.
    let before = [invalid, invalid, invalid, 0, answered, ErrorCode::UnknownCommand.number()];
    let forked = Status::Forked.number();
    let parent = [&before[..], &[answered, forked, 0, Role::Parent.number(), 0]].concat();
    assert_eq!(printed(&ended, "vm"), parent);
    assert_eq!(printed(&ended, "web.1"), [answered, forked, 0, Role::Child.number(), 1]);
    assert_eq!(ended.code, Some(0));
}

#[test]
fn garbage_never_stops_the_vmm() {
    let mut random = [0; 4096];
    getrandom::fill(&mut random).expect("random bytes");
    let words = random.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
    let words: Vec<u32> = words.collect();
    println!("seed: {:08x?}", &words[..8]);
    let mut script = Script::new();
    for (round, chunk) in words.chunks_exact(8).enumerate() {
        let [a, b, c, d, e, f, g, h] = chunk.try_into().expect("eight words");
        let within = |word: u32| CONTROL_PAGE + u64::from(word % 1024) * 4;
        script = script.store(within(a), b).store(within(c), d).store(within(e), f);
        if round % 16 == 0 {
            script = script.fill(CONTROL_PAGE + u64::from(h % 4096), g.to_le_bytes()[0]);
        }
        // A random count can't be let through: it would be a fork of up to 1024 children.
        script = script.store(control(PAGE.request.offset + 8), g | 0x8000_0000);
        script = script.out(DOORBELL, h, [1, 2, 4][round % 3]).ring();
    }
    script = script.fill(CONTROL_PAGE, 0xff);
    let script = script.request(1, "web", 1).ring().print(control(STATUS)).off();
    let ended = run(&script);
    assert_eq!(printed(&ended, "vm"), [Status::Forked.number()]);
    assert_eq!(printed(&ended, "web.1"), [Status::Forked.number()]);
    assert_eq!(ended.code, Some(0));
}

#[test]
fn an_image_outlives_its_parent() {
    let data = 0x40_0000;
    // The parent writes something, forks, writes something else and is gone; so is its child.
    let script = Script::new().store(data, 0xda7a).request(1, "web", 1).ring();
    let script = script.print(data).print(control(INDEX)).print(control(GENERATION)).store(data, 0xbad).off();
    let kernel = script.to_kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--keep", "web");
    let mut running = vmm.start().expect("host-vmm starts");
    let mut ended = 0;
    let both = |event: &serde_json::Value| {
        ended += usize::from(event["event"] == "ended");
        (ended == 2).then_some(())
    };
    running.wait_for("two ends", both).expect("two ends");
    let images: serde_json::Value =
        serde_json::from_str(&running.ask(&["image", "ls", "--json"]).expect("images")).expect("JSON");
    let image = &images[0];
    assert_eq!(
        (&image["type"], &image["original_name"], &image["generation"]),
        (&"web".into(), &"vm".into(), &1.into())
    );
    assert!(image["private_bytes"].as_u64().expect("a size") > 4096 && image["shared_bytes"] == 0, "{image}");
    let id = image["id"].as_str().expect("an ID");
    assert_eq!(images.as_array().expect("an array").len(), 1);
    let spawned = running.ask(&["spawn", "--image", &id[..8], "--count", "3"]).expect("copies");
    assert_eq!(spawned, "web.2\nweb.3\nweb.4\n");
    let mut ended = 0;
    let three = |event: &serde_json::Value| {
        ended += usize::from(event["event"] == "ended" && event["name"] != "vm" && event["name"] != "web.1");
        (ended == 3).then_some(())
    };
    running.wait_for("three ends", three).expect("three ends");
    assert!(running.ask(&["spawn", "--image", "00000000"]).is_err());
    assert!(running.ask(&["image", "show", id]).is_ok());
    // Saved, let go of, and loaded again, it is the same.
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("a path");
    running.ask(&["image", "save", id, path]).expect("a saved image");
    assert!(running.ask(&["image", "load", path]).is_err(), "it is kept already");
    let mut changed = fs::read(path).expect("the file");
    *changed.last_mut().expect("a byte") ^= 1;
    let bad = tempfile::NamedTempFile::new().expect("a file");
    fs::write(bad.path(), changed).expect("a changed file");
    assert!(running.ask(&["image", "load", bad.path().to_str().expect("a path")]).is_err());
    // Another one keeps the platform from its end meanwhile.
    let mut other =
        Vmm::kernel(kernel.path()).option("--mem", "64M").option("--keep", "web").start().expect("host-vmm");
    let two = |event: &serde_json::Value| (event["event"] == "ended" && event["name"] == "vm").then_some(());
    other.wait_for("an end", two).expect("an end");
    // Once it is sealed, the image of its own fork would take the place of a loaded one of the same type.
    other.kept_image().expect("an image of its own");
    assert_eq!(other.ask(&["image", "load", path]).expect("an image").trim(), id);
    assert_eq!(other.ask(&["spawn", "--image", id]).expect("a copy"), "web.2\n");
    let ran =
        |event: &serde_json::Value| (event["event"] == "ended" && event["name"] == "web.2").then_some(());
    other.wait_for("its end", ran).expect("its end");
    other.signal(nix::sys::signal::Signal::SIGTERM).expect("a signal");
    assert_eq!(printed(&other.end().expect("an end"), "web.2"), [0xda7a, 1, 1]);
    running.ask(&["image", "rm", id]).expect("no image");
    // With the last image, host-vmm has nothing more to do.
    let ended = running.end().expect("host-vmm ends");
    for (index, name) in [(1, "web.1"), (1, "web.2"), (2, "web.3"), (3, "web.4")] {
        assert_eq!(printed(&ended, name), [0xda7a, index, 1], "{name}");
    }
    assert_eq!(ended.code, Some(0));
}

#[test]
fn an_operator_sees_who_is_there_and_who_comes_from_whom() {
    // web.1 forks a child, all stand still, and then web.1 is killed.
    let again = Script::new().request(2, "deep", 1).ring();
    let script = Script::new().request(1, "web", 2).ring();
    let script = script.only_if(control(INDEX), 1, again).print(control(GENERATION));
    let kernel = script.to_kernel();
    let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.wait_for_lines("0000000", 4).expect("all VMs");
    let list = |running: &Running| -> serde_json::Value {
        serde_json::from_str(&running.ask(&["ps", "--json"]).expect("a list")).expect("JSON")
    };
    let vms = list(&running);
    let names = |vms: &serde_json::Value| -> Vec<String> {
        let vms = vms["vms"].as_array().expect("an array").iter();
        vms.map(|vm| vm["name"].as_str().expect("a name").to_owned()).collect()
    };
    let mut sorted = names(&vms);
    sorted.sort();
    assert_eq!(sorted, ["deep.3", "vm", "web.1", "web.2"]);
    assert_eq!(vms["ended"], serde_json::json!([]));
    for vm in vms["vms"].as_array().expect("an array") {
        assert_eq!((&vm["state"], &vm["ram_bytes"]), (&"running".into(), &(64 << 20).into()));
        let node = running.node(vm["name"].as_str().expect("a name")).expect("a node");
        assert_eq!(vm["pid"], node);
        let bytes = |what: &str| vm["memory"][what].as_u64().expect("a size");
        assert!(bytes("private_bytes") > 0 && bytes("private_bytes") <= bytes("proportional_bytes"));
    }
    let table = running.ask(&["ps"]).expect("a table");
    assert_eq!(table.lines().count(), 5, "{table}");
    let node = nix::unistd::Pid::from_raw(running.node("web.1").expect("a node").cast_signed());
    nix::sys::signal::kill(node, nix::sys::signal::Signal::SIGKILL).expect("a node to kill");
    let gone = |event: &serde_json::Value| (event["event"] == "ended").then_some(());
    running.wait_for("its end", gone).expect("an end");
    become_equal(|| names(&list(&running)).len(), || 3);
    assert_eq!(list(&running)["ended"][0]["name"], "web.1");
    let tree = running.ask(&["tree"]).expect("a tree");
    let lines: Vec<&str> = tree.lines().map(|line| line.split(" (").next().unwrap_or_default()).collect();
    assert!(lines.contains(&"│   └── deep.3") || lines.contains(&"    └── deep.3"), "{tree}");
    assert!(tree.contains("web.1 (ended)"), "{tree}");
}

#[test]
fn a_thousand_children_of_one_fork() {
    // Making a VM takes 20 ms in the lab.
    let count = if assets::in_lab() { 200 } else { 1000 };
    let ended = run(&Script::new().request(1, "web", count).ring().print(control(INDEX)).off());
    let mut indices: Vec<u32> =
        (1..=count).flat_map(|number| printed(&ended, &format!("web.{number}"))).collect();
    indices.sort_unstable();
    assert_eq!(indices, (1..=count).collect::<Vec<_>>());
    assert_eq!(ended.code, Some(0));
}

#[test]
fn the_guest_ends_the_vm_as_it_says() {
    assert_eq!(run(&Script::new().off()).code, Some(0));
    assert_eq!(run(&Script::new().out(0x602, 1, 1)).code, Some(3));
    assert_eq!(run(&Script::new().out(0x64, 0xfe, 1)).code, Some(3));
}
