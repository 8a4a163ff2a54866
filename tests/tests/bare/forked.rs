//! Forks that an operator asks for, and no guest.

use std::thread;

use api::client::{Connection, Content, Endpoint};
use hyper::Method;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vmfork_abi::{ErrorCode, PAGE, Role, Status};
use vmfork_tests::{
    bare_guest::{Script, control},
    cluster::Platforms,
    faults::{self, STEPS},
    user_guest::{self, Order},
    vmm::{Ended, Running, Vmm, console_line},
};

use super::asker::{keep_id, request};
use super::{
    ERROR, GENERATION, ID, INDEX, ROLE, STATUS,
    clones::{know_each_other, vms},
    left_behind::become_equal,
    printed,
};

/// What a guest counts in.
const COUNTER: u64 = 0x40_0000;

/// How far it counts until it prints where it is.
const STRETCH: u32 = 1000;

/// Number of the request that the response answers.
const ANSWERED: usize = PAGE.response.offset;

/// A guest that counts, and prints after each stretch how far it is.
fn counting() -> Script {
    Script::new().forever(Script::new().count(COUNTER, STRETCH).print(COUNTER))
}

/// Checks that a VM has counted on from where it began, and says where that was. The fork, and the end, may
/// have come in the middle of a line.
fn check_counted(ended: &Ended, name: &str) -> u32 {
    let lines = ended.lines("").into_iter().filter(|(vm, line)| vm == name && line.len() == 8);
    let numbers: Vec<u32> =
        lines.map(|(_, line)| u32::from_str_radix(&line, 16).expect("a number")).collect();
    let began = numbers.first().expect("something printed") / STRETCH;
    let expected: Vec<u32> = (began..).map(|stretch| stretch * STRETCH).take(numbers.len()).collect();
    assert_eq!(numbers, expected, "{name}");
    began
}

/// Waits until a VM has counted beyond a number, and says how far it is.
fn counts_beyond(running: &mut Running, name: &str, number: u32) -> u32 {
    let counted = running.wait_for("a VM that goes on counting", |event| {
        let (vm, line) = console_line(event, "")?;
        let counted = (vm == name && line.len() == 8).then(|| u32::from_str_radix(&line, 16).ok())??;
        (counted > number).then_some(counted)
    });
    counted.expect("it goes on")
}

/// Boots it with two vCPUs, of which the second one waits to be started.
fn start(script: &Script, options: &[(&str, &str)]) -> (Running, tempfile::NamedTempFile) {
    let kernel = script.to_kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--cpus", "2");
    let vmm = options.iter().fold(vmm, |vmm, (name, value)| vmm.option(name, value));
    (vmm.start().expect("host-vmm starts"), kernel)
}

/// Ends it once so many forks are reported: that is done after everything else.
fn stop(mut running: Running, forks: usize) -> Ended {
    await_reports(&mut running, forks);
    running.signal(Signal::SIGTERM).expect("a signal");
    running.end().expect("host-vmm ends")
}

fn await_reports(running: &mut Running, forks: usize) {
    let mut reported = 0;
    let all = running.wait_for("reports of all forks", |event| {
        reported += usize::from(event["event"] == "forked");
        (reported == forks).then_some(())
    });
    all.expect("reports");
}

/// The copies of which `host-vmm fork --json` tells, and `host-vmm clone --vm`.
fn copies(told: &str) -> Vec<Value> {
    let told: Value = serde_json::from_str(told).expect("JSON");
    told["vms"].as_array().expect("an array").clone()
}

fn fork(running: &Running, more: &[&str]) -> anyhow::Result<Vec<Value>> {
    Ok(copies(&running.ask(&[&["fork", "vm", "--json"], more].concat())?))
}

fn refusal(result: anyhow::Result<Vec<Value>>) -> String {
    result.expect_err("a refusal").to_string().trim_end().to_owned()
}

/// What a copy is called, and where it is.
fn told(copies: &[Value]) -> Vec<[&str; 3]> {
    let values = copies.iter().map(|copy| [&copy["name"], &copy["platform"], &copy["placement"]]);
    values.map(|values| values.map(|value| value.as_str().expect("text"))).collect()
}

/// The reports of forks that operators have asked for.
fn ordered(ended: &Ended) -> Vec<&Value> {
    ended.forks().into_iter().filter(|fork| fork["asked_by"] == "operator").collect()
}

