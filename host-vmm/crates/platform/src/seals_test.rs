//! Tests of [`super`].

use vmm::memory::Mapping;

use super::*;

const BYTES: u64 = 4096;

fn file() -> Arc<File> {
    Arc::new(memory::unsealed("test", BYTES).unwrap())
}

fn mapped(file: &File) -> Mapping {
    let mapping = Mapping::reserve(4096).unwrap();
    mapping.map_shared(file).unwrap();
    mapping
}

fn frozen(files: &[&Arc<File>], unsealed: &Unsealed) -> Frozen {
    let files = files.iter().copied().cloned().collect();
    Frozen { files, parent: Uuid::nil(), ram_bytes: BYTES, unsealed: unsealed.clone() }
}

/// Has all that waits be tried now, and says of how many images it was decided what becomes of them.
fn decided(seals: &Seals, unsealed: &Unsealed) -> usize {
    seals.work(Some(unsealed)).len()
}

#[test]
fn an_image_is_sealed_once_all_of_its_files_are() {
    let (seals, unsealed) = (Seals::default(), Unsealed::default());
    let [ram, delta, unused] = [(); 3].map(|()| file());
    let writer = mapped(&ram);
    let [first, second, third] = [(); 3].map(|()| Arc::default());
    seals.add(&first, frozen(&[&ram], &unsealed));
    seals.add(&second, frozen(&[&ram, &delta, &unused, &ram], &unsealed));
    assert_eq!(unsealed.0.load(Ordering::Relaxed), 5);
    assert_eq!(decided(&seals, &unsealed), 0);
    assert!(memory::is_sealed(&delta).unwrap() && memory::is_sealed(&unused).unwrap());
    assert_eq!(unsealed.0.load(Ordering::Relaxed), 1, "both wait for one file");
    assert!(second.wait(Duration::ZERO).unwrap_err().contains("try again"));
    drop(writer);
    assert_eq!(decided(&seals, &unsealed), 2);
    assert!(first.is_sealed() && second.is_sealed());
    seals.add(&third, frozen(&[&ram, &delta], &unsealed));
    assert_eq!(unsealed.0.load(Ordering::Relaxed), 0, "both are sealed");
    assert_eq!(decided(&seals, &unsealed), 1, "nothing of it is left to be sealed");
    assert!(third.wait(Duration::ZERO).is_ok());
    assert_eq!(unsealed.0.load(Ordering::Relaxed), 0);
    assert!(lock(&seals.queue).files.is_empty());
}

#[test]
fn a_file_that_can_never_be_sealed_is_refused_at_once_and_one_that_is_mapped_in_the_end() {
    let (seals, unsealed) = (Seals::default(), Unsealed::default());
    let none = Arc::new(File::open("/dev/null").unwrap());
    let (seal, other) = (Arc::default(), Arc::default());
    seals.add(&seal, frozen(&[&none], &unsealed));
    let decided = seals.work(Some(&unsealed));
    assert!(decided[0].refused.is_some() && seal.wait(Duration::ZERO).is_err() && !seal.is_sealed());

    let ram = file();
    let _writer = mapped(&ram);
    seals.add(&other, frozen(&[&ram], &unsealed));
    assert!(seals.work(Some(&unsealed)).is_empty());
    // As if it had been tried for long.
    let long_ago = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
    lock(&seals.queue).files.values_mut().for_each(|file| {
        file.retry = SealRetry::new(long_ago, BYTES);
        assert!((0..1000).all(|_| file.retry.refused(long_ago).is_some()));
    });
    let decided = seals.work(Some(&unsealed));
    assert!(decided.len() == 1 && decided[0].refused.as_ref().unwrap().contains("EBUSY"));
    assert!(other.wait(Duration::ZERO).is_err());
    assert_eq!(unsealed.0.load(Ordering::Relaxed), 0);
}

#[test]
fn what_nobody_shares_any_more_is_let_go_of() {
    let (seals, unsealed) = (Seals::default(), Unsealed::default());
    let ram = file();
    let _writer = mapped(&ram);
    let seal = Arc::default();
    seals.add(&seal, frozen(&[&ram], &unsealed));
    assert_eq!(decided(&seals, &unsealed), 0);
    drop(seal);
    assert_eq!(decided(&seals, &unsealed), 0);
    assert!(lock(&seals.queue).files.is_empty() && Arc::strong_count(&ram) == 1);
}

#[test]
fn whoever_waits_for_a_seal_hears_of_a_platforms_end() {
    let (seals, unsealed) = (Seals::default(), Unsealed::default());
    let ram = file();
    let _writer = mapped(&ram);
    let [arrived, waiting] = [(); 2].map(|()| Arc::default());
    seals.add(&waiting, frozen(&[&ram], &unsealed));
    assert_eq!(decided(&seals, &unsealed), 0);
    seals.add(&arrived, frozen(&[&ram], &unsealed));
    seals.close();
    for seal in [arrived, waiting] {
        assert!(seal.wait(Duration::from_secs(60)).unwrap_err().contains("stopped"));
    }
    assert!(!seals.wait(), "the thread ends");
    let late = Arc::default();
    seals.add(&late, frozen(&[&ram], &unsealed));
    assert!(late.wait(Duration::from_secs(60)).is_err());
}

#[test]
fn a_vm_with_many_files_that_wait_is_told_from_others() {
    let unsealed = Unsealed::default();
    let counted = unsealed.count(MAX_UNSEALED - 1);
    assert!(!unsealed.are_many());
    let one_more = unsealed.count(1);
    assert!(unsealed.are_many());
    drop((counted, one_more));
    assert!(!unsealed.are_many());
}
