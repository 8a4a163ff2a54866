use std::thread;

use super::*;

const TIMEOUT: Duration = Duration::from_secs(10);

fn pair(count: u32) -> (Rendezvous, Rendezvous) {
    let parent = Rendezvous::new().unwrap().with_children(count);
    let child = Rendezvous::open(parent.file().try_clone().unwrap()).unwrap().with_children(count);
    (parent, child)
}

#[test]
fn a_child_gets_the_state_and_runs_when_all_are_there() {
    for count in [1, 3] {
        let (parent, _) = pair(count);
        thread::scope(|scope| {
            for _ in 0..count {
                let child =
                    Rendezvous::open(parent.file().try_clone().unwrap()).unwrap().with_children(count);
                scope.spawn(move || {
                    assert_eq!(child.wait_state(|| false).unwrap(), b"state");
                    child.arrive(count).unwrap();
                    child.wait_commit(|| false).unwrap();
                });
            }
            parent.publish(b"state").unwrap();
            parent.wait_arrivals(count, TIMEOUT, || false).unwrap();
            parent.commit().unwrap();
        });
        assert!(!parent.abort().unwrap(), "the children run");
    }
}

#[test]
fn copies_are_where_they_were_listed_last() {
    let (parent, platform) = pair(1);
    parent.publish(b"state").unwrap();
    let copy = |index, location| ListedCopy { vm_id: [7; 16], index, location, ..Default::default() };
    for (index, location) in [(1, 1), (2, 2), (1, 2), (MAX_CHILDREN, 1)] {
        platform.list(&copy(index, location)).unwrap();
    }
    for (index, location) in [(1, 2), (2, 2), (MAX_CHILDREN, 1)] {
        assert_eq!(parent.listed(index).unwrap(), copy(index, location));
    }
    assert_eq!(parent.listed(3).unwrap(), ListedCopy::default());
    for index in [0, MAX_CHILDREN + 1, u32::MAX] {
        assert!(matches!(platform.list(&copy(index, 1)), Err(Error::NoCopy(bad)) if bad == index));
        assert!(matches!(parent.listed(index), Err(Error::NoCopy(bad)) if bad == index));
    }
    assert_eq!(platform.wait_state(|| true).unwrap(), b"state");
}

#[test]
fn what_was_called_off_does_not_run() {
    let (parent, child) = pair(1);
    assert!(!parent.is_aborted() && child.abort().unwrap() && parent.is_aborted());
    assert!(matches!(parent.publish(b""), Err(Error::Aborted)));
    assert!(matches!(child.wait_state(|| false), Err(Error::Aborted)));
    let (parent, child) = pair(1);
    parent.publish(b"").unwrap();
    assert!(parent.abort().unwrap());
    assert!(matches!(child.wait_commit(|| false), Err(Error::Aborted)));
    assert!(matches!(parent.commit(), Err(Error::Aborted)));
}

#[test]
fn nobody_waits_for_those_that_do_not_come() {
    let (parent, child) = pair(2);
    child.arrive(2).unwrap();
    assert!(matches!(parent.wait_arrivals(2, Duration::from_millis(1), || false), Err(Error::Gone)));
    assert!(matches!(child.wait_state(|| true), Err(Error::Gone)));
    child.fail().unwrap();
    assert!(matches!(parent.wait_arrivals(2, TIMEOUT, || false), Err(Error::ChildFailed)));
}

#[test]
fn nobody_commits_while_the_platform_holds_the_fork() {
    let (parent, platform) = pair(1);
    let hold = platform.hold().unwrap();
    parent.publish(b"state").unwrap();
    platform.arrive(1).unwrap();
    let wait = |limit| parent.wait_arrivals(1, limit, || false);
    assert!(matches!(wait(Duration::from_millis(1)), Err(Error::Gone)));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| wait(TIMEOUT));
        assert_eq!(platform.wait_state(|| false).unwrap(), b"state");
        drop(hold);
        waiting.join().unwrap().unwrap();
    });
    let hold = platform.hold().unwrap();
    platform.fail().unwrap();
    drop(hold);
    assert!(matches!(wait(TIMEOUT), Err(Error::ChildFailed)));
}

/// Writes what it can that is none of its business.
fn scribble(copy: &Rendezvous, phase: u32) {
    for (at, value) in [(PHASE, phase), (ARRIVALS, FAILED), (HELD, 1), (LENGTH, 3), (PARENT_CPU, 0)] {
        copy.word(at).unwrap().store(value, Ordering::Release);
    }
    copy.mapping.write(STATE, b"another").unwrap();
    copy.list(&ListedCopy { index: 1, ..Default::default() }).unwrap();
    copy.wake(PHASE).unwrap();
}

#[test]
fn a_copy_that_runs_changes_nothing_for_its_siblings_and_for_what_is_kept() {
    for phase in [OPEN, PUBLISHED, DECIDED, 77] {
        let (parent, platform) = pair(2);
        let [first, sibling] =
            [(); 2].map(|()| Rendezvous::open(parent.file().try_clone().unwrap()).unwrap());
        let hold = platform.hold().unwrap();
        parent.publish(b"state").unwrap();
        for child in [&first, &sibling] {
            assert_eq!(child.wait_state(|| false).unwrap(), b"state");
            child.arrive(2).unwrap();
        }
        let kept = platform.wait_state(|| false).unwrap();
        drop(hold);
        parent.wait_arrivals(2, TIMEOUT, || false).unwrap();
        parent.commit().unwrap();
        first.wait_commit(|| false).unwrap();
        // It calls the fork off, as far as that is in its hands, before its sibling has looked.
        scribble(&first, phase);
        assert!(!first.abort().unwrap());
        scribble(&first, phase);
        sibling.wait_commit(|| false).unwrap();
        assert!(!platform.abort().unwrap() && !parent.abort().unwrap(), "the children run");
        assert_eq!(kept, b"state");
    }
}

#[test]
fn a_parent_that_calls_a_fork_off_can_not_take_it_back() {
    for phase in [OPEN, PUBLISHED, DECIDED, 77] {
        let (parent, child) = pair(1);
        parent.publish(b"state").unwrap();
        child.wait_state(|| false).unwrap();
        assert!(parent.abort().unwrap());
        scribble(&parent, phase);
        assert!(parent.commit().is_err());
        scribble(&parent, phase);
        assert!(matches!(child.wait_commit(|| false), Err(Error::Aborted)));
        assert!(child.abort().unwrap());
    }
}

#[test]
fn forged_words_do_no_harm() {
    let (parent, child) = pair(1);
    parent.publish(b"").unwrap();
    parent.word(LENGTH).unwrap().store(u32::MAX, Ordering::Release);
    assert!(matches!(child.wait_state(|| false), Err(Error::TooLarge(_))));
    for phase in [DECIDED, 77] {
        parent.word(PHASE).unwrap().store(phase, Ordering::Release);
        assert!(matches!(child.wait_state(|| false), Err(Error::Aborted)));
        assert!(matches!(child.wait_commit(|| true), Err(Error::Gone)), "nothing is decided");
    }
}

#[test]
fn only_what_can_not_shrink_is_opened() {
    let file = memory::unsealed("test", BYTES as u64).unwrap();
    assert!(Rendezvous::open(file).is_err());
    let file = memory::unresizable("test", 4096).unwrap();
    assert!(Rendezvous::open(file).is_err());
}
