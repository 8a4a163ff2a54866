//! What forks leave behind that fail, that lose a side in the middle, or that are many: nothing.

use std::{
    collections::BTreeMap,
    env, fs, thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use platform::clone::LEASE;
use serde_json::Value;
use tempfile::NamedTempFile;
use vmfork_abi::{ErrorCode, Role, Status};
use vmfork_tests::{
    assets,
    bare_guest::{CONTROL_PAGE, Script, control},
    fault_rounds,
    faults::{self, STEPS},
    process,
    user_guest::{self, Order},
    vmm::{Running, TIMEOUT, Vmm},
};

use super::{ERROR, INDEX, ROLE, STATUS, printed};

const CHILD: u32 = Role::Child.number();

/// How many forks in a row are tried where nobody says otherwise.
const FORKS: u32 = 1000;

/// What a process has open, but for the files in its test's own folder.
pub(super) fn descriptors(pid: u32) -> BTreeMap<String, usize> {
    let open = process::descriptors(pid).expect("the process's descriptors");
    open.into_iter().filter(|(name, _)| !name.contains("vmfork-test-") && !name.contains("bare-")).collect()
}

/// The memory files that a process has mapped, with how often.
fn mappings(pid: u32) -> BTreeMap<String, usize> {
    let mut mapped = BTreeMap::new();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process's mappings");
    for name in maps.lines().filter_map(|line| line.split_once("/memfd:")) {
        *mapped.entry(name.1.to_owned()).or_default() += 1;
    }
    mapped
}

/// Waits until both are equal and stay so for a moment. What a clone's source has left behind is gone after a
/// lease.
pub(super) fn become_equal<T: PartialEq + std::fmt::Debug>(first: impl Fn() -> T, second: impl Fn() -> T) {
    let deadline = Instant::now() + 2 * LEASE;
    let mut equal = 0;
    while equal < 5 {
        let (left, right) = (first(), second());
        equal = if left == right { equal + 1 } else { 0 };
        assert!(equal > 0 || Instant::now() < deadline, "{left:?}\n{right:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_failure_at_any_step_leaves_nothing_behind() {
    let data = 0x40_0000;
    let mut script = Script::new();
    for seq in 1..=STEPS.len() as u64 {
        let mark = u32::try_from(seq).expect("small");
        script = script.store(data, mark).request(seq, "web", 4).ring();
        script = script.print(control(STATUS)).print(control(ERROR)).print(data);
    }
    // Stands still, so that what is left can be looked at.
    let kernel = script.to_kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "0");
    let vmm = vmm.option("--inject-fault", &faults::all());
    let mut running = vmm.start().expect("host-vmm starts");
    let node = running.node("vm").expect("the VM's node");
    let mut reports = 0;
    running
        .wait_for("all reports", |event| {
            reports += usize::from(event["event"] == "forked");
            (reports == STEPS.len()).then_some(())
        })
        .expect("a report of each fork");
    running.wait_for_lines("", 3 * STEPS.len()).expect("three numbers for each fork");
    // A VM that has not tried to fork, to compare with.
    let kernel = Script::new().print(CONTROL_PAGE).to_kernel();
    let idle = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "0");
    let mut idle = idle.start().expect("host-vmm starts");
    idle.wait_for_lines("", 1).expect("the VM runs");
    let idle_node = idle.node("vm").expect("the VM's node");
    // Each of the two gets ready for its next fork in the background.
    become_equal(|| (descriptors(node), mappings(node)), || (descriptors(idle_node), mappings(idle_node)));
    become_equal(|| descriptors(running.pid()), || descriptors(idle.pid()));
    become_equal(|| running.nodes().expect("processes"), || vec![node]);
    running.signal(Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");
    let expected =
        (1..).zip(STEPS).flat_map(|(mark, (_, code))| [Status::Failed.number(), code.number(), mark]);
    assert_eq!(printed(&ended, "vm"), expected.collect::<Vec<_>>());
    assert!(ended.events.iter().all(|event| event["event"] != "started" || event["name"] == "vm"));
    assert_eq!(ended.code, Some(143));
}

#[test]
fn nodes_that_are_killed_take_nothing_with_them() {
    // All VMs stand still after the fork.
    let kernel = Script::new().request(1, "web", 3).ring().print(control(INDEX)).to_kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "0");
    let mut running = vmm.start().expect("host-vmm starts");
    running.wait_for_lines("0000000", 4).expect("all VMs");
    for name in ["web.2", "vm"] {
        end(running.node(name).expect("a node")).expect("a node to kill");
        let gone =
            |event: &serde_json::Value| (event["event"] == "ended" && event["name"] == name).then_some(());
        running.wait_for("its end", gone).expect("an end");
    }
    // A process that has ended is there until the zygote has taken note.
    become_equal(|| running.nodes().expect("processes").len(), || 2);
    for name in ["web.1", "web.3"] {
        end(running.node(name).expect("a node")).expect("a node to kill");
    }
    let ended = running.end().expect("host-vmm ends with its last VM");
    assert_eq!(ended.code, Some(1), "the booted VM did not end well");
    assert_eq!(ended.how("vm"), Some(&serde_json::Value::Null));
}

#[test]
fn nodes_do_not_outlive_their_platform() {
    let kernel = Script::new().request(1, "web", 2).ring().print(control(INDEX)).to_kernel();
    let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.wait_for_lines("0000000", 3).expect("all VMs");
    let nodes: Vec<u32> = ["vm", "web.1", "web.2"].map(|name| running.node(name).expect("a node")).into();
    running.signal(Signal::SIGKILL).expect("a signal");
    let deadline = Instant::now() + TIMEOUT;
    // Some process adopts them, and waits for them in its own time: a node that has ended has no memory any
    // more.
    while nodes.iter().any(|node| process::private_kib(*node).is_ok_and(|kib| kib > 0)) {
        assert!(Instant::now() < deadline, "a node lives on");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_parent_goes_on_whose_children_hang_and_nothing_is_left_of_them() {
    let script = |seq| Script::new().wait_for_input().request(seq, "web", 2).ring().print(control(STATUS));
    let forked =
        |fork: Script| fork.print(control(ERROR)).only_if(control(ROLE), CHILD, Script::new().hang());
    let kernel = super::join(forked(script(1)), forked(script(2)).off()).to_kernel();
    let vmm =
        Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "1").option("--max-pause", "1");
    let mut running = vmm.start().expect("host-vmm starts");
    let node = running.node("vm").expect("a node");
    // The next fork is announced, a warm VM stands by for it, and one more is there.
    let taken = || (running.nodes().expect("processes").len(), descriptors(running.pid()));
    let rendezvous = || taken().1.get("/memfd:vm-rendezvous (deleted)").copied();
    become_equal(|| (taken().0, rendezvous()), || (3, Some(2)));
    let before = taken();
    let warm_nodes: Vec<u32> =
        running.nodes().expect("warm VMs").into_iter().filter(|pid| *pid != node).collect();
    warm_nodes.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    running.type_bytes(b"!").expect("a guest that waits");
    let late = [Status::Failed.number(), ErrorCode::Timeout.number()];
    let told = |lines: Vec<(String, String)>| lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>();
    assert_eq!(
        told(running.wait_for_lines("", 2).expect("the parent goes on")),
        late.map(|word| format!("{word:08x}"))
    );
    // Those that it did not come to go on; the others are gone, and others are there instead.
    let left = running.nodes().expect("processes");
    warm_nodes.iter().filter(|pid| left.contains(pid)).for_each(|pid| signal(*pid, Signal::SIGCONT));
    let taken = || (running.nodes().expect("processes").len(), descriptors(running.pid()));
    become_equal(taken, || before.clone());
    running.type_bytes(b"!").expect("a guest that waits");
    let lines = running.wait_for_lines("", 8).expect("all VMs");
    let forked = lines.iter().filter(|(_, line)| *line == format!("{:08x}", Status::Forked.number())).count();
    assert_eq!(forked, 3, "{lines:?}");
    running.signal(Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");
    let why = ended.forks()[0]["why"].as_str().expect("a reason");
    assert!(why.contains("within 1s") && why.contains("--max-pause"), "{why}");
}

/// Sends a signal to a process that is there.
fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.cast_signed()), signal).expect("a process");
}

