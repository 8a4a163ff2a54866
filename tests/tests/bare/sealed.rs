//! Images never change: what the kernel forbids everybody, and what comes of it where it can't.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmfork_tests::{
    bare_guest::{Script, control},
    vmm::{Running, Vmm},
};
use vmm::memory::{self, Mapping};

use super::{INDEX, clones::wait_until, printed};

/// Size of the guests' memory in bytes.
const RAM_BYTES: usize = 64 << 20;

/// Where the guests have the number that they print.
const DATA: usize = 0x80_0000;

/// Waits for a byte and forks into two children. All of them print their index and the number, and stand
/// still.
fn guest() -> Script {
    let script = Script::new().store(DATA as u64, 0xda7a).wait_for_input().request(1, "web", 2).ring();
    script.print(control(INDEX)).print(DATA as u64).hang()
}

fn start(options: &[(&str, &str)]) -> (Running, tempfile::NamedTempFile) {
    let kernel = guest().to_kernel();
    let vmm = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--keep", "web");
    let vmm = options.iter().fold(vmm, |vmm, (name, value)| vmm.option(name, value));
    (vmm.start().expect("host-vmm starts"), kernel)
}

/// The memory files with this name that a node has open: what a guest could get at that has broken out into
/// it.
fn files(pid: u32, name: &str) -> Vec<PathBuf> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("the node's descriptors");
    let paths = open.map(|entry| entry.expect("a descriptor").path());
    let is_it =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains(name));
    paths.filter(is_it).collect()
}

/// Those of them that it has mapped: its memory's, and not what its next fork will use.
fn mapped(pid: u32, name: &str) -> Vec<PathBuf> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the node's mappings");
    let of_it = maps.lines().filter(|line| line.contains(name));
    let inodes: Vec<u64> =
        of_it.filter_map(|line| line.split_ascii_whitespace().nth(4)?.parse().ok()).collect();
    let is_mapped =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|metadata| inodes.contains(&metadata.ino()));
    files(pid, name).into_iter().filter(is_mapped).collect()
}

/// Opens a node's memory for writing, as the node could use its own descriptor.
fn open(path: &PathBuf) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("a memory file")
}

/// The file of a booted VM's memory.
fn ram(pid: u32) -> File {
    let files = files(pid, "memfd:vm-ram");
    let is_ram = |file: &File| file.metadata().is_ok_and(|metadata| metadata.len() == RAM_BYTES as u64);
    files.iter().map(open).find(is_ram).expect("the VM's memory")
}

fn map(file: &File) -> Result<Mapping, memory::Error> {
    let mapping = Mapping::reserve(RAM_BYTES).expect("addresses");
    mapping.map_shared(file).map(|()| mapping)
}

/// Whether the memory of each VM is sealed, by name.
fn sealed(vms: &Value) -> Vec<(String, Value)> {
    let vms = vms["vms"].as_array().into_iter().flatten();
    let mut sealed: Vec<_> =
        vms.map(|vm| (vm["name"].as_str().expect("a name").to_owned(), vm["sealed"].clone())).collect();
    sealed.sort_by(|(one, _), (other, _)| one.cmp(other));
    sealed
}

fn are_sealed(vms: &Value, count: usize) -> bool {
    let sealed = sealed(vms);
    sealed.len() == count && sealed.iter().all(|(_, sealed)| sealed == true)
}

fn image(running: &Running) -> Value {
    wait_until(running, &["image", "ls", "--json"], |images| images[0]["id"].is_string())[0].clone()
}

/// Whether nobody can write to the files, in whatever way.
fn assert_immutable(paths: &[PathBuf]) {
    assert!(!paths.is_empty());
    for file in paths.iter().map(open) {
        assert!(memory::is_sealed(&file).expect("a memory file"));
        assert!(file.write_at(b"x", 0).is_err() && file.set_len(0).is_err());
        assert!(map(&file).is_err());
    }
}

#[test]
fn soon_after_a_fork_the_kernel_lets_nobody_write_to_its_image() {
    let (mut running, _kernel) = start(&[]);
    let node = running.node("vm").expect("a node");
    let vms = wait_until(&running, &["ps", "--json"], |vms| vms["vms"][0]["state"] == "running");
    assert_eq!(sealed(&vms), [("vm".to_owned(), Value::Null)], "there is no image yet");
    running.type_bytes(b"!").expect("a guest that waits");
    running.wait_for_lines("0000da7a", 3).expect("parent and children");
    // Whoever asks for copies at once waits for the seal.
    let image = image(&running)["id"].as_str().expect("an ID").to_owned();
    assert_eq!(running.ask(&["spawn", "--image", &image]).expect("a copy"), "web.3\n");
    running.wait_for_lines("0000da7a", 4).expect("the copy");
    wait_until(&running, &["ps", "--json"], |vms| are_sealed(vms, 4));
    let shown: Value =
        serde_json::from_str(&running.ask(&["image", "show", &image]).expect("it")).expect("JSON");
    assert_eq!(shown["sealed"], true);
    let child = running.node("web.1").expect("a node");
    for pid in [node, child] {
        assert_immutable(&mapped(pid, "memfd:vm-ram"));
    }
    // A fork of what is a view of it: what it has written to is in a file of its own, which is sealed too.
    running.ask(&["fork", "web.1"]).expect("a copy of a copy");
    wait_until(&running, &["ps", "--json"], |vms| are_sealed(vms, 5));
    let grandchild = running.node("web.4").expect("a node");
    assert_immutable(&mapped(grandchild, "memfd:vm-delta"));
    running.signal(Signal::SIGTERM).expect("a signal");
    let ended = running.end().expect("host-vmm ends");
    assert_eq!(printed(&ended, "web.3"), [1, 0xda7a]);
}

