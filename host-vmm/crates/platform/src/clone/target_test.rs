use types::CopySpec;

use super::*;

fn incoming(id: u128, source: &str, progress: Progress, last_contact: Instant) -> (Uuid, Arc<Incoming>) {
    let slots = vec![CopySpec { id: Uuid::from_u128(id), index: 1 }];
    let order = Order { source: source.into(), slots, total: 1, lazy: false };
    let incoming = Incoming {
        id: Uuid::from_u128(id),
        order,
        progress: Mutex::new(progress),
        described: Mutex::default(),
        last_contact: Mutex::new(last_contact),
        received_bytes: AtomicU64::new(0),
    };
    (incoming.id, Arc::new(incoming))
}

#[test]
fn no_member_can_have_the_commit_of_another_one_be_forgotten() {
    let clones = Clones::default();
    let (last_contact, first) = (Instant::now(), Uuid::from_u128(1));
    let aborted = || Progress::Aborted("its source has called it off".into());
    lock(&clones.by_id).extend([incoming(1, "north", Progress::Committed(Vec::new()), last_contact)]);
    lock(&clones.by_id).extend((2..5000).map(|id| incoming(id, "south", aborted(), last_contact)));
    assert_eq!(clones.decided_of("south"), 4998);
    clones.sweep();
    assert_eq!(clones.decided_of("south"), MAX_REMEMBERED);
    assert_eq!(clones.find(first).unwrap().progress().stage(), Stage::Committed { vms: Vec::new() });
}

#[test]
fn no_clones_are_taken_where_too_many_would_have_to_be_remembered() {
    let (clones, last_contact) = (Clones::default(), Instant::now());
    let committed =
        |id: u128| incoming(id, &format!("source-{id}"), Progress::Committed(Vec::new()), last_contact);
    let all = 0..MAX_IN_ALL as u128;
    lock(&clones.by_id).extend(all.clone().skip(1).map(committed));
    assert!(check_count(&lock(&clones.by_id)).is_ok());
    lock(&clones.by_id).extend([committed(0)]);
    clones.sweep();
    assert!(all.clone().all(|id| clones.find(Uuid::from_u128(id)).is_ok()), "their sources may still ask");
    assert!(matches!(check_count(&lock(&clones.by_id)), Err(Error::TooManyRemembered)));
    // When they don't any more, a part of them is forgotten.
    clones.evict(last_contact + 5 * LEASE);
    assert!(check_count(&lock(&clones.by_id)).is_ok());
}

#[test]
fn nobody_waits_for_a_commit_that_takes_long() {
    let clones = Clones::default();
    let long_ago = Instant::now().checked_sub(2 * LEASE).unwrap();
    lock(&clones.by_id).extend([incoming(1, "north", Progress::Committing, long_ago)]);
    clones.sweep();
    let incoming = clones.find(Uuid::from_u128(1)).unwrap();
    assert!(!incoming.is_decided() && incoming.is_at_work());
    // Whoever commits goes by what it finds then: that is not undone beside it.
    assert_eq!(incoming.abort("called off"), Stage::Preparing);
    clones.close();
    assert!(matches!(*incoming.progress(), Progress::Committing));
}