/// A VM that forks when it is told to.
fn start_forker(ready: &str) -> (Running, NamedTempFile) {
    let kernel = user_guest::kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", ready);
    let mut running = vmm.start().expect("host-vmm starts");
    running.wait_for_line("00000001").expect("a guest that takes orders");
    (running, kernel)
}

/// Tells it to, and waits for the report of the fork.
fn carry_out(running: &mut Running, order: Order, meanwhile: impl FnOnce(&Running)) -> Value {
    running.type_bytes(&order.to_bytes()).expect("a guest that takes orders");
    meanwhile(running);
    loop {
        let event = running.next_event().expect("a report");
        if event["event"] == "forked" {
            return event;
        }
    }
}

/// Ends a process, if it is there.
fn end(pid: u32) -> nix::Result<()> {
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL)
}

/// All that VMs take of the host, but for memory: processes, descriptors and mappings.
pub(super) type Taken = (usize, BTreeMap<String, usize>, BTreeMap<String, usize>, BTreeMap<String, usize>);

pub(super) fn taken(running: &Running, node: u32) -> Taken {
    let nodes = running.nodes().expect("processes").len();
    (nodes, descriptors(running.pid()), descriptors(node), mappings(node))
}

/// What is taken once nothing happens any more after forks: the next one is announced, with its file for what
/// is written to, a warm VM stands by for it, and `ready` more are there.
pub(super) fn at_rest(running: &Running, node: u32, ready: usize) -> Taken {
    let deadline = Instant::now() + TIMEOUT;
    let (mut last, mut equal) = (taken(running, node), 0);
    while equal < 10 {
        assert!(Instant::now() < deadline, "no rest: {last:?}");
        thread::sleep(Duration::from_millis(100));
        let now = taken(running, node);
        let is_announced = now.1.keys().any(|name| name.contains("vm-delta"));
        equal = if is_announced && now.0 == 1 + ready + 1 && now == last { equal + 1 } else { 0 };
        last = now;
    }
    last
}

