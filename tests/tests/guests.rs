//! `host-vmm` with Debian's kernel, as its users run it.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use vmfork_abi::ErrorCode;
use vmfork_tests::{
    clocks,
    cluster::Platforms,
    faults::{self, STEPS},
    process,
    vmm::{Ended, Running, Vmm, console_line},
};

const TEST_GUEST: &str = "/usr/bin/test-guest";

/// A guest that runs a command of `test-guest`.
fn guest(command: &[&str]) -> Vmm {
    Vmm::linux("minimal.cpio", &[&[TEST_GUEST], command].concat())
}

fn start(vmm: Vmm) -> Running {
    vmm.start().expect("host-vmm starts")
}

/// Runs to the end, which must be a good one.
fn run(vmm: Vmm) -> Ended {
    let ended = start(vmm).end().expect("host-vmm ends");
    assert_eq!(ended.code, Some(0), "{:?}", ended.lines(""));
    ended
}

/// The objects behind these lines.
fn objects(lines: &[(String, String)]) -> Vec<Value> {
    lines.iter().map(|(_, line)| serde_json::from_str(line).expect("JSON")).collect()
}

fn all_differ(what: &str, values: impl Iterator<Item = Value>) {
    let values: Vec<String> = values.map(|value| value.to_string()).collect();
    let different: BTreeSet<&String> = values.iter().collect();
    assert_eq!(different.len(), values.len(), "{what}: {values:?}");
}

#[test]
fn linux_boots_without_complaints_and_takes_input() {
    let mut running = start(guest(&["hello"]).option("--cpus", "2"));
    running.wait_for_line("READY").expect("a guest that is ready");
    running.type_line("are you there").expect("a console that takes input");
    running.wait_for_line("HELLO are you there").expect("an answer");
    assert!(running.log("vm").expect("a log").contains("HELLO"));
    let ended = running.end().expect("host-vmm ends");
    assert_eq!(ended.code, Some(0));

    let log = run(guest(&["kernel-log"])).lines("LOG ");
    assert!(log.len() > 50, "{log:?}");
    let complaints = log.iter().filter(|(_, line)| {
        ["WARNING: CPU", "cut here", "Call Trace", "Unhandled", "unchecked MSR", "soft lockup", "BUG:"]
            .iter()
            .any(|bad| line.contains(bad))
    });
    assert_eq!(complaints.collect::<Vec<_>>(), [] as [&(String, String); 0]);
}

#[test]
fn reboot_and_panic_are_told_apart_from_power_off() {
    let reboot = start(Vmm::linux("minimal.cpio", &["/bin/busybox", "reboot", "-f"])).end().expect("an end");
    assert_eq!(reboot.code, Some(3));
    let panic = start(guest(&["panic"])).end().expect("an end");
    assert_eq!(panic.code, Some(3));
}

#[test]
fn forks_of_one_two_and_eight_make_different_vms() {
    let ended = run(guest(&["forks", "1", "2", "8"]));
    let copies = objects(&ended.lines("COPY "));
    assert_eq!(copies.len(), 3 + 1 + 2 + 8);
    let children: Vec<&Value> = copies.iter().filter(|copy| copy["fork"]["role"] == "child").collect();
    assert_eq!(children.len(), 11);
    for count in [1, 2, 8] {
        let indices = children.iter().filter(|copy| copy["fork"]["count"] == count);
        let indices: BTreeSet<u64> =
            indices.map(|copy| copy["fork"]["index"].as_u64().expect("an index")).collect();
        assert_eq!(indices, (1..=count).collect());
    }
    let of = |field: &'static str| children.iter().map(move |copy| copy["fork"][field].clone());
    all_differ("VM IDs", of("vm_id"));
    // The parent knows all of them, and they know of no copies.
    let listed: Vec<&Value> =
        copies.iter().flat_map(|copy| copy["fork"]["copies"].as_array().expect("a list")).collect();
    let ids: BTreeSet<String> = listed.iter().map(|copy| copy["vm_id"].to_string()).collect();
    assert_eq!(ids, of("vm_id").map(|id| id.to_string()).collect());
    assert!(listed.iter().all(|copy| copy["placement"] == "local" && copy["platform"] == ""), "{listed:?}");
    assert!(of("copies").all(|copies| copies == Value::Array(Vec::new())));
    all_differ("names", of("name"));
    all_differ("host names", children.iter().map(|copy| copy["hostname"].clone()));
    all_differ("random UUIDs", copies.iter().map(|copy| copy["uuid"].clone()));
    all_differ("random bytes", copies.iter().map(|copy| copy["random"].clone()));
    assert_eq!(of("parent_id").map(|id| id.to_string()).collect::<BTreeSet<_>>().len(), 1);
    assert!(of("generation").all(|generation| generation == 1));
    // The wall clock of each child is right, though its parent's is an hour late.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_millis();
    let hour = 3600 * 1000;
    for copy in &copies {
        let late = if copy["fork"]["role"] == "child" { 0 } else { hour };
        let told = u128::from(copy["wall_ms"].as_u64().expect("a time"));
        assert!((told + late).abs_diff(now) < hour / 10, "the host's clock says {now}: {copy}");
    }
}