/// Their error codes.
fn codes(ended: &Ended) -> Vec<u32> {
    let code = |fork: &&Value| u32::try_from(fork["code"].as_u64().expect("a number")).expect("a code");
    ordered(ended).iter().map(code).collect()
}

#[test]
fn a_guest_that_counts_goes_on_counting_in_parent_and_copies() {
    let (mut running, _kernel) = start(&counting(), &[]);
    counts_beyond(&mut running, "vm", STRETCH);
    let first = fork(&running, &["--count", "2"]).expect("copies");
    let second = fork(&running, &["--where", "local"]).expect("a copy");
    assert_eq!(told(&first), [["vm.1", "", "local"], ["vm.2", "", "local"]]);
    assert_eq!(told(&second), [["vm.3", "", "local"]]);
    let listed: Value = serde_json::from_str(&running.ask(&["ps", "--json"]).expect("a list")).expect("JSON");
    for (copy, index) in first.iter().chain(&second).zip([1, 2, 1]) {
        assert_eq!(copy["index"], index);
        let vm = listed["vms"].as_array().expect("an array").iter().find(|vm| vm["id"] == copy["id"]);
        let vm = vm.expect("it runs when that is told");
        assert_eq!(
            (&vm["state"], &vm["type"], &vm["generation"]),
            (&json!("running"), &json!("vm"), &json!(1))
        );
    }
    let copies = ["vm.1", "vm.2", "vm.3"];
    let farthest = copies.map(|name| counts_beyond(&mut running, name, 2 * STRETCH)).into_iter().max();
    counts_beyond(&mut running, "vm", farthest.expect("copies"));
    let ended = stop(running, 2);
    assert_eq!(check_counted(&ended, "vm"), 1);
    for name in copies {
        assert!(check_counted(&ended, name) > 1, "{name} goes on where its parent was");
    }
    assert_eq!(codes(&ended), [0, 0]);
    for (fork, count) in ordered(&ended).iter().zip([2, 1]) {
        assert_eq!(
            (&fork["parent"]["name"], &fork["count"], &fork["seq"]),
            (&json!("vm"), &json!(count), &json!(0))
        );
        assert!(fork["steps"].as_array().expect("an array").len() > STEPS.len(), "{fork}");
    }
}

#[test]
fn guests_that_stand_still_are_forked_and_so_are_copies() {
    let (running, _kernel) = start(&Script::new().hang(), &[]);
    let mut parent = "vm".to_owned();
    for generation in 1..=4 {
        vms(&running, generation);
        let copies = copies(&running.ask(&["fork", &parent, "--json"]).expect("a copy"));
        parent = copies[0]["name"].as_str().expect("a name").to_owned();
        assert_eq!(parent, format!("vm.{generation}"));
    }
    let generations: Vec<_> =
        vms(&running, 5).iter().map(|vm| vm["generation"].as_u64().expect("one")).collect();
    assert_eq!(generations, [0, 1, 2, 3, 4]);
    let table = running.ask(&["fork", &parent]).expect("a table");
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("ID ") && lines[1].ends_with(" vm.5  -         local"), "{table}");
    assert_eq!(codes(&stop(running, 5)), [0; 5]);
}

#[test]
fn a_guest_in_user_space_goes_on_there() {
    let kernel = user_guest::kernel();
    let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").start().expect("host-vmm starts");
    running.wait_for_line("00000001").expect("a guest that takes orders");
    // It looks for orders, and so does its copy, to which nobody gives any.
    assert_eq!(told(&fork(&running, &[]).expect("a copy")), [["vm.1", "", "local"]]);
    running
        .type_bytes(&Order { count: 1, ..Order::default() }.to_bytes())
        .expect("a guest that takes orders");
    let forked = running.wait_for("its fork", |event| {
        let is_asked_for = event["event"] == "forked" && event["asked_by"] == "guest";
        is_asked_for.then(|| (event["parent"]["name"].clone(), event["seq"].clone(), event["code"].clone()))
    });
    assert_eq!(forked.expect("a fork"), (json!("vm"), json!(1), json!(0)));
    running.ask(&["fork", "vm.1"]).expect("a copy of the copy");
    let ended = stop(running, 3);
    assert_eq!(codes(&ended), [0, 0]);
    assert!(["vm", "vm.1"].iter().all(|name| ended.how(name).is_some_and(Value::is_null)), "they went on");
}