#[test]
fn thousands_of_forks_leave_nothing_behind() {
    let forks =
        env::var("VMFORK_TEST_FORKS").map_or(FORKS, |forks| forks.parse().expect("a number of forks"));
    let forks = if assets::in_lab() { forks / 20 } else { forks };
    let (mut running, _kernel) = start_forker("2");
    let node = running.node("vm").expect("a node");
    let order = Order { count: 1, ..Order::default() };
    // The first one makes it a private view, and what has its size from the most that was needed grows.
    for _ in 0..8 {
        assert_eq!(carry_out(&mut running, order, |_| {})["code"], 0);
    }
    let before = at_rest(&running, node, 2);
    for number in 0..forks {
        let report = carry_out(&mut running, order, |_| {});
        assert_eq!(report["code"], 0, "fork {number}: {report}");
    }
    become_equal(|| taken(&running, node), || before.clone());
    running.signal(Signal::SIGTERM).expect("a signal");
    assert_eq!(running.end().expect("host-vmm ends").code, Some(143));
}

#[test]
fn what_a_fork_has_copied_is_not_the_parents_own_any_more() {
    let (mut running, _kernel) = start_forker("1");
    let private_bytes = |running: &Running| {
        let vms: Value =
            serde_json::from_str(&running.ask(&["ps", "--json"]).expect("a list")).expect("JSON");
        let vms = vms["vms"].as_array().expect("an array");
        let vm = vms.iter().find(|vm| vm["name"] == "vm").expect("the parent");
        vm["memory"]["private_bytes"].as_u64().expect("a size")
    };
    let order = Order { count: 1, dirty_pages: 4096, ..Order::default() };
    // The first one is another matter: all that a booted VM has becomes an image.
    assert_eq!(carry_out(&mut running, order, |_| {})["code"], 0);
    let given_up = (0..20).any(|_| {
        assert_eq!(carry_out(&mut running, order, |_| {})["code"], 0);
        // It has written to 16 MiB. Where the last fork's are still being cleared away, it keeps them.
        thread::sleep(Duration::from_millis(300));
        private_bytes(&running) < 8 << 20
    });
    assert!(given_up);
}

#[test]
fn whoever_is_killed_in_the_middle_of_a_fork_the_parent_goes_on() {
    let (rounds, mut chance) = (fault_rounds::rounds(100, 20), fault_rounds::chance());
    let (mut running, _kernel) = start_forker("3");
    let node = running.node("vm").expect("a node");
    let order = Order { count: 2, ..Order::default() };
    assert_eq!(carry_out(&mut running, order, |_| {})["code"], 0);
    let before = at_rest(&running, node, 3);
    let mut failed = 0;
    for _ in 0..rounds {
        // Any moment of a fork, and of the pool's work.
        let report = carry_out(&mut running, order, |running| {
            thread::sleep(Duration::from_micros(chance.u64(0..2000)));
            let others = running.nodes().expect("processes").into_iter().filter(|pid| *pid != node);
            let others: Vec<u32> = others.collect();
            // It may have ended by itself meanwhile.
            chance.choice(&others).map(|pid| end(*pid));
        });
        failed += u32::from(report["code"] != 0);
    }
    println!("{failed} of {rounds} forks failed");
    // It takes a while to end a process, and one that is being ended may still be chosen.
    thread::sleep(Duration::from_secs(1));
    assert_eq!(carry_out(&mut running, order, |_| {})["code"], 0);
    become_equal(|| taken(&running, node), || before.clone());
    // And then the parent itself.
    running
        .type_bytes(&Order { count: 8, ..Order::default() }.to_bytes())
        .expect("a guest that takes orders");
    thread::sleep(Duration::from_millis(1));
    end(node).expect("a node to kill");
    let host_vmm = running.pid();
    assert_eq!(running.end().expect("host-vmm ends with its last VM").code, Some(1));
    assert!(process::children(host_vmm).expect("processes").is_empty());
}