#[test]
fn no_clock_of_any_vcpu_goes_back_in_any_copy() {
    // What the guest takes its time from is the TSC itself, and warm VMs stand ready since the start.
    let tsc = |vmm: Vmm| vmm.option("--cpus", "2").cmdline("clocksource=tsc tsc=reliable");
    clocks::check(guest, 6, "tsc", tsc);
    clocks::check(guest, 3, "kvm-clock", |vmm| vmm.option("--cpus", "4").option("--ready", "0"));
}

#[test]
fn memory_is_isolated_both_ways() {
    let mut running = start(guest(&["memory", "64", "2"]));
    running.wait_for_lines("CHILD wrote", 2).expect("children that write");
    running.type_line("go on").expect("a console that takes input");
    running.wait_for_line("PARENT ok").expect("the parent's memory as it was");
    running.wait_for_lines("CHILD ok 16384", 2).expect("the children's memory as it was");
    assert_eq!(running.end().expect("an end").code, Some(0));
}

#[test]
fn children_fork_again() {
    let ended = run(guest(&["nested", "4"]));
    let mut generations = ended.lines("GENERATION ");
    generations.sort_by_key(|(_, line)| line.clone());
    let started = |generation: u64| {
        let of = |event: &&Value| event["event"] == "started" && event["generation"] == generation;
        ended.events.iter().find(of).expect("a VM of this generation")
    };
    assert_eq!(generations.len(), 4);
    for (generation, (_, line)) in (1..).zip(&generations) {
        let parent = started(generation - 1)["id"].as_str().expect("an ID");
        assert_eq!(line, &format!("{generation} parent {parent}"));
    }
}

#[test]
fn an_application_goes_on_counting_on_another_platform() {
    let platforms = Platforms::new(&["a", "b"]);
    let mut target = start(Vmm::serve(&platforms.config("b", "")));
    for (lazy, name) in [(false, "web.1"), (true, "web.2")] {
        let config = platforms.config("a", &format!("[clone]\nlazy = {lazy}"));
        let mut source = start(guest(&["count-elsewhere"]).option("--mem", "256M").config(&config));
        source.wait_for_line("READY").expect("a guest that is ready");
        let known: Value =
            serde_json::from_str(&source.ask(&["platforms", "--json"]).expect("a list")).expect("JSON");
        assert_eq!(known["platforms"].as_array().expect("an array").len(), 2, "{known}");
        source.type_line("go on").expect("a console that takes input");
        let (_, count) = source.wait_for_line("COUNT ").expect("a parent that goes on counting");
        let (_, parent) = source.wait_for_line("COPY ").expect("the parent's identity");
        let mut of_clone = |prefix: &str| {
            let of = |event: &Value| {
                console_line(event, prefix).filter(|(vm, _)| vm == name).map(|(_, line)| line)
            };
            target.wait_for(prefix, of).expect("a clone that goes on")
        };
        assert_eq!(of_clone("COUNT "), count);
        let [parent, clone]: [Value; 2] =
            [parent, of_clone("COPY ")].map(|line| serde_json::from_str(&line).expect("JSON"));
        assert_eq!(
            (&clone["fork"]["role"], &clone["fork"]["parent_id"]),
            (&"child".into(), &parent["fork"]["vm_id"])
        );
        for what in ["hostname", "uuid", "random"] {
            assert_ne!(clone[what], parent[what], "{what}");
        }
        let ended = |event: &Value| {
            (event["event"] == "ended" && event["name"] == name).then(|| event["how"].clone())
        };
        assert_eq!(target.wait_for("its end", ended).expect("an end"), "PoweredOff");
        source.type_line("go on").expect("a console that takes input");
        assert_eq!(source.end().expect("an end").code, Some(0));
    }
}