/// A guest that forks, and waits before it looks at the answer; then it writes a request, and waits before it
/// rings. Parent and copies print what they were told each time. Copies of an operator do not wait, and
/// children of their own switch themselves off.
fn asking() -> Script {
    let is_child = |script: Script, then| script.only_if(control(ROLE), Role::Child.number(), then);
    let wait = |script: Script| script.wait_for_input_or(control(ROLE), Role::Child.number());
    let ring = |script: Script| is_child(script.ring(), Script::new().off());
    let tell = |script| {
        [ANSWERED, STATUS, ROLE, INDEX]
            .into_iter()
            .fold(script, |script: Script, at| script.print(control(at)))
    };
    let first = tell(wait(ring(Script::new().request(5, "web", 1)).print(control(STATUS))));
    tell(ring(wait(first.request(6, "web", 1)))).hang()
}

#[test]
fn a_guest_that_asks_for_forks_itself_is_not_disturbed() {
    let (mut running, _kernel) = start(&asking(), &[]);
    running.wait_for_lines("", 1).expect("a guest that was answered");
    let answered = fork(&running, &[]).expect("a copy");
    running.type_bytes(b"!").expect("a guest that waits");
    running.wait_for_lines("", 1 + 8 + 4).expect("the copy's answers, and the parent's first one");
    let about_to_ring = fork(&running, &[]).expect("a copy");
    running.type_bytes(b"!").expect("a guest that waits");
    running.wait_for_lines("", 1 + 8 + 8 + 4).expect("all answers");
    let ended = stop(running, 6);
    let printed_by = |copies: &[Value]| printed(&ended, copies[0]["name"].as_str().expect("a name"));
    let (forked, parent, child) = (Status::Forked.number(), Role::Parent.number(), Role::Child.number());
    // The parent is told of its own forks alone.
    assert_eq!(printed(&ended, "vm"), [forked, 5, forked, parent, 0, 6, forked, parent, 0]);
    // A copy finds the answer that its parent was about to read, as the child that it is; and then its own.
    assert_eq!(printed_by(&answered), [5, forked, child, 1, 6, forked, parent, 0]);
    // What its parent was about to ask for, it asks for too.
    assert_eq!(printed_by(&about_to_ring), [6, forked, parent, 0]);
    assert_eq!((ended.forks().len(), codes(&ended).len()), (6, 2));
}

#[test]
fn who_a_copy_is_stands_in_its_control_page() {
    let script = Script::new().wait_for_input_or(control(ROLE), Role::Child.number());
    let told = [ROLE, INDEX, INDEX + 4, GENERATION, ID, ANSWERED, STATUS, ERROR];
    let script = told.into_iter().fold(script, |script, at| script.print(control(at))).off();
    let (mut running, _kernel) = start(&script, &[("--keep", "vm")]);
    vms(&running, 1);
    let mut copies = fork(&running, &["--count", "3"]).expect("copies");
    // Of the image that is kept, more come at any time.
    let image = &running.kept_image().expect("an image");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let path = file.path().to_str().expect("a path");
    running.ask(&["image", "save", image, path]).expect("a saved image");
    running.ask(&["image", "rm", image]).expect("no image");
    running.ask(&["image", "load", path]).expect("an image");
    let spawned = running.ask(&["spawn", "--image", image, "--count", "3", "--json"]).expect("copies");
    running.ask(&["image", "rm", image]).expect("no image");
    copies.extend(self::copies(&spawned));
    // Until now the parent has waited, and the platform with it.
    running.type_bytes(b"!").expect("a guest that waits");
    let ended = running.end().expect("all VMs end by themselves");
    let id = |name: &str| {
        let started = ended.events.iter().find(|event| event["event"] == "started" && event["name"] == name);
        let id: uuid::Uuid = started.expect("a VM")["id"].as_str().expect("an ID").parse().expect("an ID");
        u32::from_le_bytes(*id.as_bytes().first_chunk().expect("four bytes"))
    };
    let idle = Status::Idle.number();
    // The parent's guest has no part in it, and its page stays as it was.
    assert_eq!(printed(&ended, "vm"), [Role::Booted.number(), 0, 0, 0, id("vm"), 0, idle, 0]);
    for (copy, index) in copies.iter().zip([1, 2, 3, 1, 2, 3]) {
        let name = copy["name"].as_str().expect("a name");
        assert_eq!(printed(&ended, name), [Role::Child.number(), index, 3, 1, id(name), 0, idle, 0]);
    }
    assert_eq!(ended.code, Some(0));
}

