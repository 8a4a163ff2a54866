//! Copies that go to other platforms.

use std::{
    collections::BTreeSet,
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use fastrand::Rng;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::NamedTempFile;
use vmfork_abi::{ErrorCode, Location, PAGE, Role, Status, flags};
use vmfork_tests::{
    assets,
    bare_guest::{Script, control},
    cluster::Platforms,
    fault_rounds,
    proxy::{Fault, Proxy},
    vmm::{Running, TIMEOUT, Vmm, console_line},
};

mod bandwidth;
mod budget;
mod cluster;
mod etcd;
mod faults;
mod forks;
mod full;
mod killed;
mod partition;
mod rude;
mod waits;

use super::{ERROR, ID, INDEX, ROLE, STATUS, join, list, listed, printed};

/// Where a guest says where its copies are to run.
const FLAGS: usize = PAGE.request.offset + 12;

/// What a guest has in its memory that its copies have too.
const DATA: u64 = 0x40_0000;

/// How a fork has gone: status and error code.
const FORKED: (u32, u32) = (Status::Forked.number(), 0);
const NO_PLACE: (u32, u32) = (Status::Failed.number(), ErrorCode::Place.number());

/// How platforms are set up that forget none of the others while nothing is heard of it.
const LONG_LEASE: &str = "lease_seconds = 60";

/// How often it is looked how far something is.
const LOOK: Duration = Duration::from_millis(1);

/// Waits until a platform knows so many, itself among them.
pub(super) fn know_each_other(running: &Running, count: usize) {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // Where it has only just started, nobody answers.
        let platforms = running.ask(&["platforms", "--json"]).unwrap_or_default();
        let known: Value = serde_json::from_str(&platforms).unwrap_or_default();
        if known["platforms"].as_array().is_some_and(|platforms| platforms.len() == count) {
            return;
        }
        assert!(Instant::now() < deadline, "{platforms}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// A guest that forks, once it is told to, and then prints who it is, and what it has in its memory.
fn forker(count: u32, flags: u32) -> Script {
    let fork = Script::new().store(DATA, 0xda7a).wait_for_input().request(1, "web", count);
    let fork = fork.store(control(FLAGS), flags).ring();
    let answer =
        Script::new().print(control(STATUS)).print(control(ERROR)).print(control(ROLE)).print(control(INDEX));
    join(fork, answer.print(DATA))
}

/// A guest that forks each time it is told to, so many times. Parent and copies print how it went and their
/// index; copies then stand still.
fn forks_when_told(times: u64, count: u32, flags: u32) -> Script {
    (1..=times).fold(Script::new(), |script, seq| then_fork_when_told(script, seq, count, flags))
}

/// The same once more, after what it has done before.
fn then_fork_when_told(before: Script, seq: u64, count: u32, flags: u32) -> Script {
    let fork = before.wait_for_input().request(seq, "web", count).store(control(FLAGS), flags).ring();
    let answer = fork.print(control(STATUS)).print(control(ERROR)).print(control(INDEX));
    answer.only_if(control(ROLE), Role::Child.number(), Script::new().hang())
}

/// A platform with a VM that forks each time it is told to, so many times, into one copy on another platform.
fn source(config: &str, times: u64) -> (Running, NamedTempFile) {
    let kernel = forks_when_told(times, 1, flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(config);
    (source.start().expect("host-vmm starts"), kernel)
}

/// What the booted VM says of its forks: status and error code of each.
fn outcomes(lines: &[(String, String)]) -> Vec<(u32, u32)> {
    numbers(lines, "vm").chunks_exact(3).map(|fork| (fork[0], fork[1])).collect()
}

/// Has the booted VM fork once more, and gives how all of its forks went until now.
fn fork_again(running: &mut Running, forks: usize) -> Vec<(u32, u32)> {
    running.type_bytes(b"!").expect("a guest that waits");
    let mut lines = Vec::new();
    let answered = running.wait_for("an answer", |event| {
        lines.extend(console_line(event, "").filter(|(name, _)| name == "vm"));
        (lines.len() == 3 * forks).then_some(())
    });
    answered.expect("the parent goes on");
    outcomes(&lines)
}

/// The VMs of a platform, once there are so many, and all of them run.
pub(super) fn vms(running: &Running, count: usize) -> Vec<Value> {
    let all_run = |vms: &[Value]| vms.len() == count && vms.iter().all(|vm| vm["state"] == "running");
    let list = wait_until(running, &["ps", "--json"], |list| {
        list["vms"].as_array().is_some_and(|vms| all_run(vms.as_slice()))
    });
    list["vms"].as_array().expect("an array").clone()
}

#[test]
fn clones_run_on_another_platform_and_the_parent_goes_on() {
    let platforms = Platforms::new(&["a", "b"]);
    let mut target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let kernel = forker(2, flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", ""));
    let mut source = source.start().expect("host-vmm starts");
    know_each_other(&source, 2);
    source.type_bytes(b"!").expect("a guest that waits");
    let forked = Status::Forked.number();
    let parent = [forked, 0, Role::Parent.number(), 0, 0xda7a];
    source.wait_for_lines("", parent.len()).expect("the parent goes on");
    let lines = target.wait_for_lines("", 10).expect("the clones run");
    for index in 1..=2 {
        let of = |line: &&(String, String)| line.0 == format!("web.{index}");
        let numbers =
            lines.iter().filter(of).map(|(_, line)| u32::from_str_radix(line, 16).expect("a number"));
        assert_eq!(numbers.collect::<Vec<_>>(), [forked, 0, Role::Child.number(), index, 0xda7a]);
    }
    source.signal(Signal::SIGTERM).expect("a signal");
    let source = source.end().expect("the source ends");
    assert_eq!(printed(&source, "vm"), parent);
    assert_eq!(source.events.iter().filter(|event| event["event"] == "sent").count(), 2);
    // They don't depend on where they come from.
    let vms: Value = serde_json::from_str(&target.ask(&["ps", "--json"]).expect("a list")).expect("JSON");
    assert_eq!(vms["vms"].as_array().expect("an array").len(), 2);
    target.signal(Signal::SIGTERM).expect("a signal");
    assert_eq!(target.end().expect("the target ends").code, Some(0));
}

#[test]
fn a_parent_is_told_where_its_copies_are_in_the_end() {
    let spread = "[placement.web]\npolicy = \"spread\"";
    for (there, platform, location) in
        [("", b"b\0\0\0", Location::Remote), ("limits = [\"web:memory=32M\"]", b"a\0\0\0", Location::Local)]
    {
        let platforms = Platforms::new(&["a", "b"]);
        let mut target = Vmm::serve(&platforms.config("b", there)).start().expect("a platform");
        let parent = join(list(), join(listed(1), listed(2)));
        let child = Script::new().print(control(INDEX)).print(control(ID));
        let script = Script::new().wait_for_input().request(7, "web", 2).ring();
        let script = script.only_if(control(ROLE), Role::Child.number(), child);
        let kernel = script.only_if(control(ROLE), Role::Parent.number(), parent).to_kernel();
        let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", spread));
        let mut source = source.start().expect("host-vmm starts");
        know_each_other(&source, 2);
        source.type_bytes(b"!").expect("a guest that waits");
        let is_away = location == Location::Remote;
        let mut lines =
            source.wait_for_lines("", if is_away { 12 } else { 14 }).expect("the parent and its copies");
        if is_away {
            lines.extend(target.wait_for_lines("", 2).expect("the clone"));
        }
        // The first copy on each platform has the same name.
        let printed = ["web.1", "web.2"].map(|name| numbers(&lines, name)).concat();
        let id_of = |index: u32| printed.chunks_exact(2).find(|copy| copy[0] == index).expect("a copy")[1];
        let expected = [
            [1, Location::Local.number(), u32::from_le_bytes(*b"a\0\0\0"), id_of(1)],
            [2, location.number(), u32::from_le_bytes(*platform), id_of(2)],
        ];
        let told = numbers(&lines, "vm");
        assert_eq!((&told[..2], &told[2..]), (&[7, 2][..], &expected.concat()[..]), "{lines:?}");
    }
}

#[test]
fn without_another_platform_the_fork_fails_and_the_parent_goes_on() {
    for config in [None, Some(Platforms::new(&["a", "gone"]).config("a", ""))] {
        let kernel = join(forker(1, flags::REMOTE), Script::new().off()).to_kernel();
        let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M");
        let mut running = match config {
            Some(config) => vmm.config(&config),
            None => vmm,
        }
        .start()
        .expect("host-vmm starts");
        running.type_bytes(b"!").expect("a guest that waits");
        let ended = running.end().expect("host-vmm ends");
        let place = ErrorCode::Place.number();
        assert_eq!(printed(&ended, "vm"), [Status::Failed.number(), place, Role::Booted.number(), 0, 0xda7a]);
        assert_eq!(ended.code, Some(0));
    }
}

/// Pages of a guest's memory, far apart, each with a number of its own.
const FAR_APART: [(u64, u32); 4] = [(0x40_0000, 0xda7a), (0x80_0000, 1), (0x120_1000, 2), (0x3ff_f000, 3)];

/// A guest that forks into one copy, which prints what it has in its memory, and then writes to it and prints
/// that.
fn one_with_much_memory(flags: u32) -> Script {
    let fork = FAR_APART.iter().fold(Script::new(), |script, (at, value)| script.store(*at, *value));
    let fork = fork.wait_for_input().request(1, "web", 1).store(control(FLAGS), flags).ring();
    let print = |script: Script| FAR_APART.iter().fold(script, |script, (at, _)| script.print(*at));
    let write = |script: Script| {
        FAR_APART.iter().fold(script, |script, (at, value)| script.store(*at, value + 0x1000))
    };
    // A page that nobody has ever written to.
    let child = print(write(print(Script::new()))).print(0x300_0000);
    join(fork, Script::new().print(control(STATUS)).only_if(control(ROLE), Role::Child.number(), child))
}

/// What such a copy prints.
fn what_a_copy_has() -> Vec<u32> {
    let before = FAR_APART.iter().map(|(_, value)| *value);
    let after = FAR_APART.iter().map(|(_, value)| value + 0x1000);
    std::iter::once(Status::Forked.number()).chain(before).chain(after).chain([0]).collect()
}

fn numbers(lines: &[(String, String)], name: &str) -> Vec<u32> {
    let of = lines.iter().filter(|(vm, _)| vm == name);
    of.map(|(_, line)| u32::from_str_radix(line, 16).expect("a number")).collect()
}

/// A platform's description of itself.
fn describes_itself(running: &Running, name: &str) -> Value {
    let known = wait_until(running, &["platforms", "--json"], |known| known["platforms"][0]["name"] == name);
    known["platforms"][0].clone()
}

/// Waits until the command prints JSON that is as it should be.
pub(super) fn wait_until(running: &Running, command: &[&str], is_right: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let answer = serde_json::from_str(&running.ask(command).unwrap_or_default()).unwrap_or_default();
        if is_right(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "{command:?}: {answer}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn platforms_with_certificates_clone_lazily_and_what_has_come_is_an_image() {
    let platforms = Platforms::with_certificates(&["a", "b"]);
    let mut target = Vmm::serve(&platforms.config("b", "")).start().expect("a platform");
    let kernel = one_with_much_memory(flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
    let mut source =
        source.config(&platforms.config("a", "[clone]\nlazy = true")).start().expect("host-vmm starts");
    know_each_other(&source, 2);
    know_each_other(&target, 2);
    source.type_bytes(b"!").expect("a guest that waits");
    let expected = what_a_copy_has();
    let lines = target.wait_for_lines("", expected.len()).expect("the clone runs");
    assert_eq!(numbers(&lines, "web.1"), expected);
    // All of it comes, and then it depends on nobody.
    let images = wait_until(&target, &["image", "ls", "--json"], |images| images[0]["id"].is_string());
    source.signal(Signal::SIGKILL).expect("a signal");
    let image = images[0]["id"].as_str().expect("an ID");
    target.ask(&["spawn", "--image", image]).expect("a copy of what has come");
    let lines = target.wait_for_lines("", 2 * expected.len()).expect("the copy runs");
    assert_eq!(numbers(&lines, "web.2"), expected);
    let vms =
        wait_until(&target, &["ps", "--json"], |vms| vms["vms"].as_array().is_some_and(|vms| vms.len() == 2));
    for vm in vms["vms"].as_array().expect("an array") {
        assert_eq!((&vm["state"], &vm["missing_bytes"]), (&"running".into(), &Value::Null));
    }
}

#[test]
fn a_guest_goes_on_where_others_are_shown_another_cpu() {
    let platforms = Platforms::new(&["a", "b"]);
    let profile =
        Command::new(assets::path("bin/host-vmm")).arg("cpu-profile").output().expect("host-vmm cpu-profile");
    let mut profile: Value = serde_json::from_slice(&profile.stdout).expect("JSON");
    let features = profile["features"].as_array_mut().expect("an array");
    let before = features.len();
    features
        .retain(|feature| !["umip", "3dnowprefetch", "lahf_lm"].contains(&feature.as_str().expect("a name")));
    assert_ne!(features.len(), before, "this host has none of what is to be hidden");
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), profile.to_string()).expect("a file");
    let less = format!("cpu_profile = \"less\"\ncpu_profile_file = \"{}\"", file.path().display());
    for (there, here) in [("", less.as_str()), (&less, "")] {
        let mut target = Vmm::serve(&platforms.config("b", there)).start().expect("a platform");
        let kernel = one_with_much_memory(flags::REMOTE).to_kernel();
        let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
        let mut source = source.config(&platforms.config("a", here)).start().expect("host-vmm starts");
        know_each_other(&source, 2);
        source.type_bytes(b"!").expect("a guest that waits");
        // What a platform's own guests are shown is not all that its host has.
        let expected = what_a_copy_has();
        let lines = target.wait_for_lines("", expected.len()).expect("the clone runs");
        assert_eq!(numbers(&lines, "web.1"), expected);
    }
}

#[test]
fn a_lazy_clone_ends_where_its_source_is_gone() {
    let platforms = Platforms::new(&["a", "b"]);
    let way = Proxy::start(platforms.address("a")).expect("a proxy");
    let config = platforms.config_by_way("b", Some(("a", way.address())), "");
    let mut target = Vmm::serve(&config).start().expect("a platform");
    let kernel = one_with_much_memory(flags::REMOTE).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M");
    let mut source =
        source.config(&platforms.config("a", "[clone]\nlazy = true")).start().expect("host-vmm starts");
    know_each_other(&source, 2);
    know_each_other(&target, 2);
    // Nothing of what it asks for comes.
    way.set(Fault::StallAfter(0));
    source.type_bytes(b"!").expect("a guest that waits");
    target.node("web.1").expect("the clone is launched, and waits for its first page");
    let missing = |vms: &Value| vms["vms"][0]["missing_bytes"].as_u64();
    let vms = wait_until(&target, &["ps", "--json"], |vms| vms["vms"][0]["state"] == "dependent");
    assert!(missing(&vms).is_some_and(|bytes| (1..=64 << 20).contains(&bytes)), "{vms}");
    source.signal(Signal::SIGKILL).expect("a signal");
    way.set(Fault::CutAfter(0));
    drop(way);
    let ended =
        |event: &Value| (event["event"] == "ended" && event["name"] == "web.1").then(|| event["how"].clone());
    let how = target.wait_for("its end", ended).expect("the clone ends");
    assert!(how["SourceLost"].is_string(), "{how}");
    wait_until(&target, &["ps", "--json"], |vms| vms["vms"].as_array().is_some_and(Vec::is_empty));
}

/// An image that is cloned from one platform to another, by a way on which things can go wrong.
struct Cloned {
    way: Proxy,
    source: Running,
    target: Running,
    image: String,
    /// What passes for a clone.
    bytes: u64,
    _kernel: NamedTempFile,
    _platforms: Platforms,
}

impl Cloned {
    /// Starts both, set up so, and clones it once.
    fn start(source: &str, target: &str) -> Self {
        let platforms = Platforms::new(&["a", "b"]);
        let way = Proxy::start(platforms.address("b")).expect("a proxy");
        let config =
            platforms.config_by_way("a", Some(("b", way.address())), &format!("keep = [\"web\"]\n{source}"));
        let target = Vmm::serve(&platforms.config("b", target)).start().expect("a platform");
        let (source, image, kernel) = source_with_image(&config);
        know_each_other(&source, 2);
        way.set(Fault::None);
        let mut cloned =
            Self { way, source, target, image, bytes: 0, _kernel: kernel, _platforms: platforms };
        cloned.again().expect("a clone");
        cloned.bytes = cloned.way.passed();
        cloned
    }

    fn again(&self) -> anyhow::Result<String> {
        self.source.ask(&["clone", "--image", &self.image, "--to", "b"])
    }

    /// Has the target let go of what has come.
    fn forget(&self) {
        self.target.ask(&["image", "rm", &self.image]).expect("an image that has come");
    }

    /// A part of what passes.
    fn part(&self, chance: &mut Rng) -> u64 {
        chance.u64(0..self.bytes)
    }
}

/// A platform that keeps the image of one fork, and the image's ID.
fn source_with_image(config: &str) -> (Running, String, NamedTempFile) {
    let kernel = one_with_much_memory(flags::LOCAL).to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(config);
    let mut source = source.start().expect("host-vmm starts");
    source.wait_for("the VM", |event| (event["event"] == "started").then_some(())).expect("a VM");
    source.type_bytes(b"!").expect("a guest that waits");
    source.wait_for_lines("", 1 + what_a_copy_has().len()).expect("a fork");
    let image = source.kept_image().expect("an image");
    (source, image, kernel)
}

#[test]
fn wherever_the_connection_is_cut_there_is_one_clone() {
    let mut chance = fault_rounds::chance();
    let cloned = Cloned::start("", "");
    for round in 1..=fault_rounds::rounds(100, 10) {
        cloned.forget();
        cloned.way.set(Fault::CutAfter(cloned.part(&mut chance)));
        cloned.again().unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        let vms = cloned.target.ask(&["ps", "--json"]).expect("a list");
        let vms: Value = serde_json::from_str(&vms).expect("JSON");
        let count = vms["vms"].as_array().expect("an array").len() as u64;
        assert_eq!(count, round + 1, "round {round}");
    }
}

#[test]
fn whatever_is_changed_on_the_way_no_clone_is_another_one() {
    let (rounds, mut chance) = (fault_rounds::rounds(100, 10), fault_rounds::chance());
    let mut cloned = Cloned::start("", "max_vms = 2000");
    let mut clones = 1;
    for _ in 0..rounds {
        // There is none where the last round has failed early.
        drop(cloned.target.ask(&["image", "rm", &cloned.image]));
        cloned.way.set(Fault::FlipAfter(cloned.part(&mut chance)));
        clones += u64::from(cloned.again().is_ok());
        cloned.way.set(Fault::None);
    }
    println!("{clones} of {} clones run", rounds + 1);
    cloned.again().expect("a clone, when nothing is changed");
    // What was said to run runs; what was not may run all the same, where only the answer was lost.
    let all_run = |vms: &Vec<Value>| vms.iter().all(|vm| vm["state"] == "running");
    let vms =
        wait_until(&cloned.target, &["ps", "--json"], |list| list["vms"].as_array().is_some_and(all_run));
    let vms = vms["vms"].as_array().expect("an array").len();
    assert!((clones + 1..=rounds + 2).contains(&(vms as u64)), "{clones} clones, {vms} VMs");
    let expected = what_a_copy_has();
    let lines = cloned.target.wait_for_lines("", vms * expected.len()).expect("all clones run");
    let names: BTreeSet<&str> = lines.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names.len(), vms);
    for name in names {
        assert_eq!(numbers(&lines, name), expected, "{name}");
    }
}

#[test]
fn a_platform_keeps_a_warm_vm_for_clones_of_a_shape_that_has_come_before() {
    let platforms = Platforms::new(&["a", "b"]);
    let target = Vmm::serve(&platforms.config("b", "ready = 1")).start().expect("a platform");
    let (mut source, _kernel) = source(&platforms.config("a", ""), 1);
    know_each_other(&source, 2);
    assert_eq!(fork_again(&mut source, 1), [FORKED]);
    let name = vms(&target, 1)[0]["name"].as_str().expect("a name").to_owned();
    target.ask(&["stop", &name]).expect("a VM that is there");
    vms(&target, 0);
    // What nobody needs any more is let go of at once.
    thread::sleep(Duration::from_secs(1));
    let known = wait_until(&target, &["platforms", "--json"], |known| {
        known["platforms"][0]["load"]["ready"][0]["shells"] == 1
    });
    assert_eq!(known["platforms"][0]["load"]["ready"][0]["config"]["ram_bytes"], 64 << 20);
}