#[test]
fn the_image_of_a_parent_that_was_killed_is_sealed_too() {
    let (mut running, _kernel) = start(&[]);
    let node = running.node("vm").expect("a node");
    // It stands for the node, and its mapping goes with it.
    let mapping = map(&ram(node)).expect("a writable mapping");
    running.type_bytes(b"!").expect("a guest that waits");
    running.wait_for_lines("0000da7a", 3).expect("parent and children");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(node.cast_signed()), Signal::SIGKILL)
        .expect("a node to kill");
    let vms = wait_until(&running, &["ps", "--json"], |vms| sealed(vms).len() == 2);
    assert!(sealed(&vms).iter().all(|(_, sealed)| sealed == false), "{vms}");
    drop(mapping);
    wait_until(&running, &["ps", "--json"], |vms| are_sealed(vms, 2));
    running.signal(Signal::SIGTERM).expect("a signal");
    running.end().expect("host-vmm ends");
}

#[test]
fn a_family_whose_image_could_still_be_changed_is_ended_and_told_why() {
    let (mut honest, _kernel) = start(&[]);
    honest.type_bytes(b"!").expect("a guest that waits");
    honest.wait_for_lines("0000da7a", 3).expect("parent and children");
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a path").to_owned();
    let (good, bad) = (path("good"), path("bad"));
    honest
        .ask(&["image", "save", image(&honest)["id"].as_str().expect("an ID"), &good])
        .expect("a saved image");
    drop(honest);

    let (mut running, _kernel) = start(&[]);
    let node = running.node("vm").expect("a node");
    let other = running.ask(&["image", "load", &good]).expect("an image").trim().to_owned();
    assert_eq!(running.ask(&["spawn", "--image", &other]).expect("a copy"), "web.1\n");
    running.wait_for_lines("0000da7a", 1).expect("the copy");
    // A node that was taken over, and keeps a way to write to what it freezes.
    let mapping = map(&ram(node)).expect("a writable mapping");
    running.type_bytes(b"!").expect("a guest that waits");
    running.wait_for_lines("0000da7a", 4).expect("parent and children");
    mapping.write(DATA, &0xbad_u32.to_le_bytes()).expect("the mapping is writable");
    // A parent forks again before its image is sealed.
    assert!(running.ask(&["fork", "vm"]).expect("a copy").contains("vm.4"));
    let vms = wait_until(&running, &["ps", "--json"], |vms| sealed(vms).len() == 5);
    for (name, sealed) in sealed(&vms) {
        assert_eq!(sealed, name == "web.1", "{name}");
    }
    let images: Value =
        serde_json::from_str(&running.ask(&["image", "ls", "--json"]).expect("images")).expect("JSON");
    let images = images.as_array().expect("an array");
    let unsealed =
        images.iter().find(|image| image["sealed"] == false).expect("it is there, and not for use");
    let unsealed = unsealed["id"].as_str().expect("an ID");
    // Each waits until it is decided.
    let uses = [vec!["spawn", "--image", unsealed], vec!["image", "save", unsealed, &bad]];
    for used in uses.map(|command| running.start(&command).expect("host-vmm starts")) {
        let used = used.wait_with_output().expect("an end");
        let refused = String::from_utf8_lossy(&used.stderr);
        assert!(!used.status.success() && refused.contains("could still be changed"), "{refused}");
    }
    for name in ["vm", "web.2", "web.3", "vm.4"] {
        let how = running.wait_for("its end", |event| {
            (event["event"] == "ended" && event["name"] == name).then(|| event["how"].clone())
        });
        let how = how.expect("an end");
        assert!(how["Unsealed"].as_str().is_some_and(|why| why.contains("EBUSY")), "{name}: {how}");
    }
    // Nothing is left of it, and others do not notice.
    let vms = wait_until(&running, &["ps", "--json"], |vms| sealed(vms).len() == 1);
    assert!(are_sealed(&vms, 1), "{vms}");
    let told = vms["ended"].as_array().expect("an array").iter().filter(|ended| ended["why"].is_string());
    assert_eq!(told.count(), 4, "{vms}");
    assert!(running.ask(&["ps"]).expect("a list").contains("web.3 was ended: "));
    assert_eq!(image(&running)["id"], other.as_str());
    assert!(!fs::exists(&bad).expect("a folder"));
    assert_eq!(running.ask(&["spawn", "--image", &other]).expect("a copy"), "web.5\n");
    running.wait_for_lines("0000da7a", 5).expect("the copy");
    running.signal(Signal::SIGTERM).expect("a signal");
    running.end().expect("host-vmm ends");
    drop(mapping);
}
