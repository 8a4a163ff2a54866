use std::io::Write;

use proptest::prelude::*;
use types::PAGE_BYTES;
use vmm::{
    devices::ControlPageState,
    kvm::OlderVcpuState,
    machine::MachineState,
    memory::{self, Run},
};

use super::*;
use crate::{
    pack,
    samples::{PAGE, capsule},
    unpack,
    v1::tests::{as_version_1_has_it, saved_as_version_1},
};

pub(crate) fn content(file: &File) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

fn saved(capsule: &Capsule, compress: bool) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    save(capsule, &file, compress).unwrap();
    content(&file)
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A budget that has room for all that is made here.
pub(crate) fn roomy() -> Budget {
    Budget::new(1 << 30, 0, || Ok(u64::MAX))
}

fn loaded(bytes: &[u8]) -> Result<Capsule, Error> {
    let (loaded, verified) = (load(&file_of(bytes), &roomy()), verify(&file_of(bytes)));
    assert_eq!(loaded.is_ok(), verified.is_ok());
    loaded
}

#[test]
fn what_there_is_no_room_for_is_refused_and_what_is_loaded_counts_until_it_goes() {
    const BYTES: u64 = 30 * PAGE_BYTES;
    // Equal pages count each.
    let before = capsule(&[vec![1; 20], vec![1; 10]]);
    for bytes in [saved(&before, false), saved(&before, true), saved_as_version_1(&before)] {
        let load = |limit: u64| {
            let budget = Budget::new(limit, 0, || Ok(u64::MAX));
            (load(&file_of(&bytes), &budget), budget)
        };
        for limit in [0, BYTES - 1] {
            let (refused, budget) = load(limit);
            assert!(matches!(refused, Err(Error::NoRoom(_))), "{limit}");
            assert_eq!(budget.held(), 0);
        }
        let (loaded, budget) = load(1 << 30);
        let loaded = loaded.unwrap();
        assert_eq!(budget.held(), BYTES);
        drop(loaded);
        assert_eq!(budget.held(), 0);
    }
}

fn layers() -> impl Strategy<Value = Vec<Vec<u8>>> {
    proptest::collection::vec(proptest::collection::vec(0..3u8, 1..30), 0..4)
}

proptest! {
    #[test]
    fn what_was_saved_is_loaded(layers in layers(), compress: bool) {
        let before = capsule(&layers);
        let bytes = saved(&before, compress);
        let not_zero = layers.iter().flatten().filter(|&&page| page != 0).count();
        prop_assert!(bytes.len() < (not_zero + 2) * PAGE + 8192, "zero pages take room");
        let after = loaded(&bytes).unwrap();
        let contents = |capsule: &Capsule| capsule.files.iter().map(|file| content(file)).collect::<Vec<_>>();
        prop_assert_eq!(contents(&after), contents(&before));
        prop_assert!(after.files.iter().all(|file| memory::is_sealed(file).unwrap()));
        prop_assert_eq!((&after.metadata, &after.state), (&before.metadata, &before.state));
    }

    #[test]
    fn any_changed_bit_is_found(at in any::<prop::sample::Index>(), bit in 0..8u32, compress: bool) {
        let before = capsule(&[vec![1, 0, 2]]);
        let mut bytes = saved(&before, compress);
        // What lies between the header and the memory says nothing.
        let meaning: Vec<usize> = (0..HEADER_BYTES).chain(PAGE..bytes.len()).collect();
        bytes[*at.get(&meaning)] ^= 1 << bit;
        if let Ok(after) = loaded(&bytes) {
            // One bit of each frame of zstd says nothing (RFC 8878, 3.1.1.1.1.3, "Unused Bit").
            prop_assert!(compress && bit == 4);
            prop_assert_eq!(content(&after.files[0]), content(&before.files[0]));
            prop_assert_eq!((&after.metadata, &after.state), (&before.metadata, &before.state));
        }
    }

    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
        prop_assert!(loaded(&bytes).is_err());
    }

    /// Somebody who knows how digests are made.
    #[test]
    fn no_description_does_harm(description in proptest::collection::vec(any::<u8>(), 0..2000), compress: bool) {
        let mut bytes = Header::new(compress, 0, &description).to_bytes().to_vec();
        bytes.resize(PAGE, 0);
        prop_assert!(loaded(&[bytes, description].concat()).is_err());
    }

    #[test]
    fn the_version_before_is_read(layers in layers()) {
        let before = as_version_1_has_it(capsule(&layers));
        let after = loaded(&saved_as_version_1(&before)).unwrap();
        let (mut machine, image) = unpack(&before.state, &before.files).unwrap();
        machine.vcpus = OlderVcpuState::into_current(machine.vcpus.into_iter().map(OlderVcpuState::of).collect());
        let state = pack(&machine, &image, &before.files).unwrap();
        prop_assert_eq!((&after.metadata, after.state == state), (&before.metadata, true));
        let contents = |capsule: &Capsule| capsule.files.iter().map(|file| content(file)).collect::<Vec<_>>();
        prop_assert_eq!(contents(&after), contents(&before));
    }
}

