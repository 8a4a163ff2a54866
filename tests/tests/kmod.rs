//! The lean kernel, and what the kernel module offers in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmfork_abi::{ErrorCode, Role};
use vmfork_tests::{
    assets, clocks,
    faults::{self, STEPS},
    vmm::{Ended, Vmm},
};

const TEST_GUEST: &str = "/usr/bin/test-guest";
const KMOD_GUEST: &str = "/usr/bin/kmod-guest";

/// The unprivileged user of the images who may fork, the group that lets him, and one who may not.
const MEMBER: [&str; 4] = ["--uid", "1000", "--gid", "900"];
const STRANGER: [&str; 4] = ["--uid", "1001", "--gid", "1001"];

/// What a kernel's log has only where something is wrong.
const COMPLAINTS: [&str; 10] = [
    "WARNING:",
    "cut here",
    "Call Trace",
    "Unhandled",
    "unchecked MSR",
    "soft lockup",
    "BUG:",
    "Oops",
    "Failed",
    "failed",
];

/// A guest with the lean kernel that runs a command of `test-guest`.
fn test_guest(command: &[&str]) -> Vmm {
    Vmm::lean("minimal.cpio", &[&[TEST_GUEST], command].concat())
}

/// One that runs a command of `kmod-guest`.
fn guest(arguments: &[&str]) -> Vmm {
    Vmm::lean("minimal.cpio", &[&[KMOD_GUEST], arguments].concat())
}

/// Runs to the end, which must be a good one: no program has failed, and no kernel complains.
fn run(vmm: Vmm) -> Ended {
    let ended = vmm.start().expect("host-vmm starts").end().expect("host-vmm ends");
    assert_eq!(ended.code, Some(0), "{:?}", ended.lines(""));
    assert_eq!(ended.lines("COMPLAINT "), [], "{:?}", ended.lines(""));
    assert_eq!(ended.lines("guest: "), [], "{:?}", ended.lines(""));
    ended
}

fn texts(ended: &Ended, prefix: &str) -> Vec<String> {
    ended.lines(prefix).into_iter().map(|(_, line)| line).collect()
}

/// The one line with this beginning.
fn text(ended: &Ended, prefix: &str) -> String {
    let [line] =
        <[String; 1]>::try_from(texts(ended, prefix)).unwrap_or_else(|lines| panic!("{prefix}: {lines:?}"));
    line
}

fn started(ended: &Ended) -> usize {
    ended.events.iter().filter(|event| event["event"] == "started" && event["generation"] != 0).count()
}

