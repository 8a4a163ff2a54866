use std::io::Seek;

use proptest::prelude::*;

use super::*;

const PAGE: usize = 4096;

fn capsule(layers: &[Vec<u8>]) -> Capsule {
    let original = VmIdentity {
        id: Uuid::from_u128(7),
        parent: Uuid::nil(),
        name: "vm".into(),
        vm_type: "vm".into(),
        index: 0,
        count: 0,
        generation: 3,
    };
    let files = layers.iter().map(|content| memory::sealed("test", content).unwrap()).collect();
    Capsule {
        id: Uuid::from_u128(8),
        created_ns: 9,
        vm_type: "web".into(),
        original,
        config: Config { ram_bytes: 16 << 20, vcpus: 2 },
        seq: 10,
        state: b"state".to_vec(),
        files,
    }
}

fn content(file: &File) -> Vec<u8> {
    let mut content = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

fn saved(capsule: &Capsule) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    save(capsule, &file).unwrap();
    content(&file)
}

fn loaded(bytes: &[u8]) -> Result<Capsule, Error> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    load(&mut file)
}

/// A layer of one byte a page.
fn layer(pages: &[u8]) -> Vec<u8> {
    pages.iter().flat_map(|&byte| std::iter::repeat_n(byte, PAGE)).collect()
}

proptest! {
    #[test]
    fn what_was_saved_is_loaded(layers in proptest::collection::vec(proptest::collection::vec(0..3u8, 0..40), 0..4)) {
        let layers: Vec<Vec<u8>> = layers.iter().map(|pages| layer(pages)).collect();
        let before = capsule(&layers);
        let bytes = saved(&before);
        let not_zero = layers.iter().flat_map(|layer| layer.chunks(PAGE)).filter(|page| page[0] != 0).count();
        prop_assert!(bytes.len() < (not_zero + 2) * PAGE + 2048, "zero pages take room");
        let after = loaded(&bytes).unwrap();
        prop_assert_eq!(after.files.iter().map(content).collect::<Vec<_>>(), layers);
        prop_assert!(after.files.iter().all(|file| memory::is_immutable(file).unwrap()));
        prop_assert_eq!((after.id, after.created_ns, after.vm_type, after.seq), (before.id, 9, before.vm_type, 10));
        prop_assert_eq!((after.original, after.config, after.state), (before.original, before.config, before.state));
    }

    #[test]
    fn any_changed_byte_is_found(at in any::<prop::sample::Index>(), bit in 0..8u32) {
        let mut bytes = saved(&capsule(&[layer(&[1, 0, 2])]));
        // What lies between the header and the pages says nothing.
        let meaning: Vec<usize> = (0..HEADER_BYTES).chain(PAGE..bytes.len()).collect();
        bytes[*at.get(&meaning)] ^= 1 << bit;
        prop_assert!(loaded(&bytes).is_err());
    }

    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
        prop_assert!(loaded(&bytes).is_err());
    }
}

#[test]
fn mistakes_are_told_apart() {
    let bytes = saved(&capsule(&[layer(&[1, 2])]));
    assert!(matches!(loaded(b""), Err(Error::NoImage)));
    assert!(matches!(loaded(&vec![0; 10_000]), Err(Error::NoImage)));
    assert!(matches!(loaded(&bytes[..bytes.len() - 1]), Err(Error::Length { .. })));
    assert!(matches!(loaded(&[bytes.as_slice(), b"x"].concat()), Err(Error::Length { .. })));
    let changed = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        loaded(&bytes).unwrap_err()
    };
    assert!(matches!(changed(8), Error::Version { found: 0 }));
    assert!(matches!(changed(30), Error::Digest("the header")));
    assert!(matches!(changed(PAGE), Error::Digest("the memory")));
    assert!(matches!(changed(bytes.len() - 40), Error::Digest("the description")));
}

#[test]
fn forged_descriptions_are_refused() {
    // Somebody who knows how digests are made.
    let forge = |pages: u64, runs: Vec<(u64, u64)>, data: &[u8]| {
        let description = Description {
            id: Uuid::nil(),
            created_ns: 0,
            vm_type: "web".into(),
            original: capsule(&[]).original,
            config: Config { ram_bytes: 1, vcpus: 1 },
            seq: 0,
            state: Vec::new(),
            layers: vec![LayerDescription { pages, runs }],
            data_digest: blake3::hash(data).into(),
        };
        let description = codec::encode(&description).unwrap();
        let header = Header {
            data_bytes: data.len() as u64,
            description_bytes: description.len() as u64,
            description_digest: blake3::hash(&description).into(),
        };
        let mut bytes = header.to_bytes().to_vec();
        bytes.resize(PAGE, 0);
        loaded(&[&bytes, data, &description].concat())
    };
    let page = [1; PAGE];
    assert!(forge(2, vec![(0, 1)], &page).is_ok());
    for (pages, runs, data, why) in [
        (2, vec![(2, 1)], &page[..], "a run behind the end"),
        (2, vec![(u64::MAX, 1)], &page, "an overflow"),
        (2, vec![(0, 0), (0, 1)], &page, "an empty run"),
        (2, vec![(1, 1), (0, 1)], &[page, page].concat(), "unsorted"),
        (2, vec![(0, 2)], &page, "too few pages"),
        (2, vec![], &page, "too many pages"),
        (u64::MAX, vec![(0, 1)], &page, "too large"),
    ] {
        assert!(matches!(forge(pages, runs, data), Err(Error::Invalid(_))), "{why}");
    }
}