#[test]
fn mistakes_are_told_apart() {
    for compress in [false, true] {
        let bytes = saved(&capsule(&[vec![1, 2]]), compress);
        assert!(matches!(loaded(b""), Err(Error::NoCapsule)));
        assert!(matches!(loaded(&vec![0; 10_000]), Err(Error::NoCapsule)));
        assert!(matches!(loaded(&bytes[..bytes.len() - 1]), Err(Error::Length { .. })));
        assert!(matches!(loaded(&[bytes.as_slice(), b"x"].concat()), Err(Error::Length { .. })));
        let changed = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            loaded(&bytes).unwrap_err()
        };
        assert!(matches!(changed(8), Error::Version { found: 3, .. }));
        assert!(matches!(changed(30), Error::Digest("the header")));
        assert!(matches!(changed(PAGE), Error::Digest("the memory")));
        assert!(matches!(changed(bytes.len() - 40), Error::Digest("the description")));
    }
}

#[test]
fn a_description_can_be_read_by_itself() {
    let capsule = capsule(&[vec![1, 0, 2]]);
    let file = file_of(&saved(&capsule, true));
    let (header, description) = inspect(&file).unwrap();
    assert!(header.is_compressed);
    assert_eq!(description.metadata, capsule.metadata);
    assert_eq!(description.memory.layers.len(), 2);
    assert_eq!(description.memory.data_bytes(), 2 * PAGE_BYTES);
    let (header, description) = inspect(&file_of(&saved_as_version_1(&capsule))).unwrap();
    assert_eq!(header.version, 1);
    assert_eq!(description.metadata, capsule.metadata);
}

/// A capsule whose description says something else than it should.
fn forged(change: impl FnOnce(&mut Description)) -> Result<Capsule, Error> {
    let capsule = capsule(&[vec![1, 2]]);
    let bytes = saved(&capsule, false);
    let (header, mut description) = inspect(&file_of(&bytes)).unwrap();
    change(&mut description);
    let description = description.to_bytes().unwrap();
    let end = PAGE + usize::try_from(header.data_bytes).unwrap();
    let mut forged = Header::new(false, header.data_bytes, &description).to_bytes().to_vec();
    forged.extend_from_slice(&bytes[HEADER_BYTES..end]);
    loaded(&[forged, description].concat())
}

#[test]
fn forged_descriptions_are_refused() {
    assert!(forged(|_| ()).is_ok());
    assert!(matches!(forged(|it| it.metadata.vm_type = "../x".into()), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.stored = Some(vec![1])), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.memory.layers[1].chunks.clear()), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.memory.layers[1].chunks[0].pages = 1), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.memory.layers[1].chunks[0].digest[0] ^= 1), Err(Error::Digest(_))));
    assert!(matches!(forged(|it| it.memory.layers[1].file_pages = u64::MAX), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.memory.pages += 1), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.metadata.config.vcpus += 1), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.metadata.config.vcpus = 0), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.metadata.config.ram_bytes = 0), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.memory.layers[1].runs[0].pages = 3), Err(Error::Memory(_))));
    assert!(matches!(forged(|it| it.memory.layers.clear()), Err(Error::Invalid(_))));
    // What takes little to say.
    assert!(matches!(forged(|it| it.stored = Some(vec![1; 1000])), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.machine.capabilities = vec!["A".into(); 65]), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.machine.capabilities = vec!["A".repeat(65)]), Err(Error::Invalid(_))));
    assert!(matches!(forged(|it| it.machine.capabilities.push("\x1b".into())), Err(Error::Invalid(_))));
    let empty = Run { page: 20, pages: 0, file_page: 0 };
    assert!(matches!(forged(|it| it.memory.layers[1].runs.push(empty)), Err(Error::Invalid(_))));
    let one = |page| Run { page, pages: 1, file_page: 0 };
    assert!(matches!(
        forged(|it| it.memory.layers[1].runs.extend([20, 22].map(one))),
        Err(Error::Invalid(_))
    ));
}

#[test]
fn a_description_has_its_memory_for_as_long_as_it_is_there() {
    let budget = roomy();
    let described = capsule(&[]).describe(&Digests::default()).unwrap().0;
    let description = described.held_by(budget.reserve(5000).unwrap());
    let other = description.clone();
    let (capsule, description) = Assembly::new(description, &budget, |_| None).unwrap().finish().unwrap();
    drop((capsule, other));
    assert_eq!(budget.held(), 5000);
    drop(description);
    assert_eq!(budget.held(), 0);
}

#[test]
fn a_file_is_saved_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    save_as(&capsule(&[vec![1]]), &path, false).unwrap();
    let before = std::fs::read(&path).unwrap();
    // A state that is none.
    let broken = Capsule { state: Vec::new(), ..capsule(&[vec![2]]) };
    assert!(save_as(&broken, &path, false).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_a_guest_was_told_is_saved_where_it_did_not_ask_for_the_copies() {
    let asked = capsule(&[]);
    let (machine, image) = unpack(&asked.state, &asked.files).unwrap();
    let not_asked = MachineState { control_page: ControlPageState::forked(9), ..machine };
    let state = pack(&not_asked, &image, &asked.files).unwrap();
    let not_asked = Capsule { metadata: asked.metadata.clone(), state, files: asked.files.clone() };
    for (capsule, parts) in [(&asked, 7), (&not_asked, 8)] {
        assert_eq!(loaded(&saved(capsule, false)).unwrap().state, capsule.state);
        let described = capsule.describe_sparse().unwrap().0.to_bytes().unwrap();
        assert_eq!(described[..8], u64::to_le_bytes(parts), "older programs know seven parts");
    }
}