#[test]
fn an_operator_can_not_pass_the_limits_of_the_guest() {
    let limits = ["*:fork-children=2,children=3,generations=1", "vm:memory=320M"];
    let (mut running, _kernel) = start(&Script::new().hang(), &limits.map(|limit| ("--limit", limit)));
    vms(&running, 1);
    let refused = refusal(fork(&running, &["--count", "3"]));
    assert!(refused.contains("fork-children of the type vm is limited to 2"), "{refused}");
    fork(&running, &["--count", "2"]).expect("copies");
    let refused = refusal(fork(&running, &["--count", "2"]));
    assert!(
        refused.contains("children of the type vm is limited to 3, and this fork would make it 4"),
        "{refused}"
    );
    let refused = running.ask(&["fork", "vm.1"]).expect_err("too deep").to_string();
    assert!(refused.contains("the VM vm.1 was not forked") && refused.contains("generations"), "{refused}");
    fork(&running, &[]).expect("one more copy");
    await_reports(&mut running, 5);
    running.ask(&["stop", "vm.1", "vm.2"]).expect("stopped VMs");
    fork(&running, &["--count", "2"]).expect("there is room for children again");
    let (children, generation) = (ErrorCode::Children.number(), ErrorCode::Generation.number());
    let mut codes = codes(&stop(running, 6));
    // One of them is another VM's, which reports by itself.
    codes.sort_unstable();
    assert_eq!(codes, [0, 0, 0, children, children, generation]);

    let (running, _kernel) = start(&Script::new().hang(), &[("--limit", "vm:rate=1,memory=128M")]);
    vms(&running, 1);
    let refused = refusal(fork(&running, &["--count", "2"]));
    assert!(refused.contains("memory of the type vm is limited to"), "{refused}");
}

#[test]
fn an_operator_can_not_fork_a_vm_more_often_than_its_guest_may() {
    let (running, _kernel) = start(&Script::new().hang(), &[("--limit", "vm:rate=1")]);
    vms(&running, 1);
    let mut connection = Connection::open(&Endpoint::Socket(running.socket())).expect("a connection");
    // Where the machine has much else to do, a second is over between two of them.
    let refused = (0..50).find_map(|_| {
        let wish = Content::json(&json!({ "count": 1 })).expect("JSON");
        connection.ask_for::<Value>(Method::POST, "/v1/vms/vm/fork", wish).err()
    });
    let refused = refused.expect("a refusal").to_string();
    assert!(
        refused.contains("rate of the type vm") && refused.ends_with("try again in a second"),
        "{refused}"
    );
}

#[test]
fn a_failure_at_any_step_leaves_the_parent_and_nothing_else() {
    let (mut running, _kernel) = start(&counting(), &[("--inject-fault", &faults::all()), ("--ready", "0")]);
    let node = running.node("vm").expect("a node");
    vms(&running, 1);
    for (step, _) in STEPS {
        let refused = refusal(fork(&running, &["--count", "3"]));
        assert!(refused.contains("the VM vm was not forked: "), "{step}: {refused}");
        become_equal(|| running.nodes().expect("processes"), || vec![node]);
    }
    let copies = fork(&running, &["--count", "2"]).expect("copies");
    let counted = counts_beyond(&mut running, told(&copies)[1][0], STRETCH);
    counts_beyond(&mut running, "vm", counted);
    let ended = stop(running, STEPS.len() + 1);
    assert_eq!(check_counted(&ended, "vm"), 1);
    let expected: Vec<u32> = STEPS.iter().map(|(_, code)| code.number()).chain([0]).collect();
    assert_eq!(codes(&ended), expected);
    assert_eq!(ended.events.iter().filter(|event| event["event"] == "started").count(), 3);
}

