//! The command as a user runs it, where there is no VMM to fork anything.

use std::process::Command;

use vmfork::Vmm;

const NO_VMM: &str =
    "the VMM can't be reached: no VMM that can fork this machine answers at CPUID leaf 0x40000100";

const NO_DEVICE: &str = "there is no /dev/vmfork: No such file or directory (os error 2)";
const NO_DOORBELL: &str = "no VMM that can fork this machine answers at CPUID leaf 0x40000100";

/// Runs `vmfork` with `arguments` and compares how it ends; not in a guest that can be forked, as that would
/// fork it.
#[track_caller]
fn assert_run(arguments: &[&str], status: i32, stdout: &str, stderr: &str) {
    assert_run_by(None, arguments, status, stdout, stderr);
}

/// The same, in an environment that asks for a route or does not.
#[track_caller]
fn assert_run_by(via: Option<&str>, arguments: &[&str], status: i32, stdout: &str, stderr: &str) {
    if Vmm::detect().is_ok() {
        eprintln!("SKIPPED: vmfork {arguments:?}: this machine has a VMM that forks VMs");
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmfork"));
    command.env_remove("VMFORK_VIA").envs(via.map(|via| ("VMFORK_VIA", via)));
    let output = command.args(arguments).output().expect("vmfork was built");
    assert_eq!(String::from_utf8_lossy(&output.stderr), stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), stdout);
    assert_eq!(output.status.code(), Some(status));
}

#[test]
fn detect_says_what_is_missing_and_what_to_do() {
    let stderr = format!(
        "vmfork: a fork would not work from here: {NO_VMM}\n\
         vmfork: run this in a VM that host-vmm has launched\n"
    );
    let stdout = format!("device: not usable: {NO_DEVICE}\ndoorbell: not usable: {NO_DOORBELL}\n");
    assert_run(&["detect"], 1, &stdout, &stderr);
}

#[test]
fn detect_prints_the_same_as_json() {
    let found = concat!(
        r#""abi_version":null,"control_page_gpa":null,"doorbell_port":null,"#,
        r#""features":null,"dev_mem":null,"ioperm":null,"vm":null"#
    );
    let advice = "run this in a VM that host-vmm has launched";
    let load = "load the kernel module that offers it, or go by the doorbell";
    let device = format!(r#"{{"route":"device","works":false,"error":"{NO_DEVICE}","advice":"{load}"}}"#);
    let doorbell =
        format!(r#"{{"route":"doorbell","works":false,"error":"{NO_DOORBELL}","advice":"{advice}"}}"#);
    let routes = format!(r#""routes":[{device},{doorbell}],"route":null,"reason":null"#);
    let stdout = format!(r#"{{"works":false,{found},{routes},"error":"{NO_VMM}","advice":"{advice}"}}"#);
    assert_run(&["detect", "--json"], 1, &format!("{stdout}\n"), "");
}

#[test]
fn a_fork_fails_without_running_the_command() {
    let stderr = format!("vmfork: {NO_VMM}\n");
    assert_run(&["fork"], 1, "", &stderr);
    assert_run(&["fork", "--", "echo", "run"], 1, "", &stderr);
}

#[test]
fn a_failed_fork_prints_json_without_a_role() {
    let stdout = format!(r#"{{"role":null,"error":"{NO_VMM}","code":null}}"#);
    assert_run(
        &["fork", "--count", "4", "--json"],
        1,
        &format!("{stdout}\n"),
        &format!("vmfork: {NO_VMM}\n"),
    );
}

#[test]
fn status_needs_a_vmm() {
    assert_run(&["status"], 1, "", &format!("vmfork: {NO_VMM}\n"));
}

#[test]
fn a_route_that_is_asked_for_is_the_only_one_that_is_tried() {
    let no_device = format!("vmfork: the VMM can't be reached: {NO_DEVICE}\n");
    for command in ["fork", "status"] {
        assert_run(&["--via", "device", command], 1, "", &no_device);
        assert_run_by(Some("device"), &[command], 1, "", &no_device);
        assert_run_by(Some("device"), &[command, "--via", "doorbell"], 1, "", &format!("vmfork: {NO_VMM}\n"));
    }
    let stderr = format!(
        "vmfork: a fork would not work from here: the VMM can't be reached: {NO_DEVICE}\n\
         vmfork: load the kernel module that offers it, or go by the doorbell\n"
    );
    let stdout = format!("device: not usable: {NO_DEVICE}\n");
    assert_run_by(Some("device"), &["detect"], 1, &stdout, &stderr);
}

#[test]
fn a_route_that_there_is_not_is_wrong_usage() {
    let stderr = "error: invalid value 'agent' for '--via <ROUTE>'\n  [possible values: device, doorbell]\n\n\
                  For more information, try '--help'.\n";
    assert_run(&["status", "--via", "agent"], 2, "", stderr);
    assert_run_by(Some("agent"), &["status"], 2, "", stderr);
}

#[test]
fn forks_are_watched_by_the_device_alone() {
    let stderr = format!("vmfork: forks can't be watched: {NO_DEVICE}\n");
    assert_run(&["watch"], 1, "", &stderr);
    assert_run(&["watch", "--json", "--count", "1", "--via", "device"], 1, "", &stderr);
    let stderr = "vmfork: forks can be watched by the device alone, and not by the doorbell\n";
    assert_run(&["watch", "--via", "doorbell"], 1, "", stderr);
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    let stderr = "error: invalid value 'Web' for '--type <TYPE>': \
                  a VM type is 1 to 32 of a-z, 0-9 and -, with no - at either end\n\n\
                  For more information, try '--help'.\n";
    assert_run(&["fork", "--type", "Web"], 2, "", stderr);
}
