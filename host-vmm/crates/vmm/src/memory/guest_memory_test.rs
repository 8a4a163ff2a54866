use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::*;

const PAGES: usize = 48;
const PAGE: usize = 4096;

/// The first byte of a page stands for all of it.
fn poke(memory: &GuestMemory, page: usize, value: u8) {
    memory.mapping().write(page * PAGE, &[value]).unwrap();
}

fn peek(memory: &GuestMemory, page: usize) -> u8 {
    let mut byte = [0];
    memory.mapping().read(page * PAGE, &mut byte).unwrap();
    byte[0]
}

fn content(memory: &GuestMemory) -> Vec<u8> {
    (0..PAGES).map(|page| peek(memory, page)).collect()
}

fn fresh() -> GuestMemory {
    GuestMemory::own(reserved()).unwrap()
}

fn reserved() -> Arc<Mapping> {
    Arc::new(Mapping::reserve(PAGES * PAGE).unwrap())
}

fn freeze(memory: &GuestMemory) -> Arc<Image> {
    let changes = memory.changes(&PageMap::open().unwrap()).unwrap();
    memory.freeze(memory.plan(&Delta::new().unwrap()), changes).unwrap()
}

/// A parent whose memory is still its own goes on as a view of the image, as its child does.
fn fork(memory: &mut GuestMemory) -> GuestMemory {
    let image = freeze(memory);
    let child = GuestMemory::of_image(Arc::clone(&image), reserved()).unwrap();
    if memory.own_file().is_some() {
        *memory = GuestMemory::of_image(image, reserved()).unwrap();
    }
    child
}

#[derive(Debug, Clone)]
enum Step {
    Write { vm: usize, page: usize, value: u8 },
    Fork { vm: usize },
    FailedFork { vm: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (any::<usize>(), 0..PAGES, any::<u8>()).prop_map(|(vm, page, value)| Step::Write { vm, page, value }),
        2 => any::<usize>().prop_map(|vm| Step::Fork { vm }),
        1 => any::<usize>().prop_map(|vm| Step::FailedFork { vm }),
    ]
}

proptest! {
    /// The naive model copies all of a VM's memory at every fork.
    #[test]
    fn copies_are_as_if_copied(steps in proptest::collection::vec(step(), 1..60)) {
        let mut vms = vec![(fresh(), vec![0; PAGES])];
        for step in steps {
            match step {
                Step::Write { vm, page, value } => {
                    let count = vms.len();
                    let (memory, model) = &mut vms[vm % count];
                    poke(memory, page, value);
                    model[page] = value;
                }
                Step::Fork { vm } => {
                    let count = vms.len();
                    let (memory, model) = &mut vms[vm % count];
                    let copy = (fork(memory), model.clone());
                    vms.push(copy);
                }
                Step::FailedFork { vm } => {
                    let count = vms.len();
                    drop(freeze(&vms[vm % count].0));
                }
            }
            for (memory, model) in &vms {
                prop_assert_eq!(&content(memory), model);
            }
        }
    }
}

#[test]
fn an_image_can_not_be_written() {
    let mut memory = fresh();
    let file = Arc::clone(memory.own_file().unwrap());
    poke(&memory, 3, 7);
    drop(fork(&mut memory));
    assert!(file.write_at(b"x", 0).is_err());
    let again = Mapping::reserve(PAGES * PAGE).unwrap();
    assert!(again.map_shared(&file).is_err());
    poke(&memory, 3, 8);
    let mut stored = [0];
    file.read_exact_at(&mut stored, 3 * 4096).unwrap();
    assert_eq!(stored, [7]);
}

#[test]
fn a_failed_freeze_leaves_the_file_the_vms_own() {
    let memory = fresh();
    drop(freeze(&memory));
    poke(&memory, 5, 9);
    let mut stored = [0];
    memory.own_file().unwrap().read_exact_at(&mut stored, 5 * 4096).unwrap();
    assert_eq!(stored, [9]);
}