fn objects(ended: &Ended, prefix: &str) -> Vec<Value> {
    texts(ended, prefix).iter().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn is(role: Role) -> impl Fn(&&Value) -> bool {
    move |copy| copy["role"] == role.number()
}

/// Debian's kernel of the other tests is an older one.
#[test]
fn no_clock_of_any_vcpu_goes_back_in_any_copy() {
    clocks::check(test_guest, 4, "kvm-clock", |vmm| vmm.option("--cpus", "2"));
}

#[test]
fn lean_kernel_boots_without_complaints_and_takes_input() {
    let mut running = test_guest(&["hello"]).option("--cpus", "2").start().expect("host-vmm starts");
    running.wait_for_line("READY").expect("a guest that is ready");
    running.type_line("are you there").expect("a console that takes input");
    running.wait_for_line("HELLO are you there").expect("an answer");
    assert_eq!(running.end().expect("host-vmm ends").code, Some(0));

    let log = run(test_guest(&["kernel-log"])).lines("LOG ");
    assert!(log.len() > 50, "{log:?}");
    let complaints = log.iter().filter(|(_, line)| COMPLAINTS.iter().any(|bad| line.contains(bad)));
    assert_eq!(complaints.collect::<Vec<_>>(), [] as [&(String, String); 0]);
}

#[test]
fn a_member_of_the_group_forks_by_ioctl() {
    for (cpus, counts) in [("1", [1, 8]), ("2", [1, 2]), ("4", [1, 2])] {
        let [first, second] = counts.map(|count| count.to_string());
        let ended = run(guest(&[&MEMBER[..], &["forks", &first, &second]].concat()).option("--cpus", cpus));
        let copies = objects(&ended, "COPY ");
        let children: Vec<&Value> = copies.iter().filter(is(Role::Child)).collect();
        assert_eq!(
            (copies.len(), children.len() as u64),
            (2 + children.len(), counts.iter().sum()),
            "{cpus}"
        );
        for count in counts {
            let indices = children.iter().filter(|copy| copy["count"] == count);
            let indices: BTreeSet<u64> =
                indices.map(|copy| copy["index"].as_u64().expect("an index")).collect();
            assert_eq!(indices, (1..=count).collect());
        }
        // The parent is told of all its copies.
        let told = copies
            .iter()
            .filter(is(Role::Parent))
            .flat_map(|copy| copy["copies"].as_array().expect("a list"));
        let told: BTreeSet<String> = told.map(Value::to_string).collect();
        assert_eq!(told, children.iter().map(|copy| copy["vm_id"].to_string()).collect());
        assert!(children.iter().all(|copy| copy["listed"] == 0 && copy["generation"] == 1));
        // Nobody has another's random numbers.
        let random: BTreeSet<String> = copies.iter().map(|copy| copy["random"].to_string()).collect();
        assert_eq!(random.len(), copies.len());
    }
}

#[test]
fn a_childs_clock_is_right_though_its_parents_is_not() {
    let ended = run(guest(&["clock"]));
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_millis();
    let told: BTreeMap<String, u128> = texts(&ended, "CLOCK ")
        .iter()
        .filter_map(|line| {
            line.split_once(' ').map(|(role, ms)| (role.to_owned(), ms.parse().expect("a time")))
        })
        .collect();
    let hour = 3600 * 1000;
    assert!(told["child"].abs_diff(now) < hour / 10, "{told:?}, now {now}");
    assert!((told["parent"] + hour).abs_diff(now) < hour / 10, "{told:?}, now {now}");
}

/// What each VM has drawn, by its name.
fn draws(ended: &Ended) -> BTreeMap<String, Vec<String>> {
    let mut draws: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (vm, value) in ended.lines("DRAW ") {
        draws.entry(vm).or_default().push(value);
    }
    draws
}

/// Makes sure that no number was drawn by two of so many VMs.
fn all_differ(draws: &BTreeMap<String, Vec<String>>, vms: usize) {
    assert_eq!(draws.len(), vms, "{draws:?}");
    let mut all = BTreeSet::new();
    for (vm, values) in draws {
        assert!(values.len() >= 32, "{vm} has drawn {} numbers", values.len());
        let again: Vec<&String> = values.iter().filter(|value| !all.insert(*value)).collect();
        assert_eq!(again, [] as [&String; 0], "{vm} has drawn what another one has");
    }
}

#[test]
fn no_number_is_drawn_twice_though_the_vcpu_that_forks_is_the_last_one_to_run_in_a_copy() {
    for cpus in ["1", "2"] {
        let guest = guest(&["draws", "2"]).cmdline("initcall_blacklist=vmgenid_plaform_driver_init");
        let ended = run(guest.option("--cpus", cpus).option("--inject-fault", "first-run"));
        all_differ(&draws(&ended), 3);
    }
}

#[test]
fn copies_that_their_guest_has_not_asked_for_draw_numbers_of_their_own() {
    let mut running = guest(&["draws-alone"]).start().expect("host-vmm starts");
    running.wait_for_line("READY").expect("a guest that draws");
    running.ask(&["fork", "vm", "--count", "2"]).expect("two copies");
    running.wait_for_lines("COMPLAINTS ", 2).expect("copies whose kernel has heard of it");
    running.signal(Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");
    all_differ(&draws(&ended), 2);
    // Until then they draw the same numbers, if they draw any.
    let drawn = |vm: &str| -> Vec<String> {
        ended.lines("DREW ").into_iter().filter(|(name, _)| name == vm).map(|(_, line)| line).collect()
    };
    let (one, other) = (drawn("vm.1"), drawn("vm.2"));
    let is_same = |(one, other): &(&String, &String)| {
        one.split_once(' ').map(|one| one.1) == other.split_once(' ').map(|other| other.1)
    };
    let same = one.iter().zip(&other).take_while(is_same).count();
    println!(
        "{same} numbers were drawn twice, until {:?} and {:?} (microseconds, number)",
        one.get(same),
        other.get(same)
    );
    assert_eq!(ended.lines("COMPLAINT "), []);
}

#[test]
fn five_hundred_forks_in_a_row() {
    for (cpus, times) in [("1", 500), ("2", 20), ("4", 20)] {
        let ended = run(guest(&["repeat", &times.to_string()]).option("--cpus", cpus));
        assert_eq!(text(&ended, "REPEATED "), times.to_string());
        assert_eq!(started(&ended), times);
    }
}

#[test]
fn others_may_not_open_it() {
    let eacces = "Err(Some(13))";
    for (who, expected) in [(MEMBER, "Ok(())"), (STRANGER, eacces)] {
        let ended = run(guest(&[&who[..], &["open"]].concat()));
        assert_eq!(text(&ended, "OPEN "), expected, "{who:?}");
    }
    // Whoever is root in a namespace of his own is still who he was outside.
    let ended = run(guest(&[&STRANGER[..], &["open-in-namespace"]].concat()));
    assert_eq!(text(&ended, "OPEN "), eacces);
}

#[test]
fn callers_at_once_are_served_one_after_another() {
    for cpus in ["1", "4"] {
        let vmm =
            guest(&["at-once", "2", "3", "3"]).option("--cpus", cpus).option("--limit", "*:generations=1");
        let ended = run(vmm);
        assert_eq!(text(&ended, "AT-ONCE "), "18");
        assert_eq!(started(&ended), 18);
    }
}

#[test]
fn a_signal_ends_the_wait_and_never_a_fork() {
    let ended = run(guest(&["signals", "4", "6"]).option("--cpus", "2").option("--limit", "*:generations=1"));
    let told = text(&ended, "SIGNALS ");
    let (forks, interrupted) = told.split_once(' ').expect("two numbers");
    println!("{forks} forks, {interrupted} interrupted");
    assert_eq!(forks, "24");
    assert_ne!(interrupted, "0", "no signal came while a thread waited");
    assert_eq!(started(&ended), 24, "a caller that was told of no fork has made one");
}

#[test]
fn processes_are_told_in_parent_and_child() {
    for cpus in ["1", "4"] {
        let ended = run(guest(&["notices"]).option("--cpus", cpus));
        let notices = objects(&ended, "NOTICES ");
        assert_eq!(notices.len(), 2, "{cpus}");
        for (role, generation) in [(Role::Parent, [0, 0]), (Role::Child, [0, 1])] {
            let notice = notices.iter().find(is(role)).expect("both roles");
            assert_eq!(notice["generation"], Value::from(generation.to_vec()), "{notice}");
            assert_eq!(notice["by_poll"], role.number(), "{notice}");
            assert_eq!(notice["by_read"], role.number().to_string(), "{notice}");
            assert_eq!(notice["forks"], 1, "{notice}");
        }
    }
}

#[test]
fn processes_in_a_copy_are_told_though_an_operator_has_made_it() {
    let mut running = guest(&["others"]).option("--cpus", "2").start().expect("host-vmm starts");
    running.wait_for_line("READY").expect("a guest that waits");
    running.ask(&["fork", "vm"]).expect("a copy");
    let (copy, told) = running.wait_for_line("TOLD ").expect("what the copy is told");
    let child = Role::Child.number();
    assert_eq!(copy, "vm.1");
    assert!(told.starts_with(&format!("{child} {child} [")), "{told}");
    assert_eq!(told.matches("VMFORK_NAME=vm.1").count(), 1, "{told}");
    running.signal(Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");
    assert_eq!(ended.code, Some(143));
    assert_eq!(texts(&ended, "TOLD ").len(), 1, "the parent is told nothing");
    assert_eq!(ended.lines("COMPLAINT "), []);
}

#[test]
fn a_copy_announces_itself() {
    let ended = run(guest(&["uevents"]));
    let told: BTreeMap<String, String> = texts(&ended, "UEVENTS ")
        .iter()
        .filter_map(|line| line.split_once(' ').map(|(role, events)| (role.to_owned(), events.to_owned())))
        .collect();
    assert_eq!(told["parent"], "[]");
    let child = &told["child"];
    for part in
        ["change@/devices/virtual/misc/vmfork", "VMFORK_ROLE=child", "VMFORK_INDEX=1", "VMFORK_NAME=web.1"]
    {
        assert!(child.contains(part), "{part}: {child}");
    }
}

#[test]
fn what_is_wrong_is_refused_and_makes_no_fork() {
    let ended = run(guest(&["refusals"]).option("--limit", "forbidden:generations=0"));
    let refused: BTreeMap<String, String> = texts(&ended, "REFUSED ")
        .iter()
        .filter_map(|line| line.split_once(' ').map(|(case, errno)| (case.to_owned(), errno.to_owned())))
        .collect();
    let expected = [
        (
            "EINVAL",
            "size no-size no-children too-many-children flags no-type type unpadded-type copies-nowhere",
        ),
        ("EINVAL", "short-read status-size map-two-pages map-second-page"),
        ("EPROTONOSUPPORT", "version no-version identity-version"),
        ("ETIMEDOUT", "deadline"),
        ("EBADF", "reader"),
        ("EFAULT", "fork-at-null fork-at-low fork-at-kernel fork-at-last"),
        ("EFAULT", "status-at-null status-at-low status-at-kernel status-at-last"),
        ("EFAULT", "identity-at-null identity-at-low identity-at-kernel identity-at-last"),
        ("EFAULT", "fork-read-only fork-across copies-low copies-kernel"),
        ("ENOTTY", "other-number other-smaller other-none other-tcgets"),
        ("EACCES", "map-writable map-private-writable map-then-writable"),
    ];
    let expected =
        expected.iter().flat_map(|(errno, cases)| cases.split(' ').map(|case| (case, (*errno).to_owned())));
    let mut expected: BTreeMap<String, String> =
        expected.map(|(case, errno)| (case.to_owned(), errno)).collect();
    expected.insert("by-vmm".to_owned(), format!("ECONNREFUSED {}", ErrorCode::Generation.number()));
    assert_eq!(refused, expected);
    assert_eq!(text(&ended, "FORKS "), "0");
    let mut forked = texts(&ended, "FORKED ");
    forked.sort_unstable();
    assert_eq!(forked, ["child", "parent"]);
    assert_eq!(started(&ended), 1);
}

#[test]
fn it_stays_while_it_is_used_and_comes_and_goes_otherwise() {
    let ended = run(guest(&["module", "50"]).option("--cpus", "2"));
    let expected = ["open Err(EAGAIN)", "mapped Err(EAGAIN)", "unused Ok(())", "again Err(ENOENT)"];
    assert_eq!(texts(&ended, "UNLOAD "), expected);
    assert_eq!(texts(&ended, "LOAD "), ["Ok(())", "again Err(EEXIST)"]);
    assert!(text(&ended, "RELOADED ").starts_with("50 "));
    assert_eq!(started(&ended), 1);
}

#[test]
fn nothing_that_a_process_does_makes_the_kernel_complain() {
    // Whatever is asked for, no fork is made; and the VM goes on.
    for (cpus, seed) in [("1", "1"), ("4", "2")] {
        let vmm = guest(&["fuzz", "10", seed]).option("--cpus", cpus).option("--limit", "*:generations=0");
        let calls: u64 = text(&run(vmm), "FUZZED ").parse().expect("a number");
        println!("{cpus} vCPUs: {calls} calls");
        assert!(calls > 500);
    }
}

#[test]
fn a_failed_fork_tells_its_caller_why_and_leaves_the_vm_running() {
    let times = (STEPS.len() + 2).to_string();
    let ended =
        run(guest(&["errors", &times]).option("--inject-fault", &faults::all()).option("--cpus", "2"));
    let expected = STEPS.iter().map(|(_, code)| format!("ECONNREFUSED {}", code.number()));
    assert_eq!(texts(&ended, "ERROR "), expected.collect::<Vec<_>>());
    assert_eq!(texts(&ended, "FORKED ").len(), 6);
    assert_eq!(started(&ended), 2 + 2);
}

/// Runs `vmfork` as a user.
fn vmfork(user: &[&str], arguments: &[&str]) -> Ended {
    let vmm = guest(&[user, &["exec", "/usr/bin/vmfork"], arguments].concat());
    vmm.start().expect("host-vmm starts").end().expect("host-vmm ends")
}

#[test]
fn vmfork_goes_by_the_device_where_it_may() {
    let ended = vmfork(&MEMBER, &["detect", "--json"]);
    let report = ended.lines("").into_iter().find_map(|(_, line)| serde_json::from_str::<Value>(&line).ok());
    assert_eq!(report.map(|report| report["route"].clone()), Some("device".into()), "{:?}", ended.lines(""));

    let ended = vmfork(&MEMBER, &["fork", "--count", "2"]);
    let mut roles: Vec<String> = ["parent of 2", "child 1 of 2", "child 2 of 2"]
        .iter()
        .flat_map(|role| ended.lines(role))
        .map(|(vm, _)| vm)
        .collect();
    roles.sort_unstable();
    assert_eq!(
        roles,
        ["vm", "web.1", "web.2"].map(|name| name.replace("web", "worker")),
        "{:?}",
        ended.lines("")
    );

    // Others are told what they lack.
    let ended = vmfork(&STRANGER, &["detect"]);
    assert_eq!(started(&ended), 0);
    let told: String = ended.lines("").into_iter().map(|(_, line)| line + "\n").collect();
    assert!(told.contains("group"), "{told}");

    // Whom it may tell of forks need not be who may make them.
    let reader = [&["--mode", "644"][..], &STRANGER].concat();
    let ended = vmfork(&reader, &["status", "--json"]);
    let status = ended.lines("").into_iter().find_map(|(_, line)| serde_json::from_str::<Value>(&line).ok());
    assert_eq!(status.map(|status| status["role"].clone()), Some("booted".into()), "{:?}", ended.lines(""));
    let ended = vmfork(&reader, &["fork"]);
    assert_eq!(started(&ended), 0);
    let told: String = ended.lines("").into_iter().map(|(_, line)| line + "\n").collect();
    assert!(told.contains("group"), "{told}");

    // The module keeps /dev/mem from the control page, so that there are no two ways at once.
    let ended = vmfork(&[], &["--via", "doorbell", "fork"]);
    assert_eq!(started(&ended), 0, "{:?}", ended.lines(""));
    let ended = guest(&["exec", "/usr/bin/vmfork", "fork"]).cmdline("vmfork.module=off").start();
    let ended = ended.expect("host-vmm starts").end().expect("host-vmm ends");
    assert_eq!(started(&ended), 1, "{:?}", ended.lines(""));
}

#[test]
fn vmfork_watches_forks() {
    let ended = run(guest(&["watch"]).option("--cpus", "2"));
    let mut forks = texts(&ended, "FORK ");
    forks.sort_unstable();
    assert!(forks[0].starts_with("Some(0) {\"role\":\"parent\""), "{forks:?}");
    assert!(forks[1].starts_with("Some(10) {\"role\":\"child\""), "{forks:?}");
    let watched = objects(&ended, "WATCHED ");
    let roles: BTreeSet<String> = watched.iter().map(Value::to_string).collect();
    assert_eq!(roles.len(), 2, "{watched:?}");
}

/// Runs where QEMU is, and not in the lab: `cargo xtask test` sees to that.
#[test]
fn where_no_host_vmm_is_it_refuses_to_be_loaded() {
    const COMMAND_LINE: &str =
        "console=ttyS0 panic=-1 vmfork.module=off vmfork.start=/usr/bin/kmod-guest,load";
    let output = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-m", "512", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(assets::path("lean/vmlinuz"))
        .arg("-initrd")
        .arg(assets::path("minimal.cpio"))
        .args(["-append", COMMAND_LINE])
        .output()
        .expect("QEMU runs");
    let console = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{console}");
    assert!(console.contains("LOADED Err(ENODEV)"), "{console}");
    assert!(
        console.contains("vmfork: no VMM that can fork this machine answers at CPUID leaf 0x40000100"),
        "{console}"
    );
}
