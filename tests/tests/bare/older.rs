//! What older programs have written.

use std::io::{self, Write};

use vmfork_tests::{cluster::Platforms, vmm::Vmm};

use super::clones::{know_each_other, vms};

/// An image in the first version of the format. Its copies print their index, and stand still.
const VERSION_1: &[u8] = include_bytes!("../../../host-vmm/src/capsule/version-1.capsule.zst");

#[test]
fn an_image_of_format_version_1_loads_and_its_copies_run() {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(&zstd::stream::decode_all(VERSION_1).expect("the image")).expect("a file");
    let path = file.path().to_str().expect("a path");
    let platforms = Platforms::new(&["a", "b"]);
    let [mut source, target] =
        ["a", "b"].map(|name| Vmm::serve(&platforms.config(name, "")).start().expect("a platform"));
    know_each_other(&source, 2);
    let image = match source.ask(&["image", "load", path]) {
        Ok(image) => image.trim().to_owned(),
        Err(refused) => {
            // The file is right, and this host is another one than that on which it was written.
            assert!(refused.to_string().contains("this platform can't run the VM: "), "{refused:#}");
            let told = writeln!(io::stderr(), "SKIPPED: copies of a guest that was shown another CPU: {refused:#}");
            return told.expect("standard error");
        }
    };
    let image = image.as_str();
    // Such an image does not say how fast its guest's TSC runs: to another platform, that is too little.
    let refused = source.ask(&["clone", "--image", image, "--to", "b"]).expect_err("an image that tells too little");
    assert!(refused.to_string().trim_end().ends_with("can't run the VM: TSC of unknown frequency"), "{refused:#}");
    source.ask(&["spawn", "--image", image, "--count", "3"]).expect("copies");
    let mut lines = source.wait_for_lines("", 3).expect("the copies run");
    lines.sort();
    assert_eq!(lines, [1, 2, 3].map(|index| (format!("web.{index}"), format!("{index:08x}"))));
    vms(&target, 0);
}