proptest! {
    /// As long a memory as there are pages in the shares: each page comes once, in order, packed, and no
    /// share is larger than the others.
    #[test]
    fn shares_are_fair_and_complete(lengths in proptest::collection::vec(1..20u64, 0..20), count in 1..6usize) {
        let mut runs: Vec<Run> = Vec::new();
        for pages in lengths {
            let (page, file_page) = runs.last().map_or((0, 0), |run| (run.end() + 1, run.file_page + run.pages));
            runs.push(Run { page, pages, file_page });
        }
        let all = |runs: &[Run]| runs.iter().flat_map(|run| run.page..run.end()).collect::<Vec<_>>();
        let shares = shares(&runs, count);
        prop_assert_eq!(shares.iter().flat_map(|share| all(share)).collect::<Vec<_>>(), all(&runs));
        prop_assert!(shares.len() <= count);
        let most = all(&runs).len().div_ceil(count);
        for share in shares {
            prop_assert!(pages(&share) <= u64::try_from(most).unwrap());
            let packed = share.iter().try_fold(0, |at, run| (run.file_page == at).then_some(at + run.pages));
            prop_assert_eq!(packed, Some(pages(&share)));
        }
    }
}

#[test]
fn much_is_copied_to_several_files_and_then_no_more() {
    const PAGES: usize = 4096;
    let page_map = PageMap::open().unwrap();
    let reserved = || Arc::new(Mapping::reserve(PAGES * PAGE).unwrap());
    let first = GuestMemory::own(reserved()).unwrap();
    let changes = first.changes(&page_map).unwrap();
    assert_eq!(changes.rebase(), Rebase::Required);
    let image = first.freeze(first.plan(&Delta::new().unwrap()), changes).unwrap();
    let memory = GuestMemory::of_image(image, reserved()).unwrap();
    // All but every fifth page, each with content of its own.
    let dirty: Vec<usize> = (0..PAGES).filter(|page| page % 50 >= 10).collect();
    for page in &dirty {
        memory.mapping().write(page * PAGE, &u64::try_from(page + 1).unwrap().to_le_bytes()).unwrap();
    }
    let changes = memory.changes(&page_map).unwrap();
    assert_eq!(changes.rebase(), Rebase::Preferred);
    let image = memory.freeze(memory.plan(&Delta::new().unwrap()), changes).unwrap();
    assert_eq!(image.layers().len(), 1 + threads::processors().min(3));
    let next = GuestMemory::of_image(image, reserved()).unwrap();
    for page in 0..PAGES {
        let mut word = [0; 8];
        next.mapping().read(page * PAGE, &mut word).unwrap();
        let expected = if dirty.contains(&page) { u64::try_from(page + 1).unwrap() } else { 0 };
        assert_eq!(u64::from_le_bytes(word), expected, "page {page}");
    }
    let changes = next.changes(&page_map).unwrap();
    assert_eq!(changes.rebase(), Rebase::No);
    assert!(matches!(changes, Changes::Over { runs, .. } if runs.is_empty()));
}

#[test]
fn an_idle_view_adds_no_layer() {
    let mut memory = fresh();
    let mut child = fork(&mut memory);
    let grandchild = fork(&mut child);
    assert_eq!(content(&grandchild), vec![0; PAGES]);
    let Backing::Image(image) = &grandchild.backing else { panic!("not an image") };
    assert_eq!(image.layers().len(), 1);
}

#[test]
fn long_chains_are_folded() {
    const GENERATIONS: usize = 150;
    let mut memory = fresh();
    let mut model = vec![0; PAGES];
    let mut relatives = Vec::new();
    for generation in 0..GENERATIONS {
        for page in [generation % PAGES, generation * 7 % PAGES] {
            let value = u8::try_from(generation % 250 + 1).unwrap();
            poke(&memory, page, value);
            model[page] = value;
        }
        let child = fork(&mut memory);
        let Backing::Image(image) = &child.backing else { panic!("not an image") };
        assert!(image.layers().len() <= 40, "{} layers", image.layers().len());
        assert_eq!(content(&child), model);
        relatives.push((std::mem::replace(&mut memory, child), model.clone()));
    }
    assert!(relatives.iter().all(|(memory, model)| &content(memory) == model));
}