#[test]
fn what_can_not_be_forked_is_told() {
    let child = Script::new().off();
    let script =
        Script::new().request(1, "web", 1).ring().only_if(control(ROLE), Role::Child.number(), child);
    let (mut running, _kernel) = start(&script.hang(), &[]);
    running.wait_for("an end", |event| (event["event"] == "ended").then_some(())).expect("a child that ends");
    let refused = |command: &[&str]| running.ask(command).expect_err("a refusal").to_string();
    for unknown in ["nobody", "00000000", "we"] {
        assert!(refused(&["fork", unknown]).contains(&format!("there is no VM whose name is \"{unknown}\"")));
    }
    assert!(refused(&["fork", "../vm"]).contains("is no name of a VM"));
    assert!(refused(&["fork", "web.1"]).contains("the VM web.1 was not forked: it has ended"));
    assert!(refused(&["fork", "vm", "--where", "remote"]).contains("this one is in no cluster"));
    assert!(refused(&["clone", "--vm", "vm", "--to", "b"]).contains("this one is in no cluster"));
    assert!(refused(&["clone", "--to", "b"]).contains("--image"));
    assert!(refused(&["clone", "--to", "b", "--vm", "vm", "--image", "0"]).contains("--image"));
    for count in ["0", "1025"] {
        assert!(refused(&["fork", "vm", "--count", count]).contains("--count"));
    }
    let mut connection = Connection::open(&Endpoint::Socket(running.socket())).expect("a connection");
    for (path, content) in [
        ("/v1/vms/vm/fork", json!({ "count": 0 })),
        ("/v1/vms/vm/fork", json!({ "count": 1025 })),
        ("/v1/vms/vm/fork", json!({ "count": -1 })),
        ("/v1/vms/vm/fork", json!({ "count": 1, "location": "nowhere" })),
        ("/v1/vms/vm/fork", json!({})),
        ("/v1/vms/vm/clone", json!({ "to": "b", "count": 0 })),
        ("/v1/vms/vm/clone", json!({ "count": 1 })),
    ] {
        connection.ask(Method::POST, path, Content::json(&content).expect("JSON")).expect_err("a refusal");
    }
    let platforms = Platforms::new(&["a"]);
    let without = Vmm::serve(&platforms.config("a", "")).start().expect("a platform");
    know_each_other(&without, 1);
    assert!(without.ask(&["fork", "vm"]).expect_err("a refusal").to_string().contains("there is no VM"));
    // Of all, one has come as far as to the VM.
    assert_eq!(codes(&stop(running, 2)), [ErrorCode::Place.number()]);
}

#[test]
fn copies_go_to_the_platform_that_the_operator_names() {
    let platforms = Platforms::with_certificates(&["a", "b", "c"]);
    let alice = platforms.operator("alice");
    let [mut target, other] =
        ["b", "c"].map(|name| Vmm::serve(&platforms.config(name, "")).start().expect("a platform"));
    let kernel = counting().to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", ""));
    let mut source = source.start().expect("host-vmm starts");
    know_each_other(&source, 3);
    know_each_other(&target, 3);
    vms(&source, 1);
    let ask = |command: &[&str]| platforms.ask("a", &alice, &[command, &["--json"]].concat());
    let clone = ["clone", "--vm", "vm", "--to", "b"];
    let there = copies(&ask(&[&clone[..], &["--count", "2"]].concat()).expect("clones"));
    let lazy = copies(&ask(&[&clone[..], &["--lazy"]].concat()).expect("a clone"));
    let here = copies(&ask(&["fork", "vm", "--where", "local"]).expect("a copy"));
    let away = copies(&ask(&["fork", "vm", "--where", "remote"]).expect("a copy"));
    assert_eq!(told(&there), [["vm.1", "b", "remote"], ["vm.2", "b", "remote"]]);
    assert_eq!(told(&lazy), [["vm.3", "b", "remote"]]);
    assert_eq!(told(&here), [["vm.1", "a", "local"]]);
    assert_eq!(told(&away)[0][2], "remote");
    let unknown = ask(&["clone", "--vm", "vm", "--to", "d"]).expect_err("a refusal").to_string();
    assert!(unknown.contains("b, c"), "{unknown}");
    let of_platform = platforms.ask("a", &alice.with_file_name("b"), &["fork", "vm"]);
    assert!(of_platform.expect_err("a refusal").to_string().contains("is no operator"));
    drop(other);
    let farthest =
        ["vm.1", "vm.2", "vm.3"].map(|name| counts_beyond(&mut target, name, STRETCH)).into_iter().max();
    counts_beyond(&mut source, "vm", farthest.expect("clones"));
    let (source, target) = (stop(source, 4), stop(target, 0));
    assert_eq!(codes(&source), [0; 4]);
    assert_eq!(check_counted(&source, "vm"), 1);
    for name in ["vm.1", "vm.2", "vm.3"] {
        check_counted(&target, name);
    }
}

