//! Clocks of Linux guests that fork.

use std::{
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use crate::{fault_rounds::rounds, vmm::Vmm};

/// Time that an image lies still: longer than anything in the guest takes.
const REST: Duration = Duration::from_secs(20);

/// Largest distance of TSC and clock, which a guest in the lab reads one after the other.
const APART: Duration = Duration::from_millis(5);

/// Boots a guest that runs `test-guest clocks`, and checks what its copies tell of their clocks: of so many
/// forks (or as many as `VMFORK_ROUNDS` says), and of a spawn of the last one's image at the end.
///
/// # Panics
/// Where a clock is wrong, or the guest fails.
pub fn check(guest: fn(&[&str]) -> Vmm, forks: u64, clocksource: &str, options: impl FnOnce(Vmm) -> Vmm) {
    let forks = rounds(forks, forks);
    let vmm = options(guest(&["clocks", &forks.to_string()])).option("--keep", "clock");
    let mut running = vmm.start().expect("host-vmm starts");
    let copies = usize::try_from(2 * forks).expect("a number of copies");
    // Each fork is waited for as long as any other.
    for told in (2..copies).step_by(2) {
        running.wait_for_lines("CLOCKS ", told).expect("clocks of a fork's copies");
    }
    let told = running.wait_for_lines("CLOCKS ", copies).expect("clocks of all copies");
    let image = &running.kept_image().expect("an image");
    thread::sleep(REST);
    running.ask(&["spawn", "--image", image]).expect("a copy of an image");
    let spawned =
        running.wait_for_lines("CLOCKS ", told.len() + 1).expect("its clocks").split_off(told.len());
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_millis();
    running.ask(&["image", "rm", image]).expect("no image is left");
    assert_eq!(running.end().expect("host-vmm ends").code, Some(0));
    for copy in objects(&told).into_iter().chain(objects(&spawned)) {
        assert_eq!(copy["went_back"], json!([0, 0, 0]), "TSC, CLOCK_MONOTONIC, CLOCK_BOOTTIME: {copy}");
        assert_eq!((&copy["clocksource"], &copy["complaints"]), (&json!(clocksource), &json!([])), "{copy}");
        let apart_us = copy["apart_us"].as_f64().expect("a time");
        assert!(
            apart_us.abs() < APART.as_secs_f64() * 1e6,
            "TSC and CLOCK_MONOTONIC_RAW have come apart: {copy}"
        );
        let passed_ms = copy["passed_ms"].as_i64().expect("a time");
        assert!(passed_ms >= 0, "{copy}");
    }
    let spawned = &objects(&spawned)[0];
    let passed_ms = spawned["passed_ms"].as_u64().expect("a time");
    assert!(u128::from(passed_ms) < REST.as_millis(), "the time of its rest was counted: {spawned}");
    let late_ms = now_ms.abs_diff(u128::from(spawned["wall_ms"].as_u64().expect("a time")));
    assert!(late_ms < REST.as_millis(), "the wall clock was not set: {spawned}");
}

fn objects(lines: &[(String, String)]) -> Vec<Value> {
    lines.iter().map(|(_, line)| serde_json::from_str(line).expect("JSON")).collect()
}
