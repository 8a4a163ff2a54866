use vmfork_abi::{
    ABI_VERSION,
    cpuid::{Interface, LEAF_FEATURES, Registers},
};
use vmm::arch::{
    layout::{CONTROL_PAGE, DOORBELL_PORT},
    leaf,
};

use super::*;
use crate::{
    file::tests::{content, roomy},
    unpack,
};

/// A file that a program of that version has written, made smaller: of a guest that had done no more than to
/// fork.
const GOLDEN: &[u8] = include_bytes!("version-1.capsule.zst");

/// A file in the format of today whose states are of version 1, of the same guest.
const STATE_1: &[u8] = include_bytes!("state-1.capsule.zst");

/// The capsules that earlier programs have written.
pub(crate) fn written_before() -> [Capsule; 2] {
    [GOLDEN, STATE_1].map(|bytes| loaded(&zstd::stream::decode_all(bytes).unwrap()).unwrap())
}

/// A capsule without what programs of that version did not know.
pub(crate) fn as_version_1_has_it(capsule: Capsule) -> Capsule {
    let (mut machine, image) = unpack(&capsule.state, &capsule.files).unwrap();
    machine.devices = OlderDevicesState::from(machine.devices).into();
    machine.vcpus = OlderVcpuState::into_current(machine.vcpus.into_iter().map(OlderVcpuState::of).collect());
    Capsule { state: pack(&machine, &image, &capsule.files).unwrap(), ..capsule }
}

/// What a program of that version has written.
pub(crate) fn saved_as_version_1(capsule: &Capsule) -> Vec<u8> {
    let (machine, image) = unpack(&capsule.state, &capsule.files).unwrap();
    let MachineState { config, vm, vcpus, devices, .. } = machine;
    let layers = image.layers().iter().enumerate();
    let layers = layers.map(|(file, layer)| LayerContents { file, runs: layer.runs.clone() }).collect();
    let vcpus = vcpus.into_iter().map(OlderVcpuState::of).collect();
    let contents = Contents {
        machine: Machine { config, vm, vcpus, devices: devices.into() },
        pages: image.pages(),
        layers,
    };
    let (mut data, mut described) = (Vec::new(), Vec::new());
    for layer in image.layers() {
        let content = content(&layer.file);
        let mut runs = Vec::new();
        for (page, bytes) in
            (0..).zip(content.chunks(4096)).filter(|(_, page)| page.iter().any(|&byte| byte != 0))
        {
            data.extend_from_slice(bytes);
            runs.push((page, 1));
        }
        described.push(LayerDescription { pages: content.len() as u64 / PAGE_BYTES, runs });
    }
    let ImageMetadata { id, created_ns, vm_type, original, config, seq } = capsule.metadata.clone();
    let state = codec::encode(&contents).unwrap();
    let data_digest = blake3::hash(&data).into();
    file(
        &Description {
            id,
            created_ns,
            vm_type,
            original,
            config,
            seq,
            state,
            layers: described,
            data_digest,
        },
        &data,
    )
}

fn file(description: &Description, data: &[u8]) -> Vec<u8> {
    let description = codec::encode(description).unwrap();
    let header = Header { version: 1, ..Header::new(false, data.len() as u64, &description) };
    let mut bytes = header.to_bytes().to_vec();
    bytes.resize(4096, 0);
    [&bytes, data, &description].concat()
}

fn loaded(bytes: &[u8]) -> Result<Capsule, Error> {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    crate::file::load(&file, &roomy())
}

#[test]
fn what_a_program_of_that_version_has_written_is_loaded_and_can_be_described() {
    let bytes = zstd::stream::decode_all(GOLDEN).unwrap();
    let capsule = loaded(&bytes).unwrap();
    let ImageMetadata { vm_type, original, config, seq, .. } = &capsule.metadata;
    assert_eq!((vm_type.as_str(), original.name.as_str(), *seq), ("web", "vm", 1));
    assert_eq!((config.ram_bytes, config.vcpus), (32 << 20, 1));
    let (machine, image) = unpack(&capsule.state, &capsule.files).unwrap();
    assert_eq!((machine.config, machine.vcpus.len(), image.pages()), (*config, 1, 8192));
    // Its guest was told of no generation ID: copies of it get no interrupt of that.
    assert!(!machine.devices.has_generation_id());
    let memory = content(&image.layers()[0].file);
    // Its code is where the kernel was loaded, behind the first 2 MiB.
    assert!(memory[0x20_0000..0x20_1000].iter().any(|&byte| byte != 0));
    let description = capsule.describe(&crate::Digests::default()).unwrap().0;
    assert_eq!(description.memory.data_bytes(), 12 * PAGE_BYTES);
}

