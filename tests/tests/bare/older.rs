//! What older programs have written.

use std::io::{self, Write};

use vmfork_tests::{
    cluster::Platforms,
    vmm::{Running, Vmm},
};

use super::clones::{know_each_other, vms};

/// Images of earlier formats, of the same guest: its copies print their index, and stand still.
const VERSION_1: &[u8] = include_bytes!("../../../host-vmm/crates/capsule/src/version-1.capsule.zst");
const STATE_1: &[u8] = include_bytes!("../../../host-vmm/crates/capsule/src/state-1.capsule.zst");

#[test]
fn images_of_earlier_formats_load_and_their_copies_run_and_fork_again() {
    let platforms = Platforms::new(&["a", "b"]);
    let [mut source, mut target] =
        ["a", "b"].map(|name| Vmm::serve(&platforms.config(name, "")).start().expect("a platform"));
    know_each_other(&source, 2);
    let loaded = [VERSION_1, STATE_1].map(|image| load(&source, image));
    let (mut copies, mut clones) = (0, 0);
    for (image, tells_frequency) in loaded.iter().zip([false, true]) {
        let Some(image) = image.as_deref() else { continue };
        let clone = source.ask(&["clone", "--image", image, "--to", "b"]);
        if tells_frequency {
            clone.expect("a clone");
            clones += 1;
        } else {
            // It does not say how fast its guest's TSC runs: to another platform, that is too little.
            let refused = clone.expect_err("an image that tells too little").to_string();
            assert!(refused.trim_end().ends_with("can't run the VM: TSC of unknown frequency"), "{refused}");
        }
        source.ask(&["spawn", "--image", image, "--count", "2"]).expect("copies");
        copies += 2;
    }
    if copies == 0 {
        return;
    }
    let lines = source.wait_for_lines("", copies).expect("the copies run");
    assert!(lines.iter().all(|(_, index)| index == "00000001" || index == "00000002"), "{lines:?}");
    if clones > 0 {
        target.wait_for_lines("", clones).expect("the clones run");
    }
    // They are VMs like any others.
    for (name, _) in &lines {
        source.ask(&["fork", name, "--count", "1"]).expect("a copy of the copy");
    }
    // Their guest was booted when there was no generation ID.
    assert!(vms(&source, 2 * copies).iter().all(|vm| vm["generation_id"] == false));
    vms(&target, clones);
}

/// The image that a platform has loaded; none where this host is another one than that on which it was
/// written.
fn load(platform: &Running, image: &[u8]) -> Option<String> {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&zstd::stream::decode_all(image).expect("the image")).expect("a file");
    match platform.ask(&["image", "load", file.path().to_str().expect("a path")]) {
        Ok(image) => Some(image.trim().to_owned()),
        Err(refused) => {
            // The file is right.
            assert!(refused.to_string().contains("this platform can't run the VM: "), "{refused:#}");
            let told =
                writeln!(io::stderr(), "SKIPPED: copies of a guest that was shown another CPU: {refused:#}");
            told.expect("standard error");
            None
        }
    }
}