#[test]
fn threads_go_on_in_every_copy() {
    for cpus in ["1", "4", "8"] {
        let ended = run(guest(&["threads", "6", "2"]).option("--cpus", cpus));
        let mut ok: Vec<String> = ended.lines("THREADS ok ").into_iter().map(|(_, index)| index).collect();
        ok.sort_unstable();
        assert_eq!(ok, ["0", "1", "2"], "{:?}", ended.lines(""));
    }
}

#[test]
fn vcpus_that_ring_at_once_are_served_one_after_another() {
    const RINGS: usize = 25;
    // Copies may not fork, whatever they try; and there may be no more of them than there are rings.
    let vmm = guest(&["ring-at-once", &RINGS.to_string()]).option("--cpus", "4");
    let ended = run(vmm.option("--limit", "*:generations=1").option("--ready", "1"));
    let mut tame: Vec<String> = ended.lines("TAME ").into_iter().map(|(_, index)| index).collect();
    tame.sort_unstable();
    assert_eq!(tame, ["0", "1"], "{:?}", ended.lines(""));
    let of_parent = ended.forks().into_iter().filter(|fork| fork["parent"]["generation"] == 0);
    let codes: Vec<u64> = of_parent.map(|fork| fork["code"].as_u64().expect("a code")).collect();
    let forks = codes.iter().filter(|code| **code == 0).count();
    println!("{forks} forks of {} reported rings", codes.len());
    let busy = u64::from(ErrorCode::Busy.number());
    assert!(codes.iter().all(|code| *code == 0 || *code == busy), "{codes:?}");
    assert!((1..=4 * RINGS + 1).contains(&forks));
    let started = |event: &&Value| event["event"] == "started" && event["generation"] == 1;
    assert_eq!(ended.events.iter().filter(started).count(), forks);
}

#[test]
fn containers_of_one_guest_are_served_one_after_another() {
    const CONTAINERS: usize = 3;
    // Copies may not fork, whatever they take themselves for.
    let vmm = guest(&["containers", &CONTAINERS.to_string()]).option("--cpus", "2");
    let ended = run(vmm.option("--limit", "*:generations=1"));
    let (of_parent, of_copies): (Vec<_>, Vec<_>) =
        ended.lines("TOLD ").into_iter().partition(|(vm, _)| vm == "vm");
    let of_parent: Vec<String> = of_parent.into_iter().map(|(_, told)| told).collect();
    let children = |container: usize| 1 + container % 2;
    let (while_held, then) = of_parent.split_at_checked(CONTAINERS).expect("each container is told twice");
    let sorted = |told: &[String]| told.iter().cloned().collect::<BTreeSet<_>>();
    assert_eq!(
        sorted(while_held),
        (0..CONTAINERS).map(|container| format!("w{container} DeadlinePassed")).collect()
    );
    let parent = |container: usize| format!("w{container} parent {}", children(container));
    assert_eq!(sorted(then), (0..CONTAINERS).map(parent).collect());
    assert_eq!(then.len(), CONTAINERS);
    for (vm, told) in of_copies {
        // A copy that is told prints it while another process switches it off, whose kernel says so.
        let told = told.split_once('[').map_or(told.as_str(), |(told, _)| told);
        let (container, told) = told.split_once(' ').expect("a container, and what it is told");
        let number: usize = container.trim_start_matches('w').parse().expect("a container's number");
        let is_its_own = vm.split_once('.').is_some_and(|(vm_type, _)| vm_type == container);
        let role =
            if is_its_own { format!("child {}", children(number)) } else { "child of another".to_owned() };
        // One that had not asked yet asks in the copy too; one that had been told before may print it in
        // both.
        let was_told_before = !is_its_own && told == format!("parent {}", children(number));
        let is_right = told == role || told == "refused Generation" || was_told_before;
        assert!(is_right, "{container} in {vm} is told {told}");
    }
    let of_booted = ended.forks().into_iter().filter(|fork| fork["parent"]["generation"] == 0);
    assert!(of_booted.clone().all(|fork| fork["code"] == 0), "{:?}", of_booted.collect::<Vec<_>>());
    let started = |event: &&Value| event["event"] == "started" && event["generation"] == 1;
    assert_eq!(ended.events.iter().filter(started).count(), (0..CONTAINERS).map(children).sum::<usize>());
}

