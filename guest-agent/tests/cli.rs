//! The command as a user runs it, where there is no VMM to fork anything.

use std::process::Command;

use vmfork::Vmm;

const NO_VMM: &str = "the VMM can't be reached: no VMM that can fork this machine answers at CPUID leaf 0x40000100";

/// Runs `vmfork` with `arguments` and compares how it ends; not in a guest that can be forked, as that would fork it.
#[track_caller]
fn assert_run(arguments: &[&str], status: i32, stdout: &str, stderr: &str) {
    if Vmm::detect().is_ok() {
        eprintln!("SKIPPED: vmfork {arguments:?}: this machine has a VMM that forks VMs");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_vmfork")).args(arguments).output().expect("vmfork was built");
    assert_eq!(String::from_utf8_lossy(&output.stderr), stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), stdout);
    assert_eq!(output.status.code(), Some(status));
}

#[test]
fn detect_says_what_is_missing_and_what_to_do() {
    let stderr = format!(
        "vmfork: a fork would not work from here: {NO_VMM}\nvmfork: run this in a VM that host-vmm has launched\n"
    );
    assert_run(&["detect"], 1, "", &stderr);
}

#[test]
fn detect_prints_the_same_as_json() {
    let found =
        r#""abi_version":null,"control_page_gpa":null,"doorbell_port":null,"dev_mem":null,"ioperm":null,"vm":null"#;
    let advice = "run this in a VM that host-vmm has launched";
    let stdout = format!(r#"{{"works":false,{found},"error":"{NO_VMM}","advice":"{advice}"}}"#);
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
    assert_run(&["fork", "--count", "4", "--json"], 1, &format!("{stdout}\n"), &format!("vmfork: {NO_VMM}\n"));
}

#[test]
fn status_needs_a_vmm() {
    assert_run(&["status"], 1, "", &format!("vmfork: {NO_VMM}\n"));
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    let stderr = "error: invalid value 'Web' for '--type <TYPE>': \
                  a VM type is 1 to 32 of a-z, 0-9 and -, with no - at either end\n\n\
                  For more information, try '--help'.\n";
    assert_run(&["fork", "--type", "Web"], 2, "", stderr);
}