#[test]
fn a_state_of_version_1_gets_what_it_lacks_as_it_is_at_boot() {
    let capsule = loaded(&zstd::stream::decode_all(STATE_1).unwrap()).unwrap();
    let (machine, image) = unpack(&capsule.state, &capsule.files).unwrap();
    assert_eq!((machine.vcpus.len(), image.pages(), machine.tsc_khz.is_some()), (1, 8192, true));
    let value = |index| machine.vcpus[0].msrs().iter().find(|msr| msr.index == index).map(|msr| msr.value);
    assert_eq!([0x2ff, 0x179, 0x400].map(value), [Some(0x806), Some(32), Some(0)]);
    assert!(machine.vcpus[0].tsc().is_some_and(|tsc| tsc > 0));
    // Its copies ask for no more than they did.
    let description = capsule.describe(&crate::Digests::default()).unwrap().0;
    let offer = crate::compat::Requirements::of(&machine);
    assert_eq!(description.requirements, offer);
}

#[test]
fn guests_of_before_the_features_keep_their_cpuid() {
    for capsule in written_before() {
        let (machine, _) = unpack(&capsule.state, &capsule.files).unwrap();
        let leaves = leaf::leaves(machine.vcpus[0].cpuid());
        let interface = Interface::read(|number| {
            let leaf = leaf::find(&leaves, number, 0).expect("a leaf that is said to be there");
            let [eax, ebx, ecx, edx] = leaf.registers;
            Registers { eax, ebx, ecx, edx }
        });
        // Page and doorbell are where they look for them, and no third leaf is asked for.
        let (control_page_gpa, doorbell_port) = (CONTROL_PAGE.0, DOORBELL_PORT);
        assert_eq!(
            interface,
            Some(Interface { abi_version: ABI_VERSION, control_page_gpa, doorbell_port, features: 0 })
        );
        assert_eq!(leaf::find(&leaves, LEAF_FEATURES, 0), None);
    }
}

#[test]
fn forged_descriptions_are_refused() {
    // Somebody who knows how digests are made.
    let forge = |pages: u64, runs: Vec<(u64, u64)>, data: &[u8]| {
        let ImageMetadata { original, config, .. } = crate::samples::capsule(&[]).metadata;
        let description = Description {
            id: Uuid::nil(),
            created_ns: 0,
            vm_type: "web".into(),
            original,
            config,
            seq: 0,
            state: Vec::new(),
            layers: vec![LayerDescription { pages, runs }],
            data_digest: blake3::hash(data).into(),
        };
        loaded(&file(&description, data)).unwrap_err()
    };
    let page = [1; 4096];
    // Layers that can be, and no state.
    assert!(matches!(forge(2, vec![(0, 1)], &page), Error::Codec(_)));
    for (pages, runs, data, why) in [
        (2, vec![(2, 1)], &page[..], "a run behind the end"),
        (2, vec![(u64::MAX, 1)], &page, "an overflow"),
        (2, vec![(0, 0), (0, 1)], &page, "an empty run"),
        (2, vec![(1, 1), (0, 1)], &[page, page].concat(), "unsorted"),
        (2, vec![(0, 2)], &page, "too few pages"),
        (2, vec![], &page, "too many pages"),
        (u64::MAX, vec![(0, 1)], &page, "too large"),
    ] {
        assert!(matches!(forge(pages, runs, data), Error::Invalid(_)), "{why}");
    }
}

#[test]
fn changed_pages_are_found() {
    let capsule = crate::samples::capsule(&[vec![1]]);
    let mut bytes = saved_as_version_1(&capsule);
    bytes[5000] ^= 1;
    assert!(matches!(loaded(&bytes), Err(Error::Digest("the memory"))));
}