#[test]
fn a_failed_fork_tells_the_guest_and_leaves_it_running() {
    // After all failures, two forks that work; and the second one, of a VM that is a private view by then.
    let times = (STEPS.len() + 2).to_string();
    let ended =
        run(guest(&["errors", &times]).option("--inject-fault", &faults::all()).option("--cpus", "2"));
    let codes: Vec<String> = ended.lines("ERROR ").into_iter().map(|(_, code)| code).collect();
    let reports: Vec<&Value> = ended.forks().iter().map(|fork| &fork["why"]).collect();
    assert_eq!(
        codes,
        STEPS.iter().map(|(_, code)| code.number().to_string()).collect::<Vec<_>>(),
        "{reports:?}"
    );
    assert_eq!(ended.lines("FORKED ").len(), 6);
    assert_eq!(ended.events.iter().filter(|event| event["event"] == "started").count(), 5);
}

#[test]
fn an_idle_child_costs_next_to_nothing() {
    for mem in ["256M", "1G"] {
        let mut running = start(guest(&["idle", "2"]).option("--mem", mem));
        running.wait_for_lines("IDLE ", 3).expect("all copies");
        for name in ["web.1", "web.2"] {
            let node = running.node(name).expect("a node");
            let private = process::private_kib(node).expect("the node's memory");
            println!("{mem}: {name} has {private} KiB of its own");
            assert!(private < 4096, "{mem}: {name} has {private} KiB of its own");
        }
        running.signal(Signal::SIGTERM).expect("a signal");
        assert_eq!(running.end().expect("an end").code, Some(143));
    }
}

#[test]
fn killed_nodes_leave_nothing_behind() {
    let mut running = start(guest(&["storm"]));
    running.wait_for_line("STORM forked").expect("a fork");
    let node = running.node("vm").expect("a node");
    for round in 0..30u64 {
        // Any moment of a fork, and warm VMs too.
        thread::sleep(Duration::from_millis(round * 37 % 101));
        let nodes = running.nodes().expect("processes");
        let child = nodes.iter().filter(|pid| **pid != node).nth(usize::try_from(round % 2).expect("small"));
        if let Some(Err(errno)) = child.map(|pid| kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL)) {
            println!("a child has ended before it was killed: {errno}");
        }
    }
    // The parent still forks, whatever became of the others; then it dies in the middle.
    let mut forked = 0;
    running
        .wait_for("another fork", |event| {
            forked += usize::from(console_line(event, "STORM forked").is_some());
            (forked == 3).then_some(())
        })
        .expect("a parent that goes on");
    kill(Pid::from_raw(node.cast_signed()), Signal::SIGKILL).expect("a node to kill");
    let host_vmm = running.pid();
    let ended = running.end().expect("host-vmm ends with its last VM");
    assert_eq!(ended.code, Some(1));
    assert!(process::children(host_vmm).expect("processes").is_empty());
    let count = |what: &str| ended.events.iter().filter(|event| event["event"] == what).count();
    assert_eq!(count("started"), count("ended"));
}