#[test]
fn a_third_platform_orders_a_clone_where_it_may() {
    let platforms = Platforms::with_certificates(&["a", "b", "c"]);
    let alice = platforms.operator("alice");
    let [mut target, third] =
        ["b", "c"].map(|name| Vmm::serve(&platforms.config(name, "")).start().expect("a platform"));
    let kernel = counting().to_kernel();
    let order = ["clone", "--vm", "vm", "--from", "a", "--to", "b", "--json"];
    for may in [false, true] {
        let orders = if may { "keep = [\"*\"]\n[clone]\norders = \"platforms\"" } else { "" };
        let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", orders));
        let mut source = source.start().expect("host-vmm starts");
        for platform in [&source, &target, &third] {
            know_each_other(platform, 3);
        }
        vms(&source, 1);
        if !may {
            let refused = third.ask(&order).expect_err("a refusal").to_string();
            let why = "the platform c may not order clones of what the platform a has";
            let advice = "orders = \"platforms\" under [clone]";
            assert!(refused.contains(why) && refused.contains(advice), "{refused}");
            vms(&target, 0);
            continue;
        }
        let ordered = copies(&third.ask(&order).expect("a clone"));
        assert_eq!(told(&ordered), [["vm.1", "b", "remote"]]);
        let there = vms(&target, 1);
        assert_eq!(there[0]["id"], ordered[0]["id"]);
        let by_operator = copies(&platforms.ask("c", &alice, &order).expect("a clone"));
        assert_eq!(told(&by_operator), [["vm.2", "b", "remote"]]);
        let image = &source.kept_image().expect("an image");
        third.ask(&["clone", "--image", image, "--from", "a", "--to", "b"]).expect("a clone of an image");
        // A platform orders in its own name, and that alone.
        let as_platform = alice.with_file_name("c");
        let refused = platforms.ask("a", &as_platform, &["clone", "--vm", "vm", "--from", "b", "--to", "c"]);
        assert!(refused.expect_err("a refusal").to_string().contains("must ask the platform b itself"));
        let refused = platforms.ask("a", &as_platform, &["fork", "vm"]).expect_err("a refusal").to_string();
        assert!(refused.contains("is no operator"), "{refused}");
        for (named, why) in [("web", "there is no VM"), ("../images", "is no name of a VM")] {
            let refused = third.ask(&["clone", "--vm", named, "--from", "a", "--to", "b"]);
            assert!(refused.expect_err("a refusal").to_string().contains(why));
        }
        let farthest =
            ["vm.1", "vm.2"].map(|name| counts_beyond(&mut target, name, STRETCH)).into_iter().max();
        counts_beyond(&mut source, "vm", farthest.expect("clones"));
        vms(&target, 3);
        vms(&third, 0);
        let source = stop(source, 2);
        assert_eq!(codes(&source), [0; 2]);
        assert_eq!(check_counted(&source, "vm"), 1);
    }
}

#[test]
fn where_the_named_platform_takes_none_there_is_no_fork() {
    let platforms = Platforms::new(&["a", "b", "c"]);
    let full =
        Vmm::serve(&platforms.config("b", "limits = [\"vm:memory=32M\"]")).start().expect("a platform");
    let other = Vmm::serve(&platforms.config("c", "")).start().expect("a platform");
    let kernel = counting().to_kernel();
    let source = Vmm::kernel(kernel.path()).option("--mem", "64M").config(&platforms.config("a", ""));
    let source = source.start().expect("host-vmm starts");
    know_each_other(&source, 3);
    vms(&source, 1);
    let refused = source.ask(&["clone", "--vm", "vm", "--to", "b"]).expect_err("a refusal").to_string();
    assert!(
        refused.contains("the VM vm was not forked") && refused.contains("memory of the type vm"),
        "{refused}"
    );
    for (platform, count) in [(&full, 0), (&other, 0), (&source, 1)] {
        vms(platform, count);
    }
    source.ask(&["clone", "--vm", "vm", "--to", "c"]).expect("a clone");
    vms(&other, 1);
}

/// A guest that forks so many times, once it is told to, and prints each time what came of it. Each copy,
/// whoever has asked for it, switches itself off.
fn forking(forks: u64) -> Script {
    let wait = keep_id().wait_for_input_or(control(ROLE), Role::Child.number());
    let script = (1..=forks).fold(wait, |script, seq| {
        // In an operator's copy, it is refused.
        let fork = request(script, seq).ring();
        let fork = fork.only_if(control(ROLE), Role::Child.number(), Script::new().off());
        fork.print(control(ANSWERED)).print(control(STATUS)).print(control(ERROR))
    });
    script.off()
}

/// Asks for forks until so many were made, or the VM has ended: the IDs of the copies, and how often it was
/// refused as busy.
fn hammer(platform: &Endpoint, most: usize) -> (Vec<Value>, usize) {
    let mut connection = Connection::open(platform).expect("a connection");
    let (mut made, mut refused) = (Vec::new(), 0);
    while made.len() < most {
        let wish = Content::json(&json!({ "count": 1 })).expect("JSON");
        match connection.ask_for::<Value>(Method::POST, "/v1/vms/vm/fork", wish) {
            Ok(told) => made.push(told["vms"][0]["id"].clone()),
            Err(error) if error.to_string().ends_with("try again when that is over") => refused += 1,
            Err(error) => {
                println!("the end: {error}");
                break;
            }
        }
    }
    (made, refused)
}

#[test]
fn guest_and_operators_fork_at_once_and_nothing_is_lost() {
    const FORKS: u32 = 200;
    // All copies may be there at a time on a slow machine, and a platform has room for 1,100 VMs.
    const ORDERS: usize = 400;
    let (mut running, _kernel) = start(&forking(FORKS.into()), &[]);
    vms(&running, 1);
    let platform = Endpoint::Socket(running.socket());
    let (made, refused) = thread::scope(|scope| {
        let hammers = [(); 2].map(|()| scope.spawn(|| hammer(&platform, ORDERS)));
        running.type_bytes(b"!").expect("a guest that waits");
        let [one, other] = hammers.map(|hammer| hammer.join().expect("no panic"));
        ([one.0, other.0].concat(), one.1 + other.1)
    });
    let ended = running.end().expect("all VMs end by themselves");
    let (forked, failed, busy) = (Status::Forked.number(), Status::Failed.number(), ErrorCode::Busy.number());
    let answers = printed(&ended, "vm");
    let told = (1..=FORKS).zip(answers.chunks_exact(3)).map(|(seq, answer)| match answer {
        [answered, status, 0] if (*answered, *status) == (seq, forked) => true,
        [answered, status, error] if (*answered, *status, *error) == (seq, failed, busy) => false,
        other => panic!("request {seq}: {other:x?}"),
    });
    let told: Vec<bool> = told.collect();
    assert_eq!(told.len(), usize::try_from(FORKS).expect("small"));
    let guests = told.into_iter().filter(|&forked| forked).count();
    println!(
        "the guest: {guests} made of {FORKS}; operators: {} made, {refused} refused as busy",
        made.len()
    );
    let made_by = |asker: &str| {
        let is_made =
            |fork: &&&Value| fork["parent"]["name"] == "vm" && fork["asked_by"] == asker && fork["code"] == 0;
        ended.forks().iter().filter(is_made).count()
    };
    assert!(guests > 0 && !made.is_empty());
    assert_eq!(made_by("guest"), guests);
    // Of those that were made while the VM came to its end, an operator may not have heard.
    assert!((made.len()..=made.len() + 2).contains(&made_by("operator")));
    let named = |event: &str, name: &str| {
        let found = ended.events.iter().find(|other| other["event"] == event && other["name"] == name);
        found.expect("a VM")["id"].clone()
    };
    let vm = named("started", "vm");
    let copies = ended.events.iter().filter(|event| event["event"] == "started" && event["parent"] == vm);
    let copies: Vec<&Value> = copies.map(|copy| &copy["id"]).collect();
    assert_eq!(copies.len(), made_by("guest") + made_by("operator"));
    assert!(made.iter().all(|id| copies.contains(&id)));
    for id in copies {
        let end = ended.events.iter().find(|event| event["event"] == "ended" && event["id"] == *id);
        assert_eq!(end.expect("its end")["how"], "PoweredOff");
    }
    assert_eq!(ended.code, Some(0));
}
