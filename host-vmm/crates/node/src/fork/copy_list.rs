//! The list of a fork's copies, and where they went, for the parent's guest to know.
//!
//! The platform knows it, and writes it down where all sides meet, before a copy arrives. Once copies run,
//! they can change it. So the parent copies it out once, before its commit, and tells its guest of all
//! copies, or, where one can't be right, of none.

use vmfork_abi::{ListedCopy, Location, is_vm_type, padded_text};

use super::rendezvous::{self, Rendezvous};

/// The copies of a fork that makes `count`, lowest index first; none where something else was written than
/// the platform writes.
///
/// # Errors
/// As [`Rendezvous::listed`].
pub(super) fn take(rendezvous: &Rendezvous, count: u32) -> Result<Vec<ListedCopy>, rendezvous::Error> {
    let copies: Vec<_> = (1..=count).map(|index| rendezvous.listed(index)).collect::<Result<_, _>>()?;
    let Some(bad) = (1..).zip(&copies).position(|(index, copy)| !is_possible(index, copy)) else {
        return Ok(copies);
    };
    tracing::warn!(
        index = bad + 1,
        "it is not known where the copies of a fork are: something else was written there"
    );
    Ok(Vec::new())
}

/// Whether this can be what a platform says of copy `index`.
fn is_possible(index: u32, copy: &ListedCopy) -> bool {
    let is_name = |name: &str| name.is_empty() || is_vm_type(name);
    copy.index == index
        && copy.vm_id != [0; 16]
        && Location::from_number(copy.location).is_some()
        && padded_text(&copy.platform).is_some_and(is_name)
        && copy.reserved == [0; 8]
}

#[cfg(test)]
mod tests {
    use std::{array, os::unix::fs::FileExt};

    use proptest::prelude::*;
    use vmfork_abi::pad_text;

    use super::{super::rendezvous::COPIES, *};

    fn good(index: u32) -> ListedCopy {
        let platform = pad_text("north").unwrap();
        ListedCopy { vm_id: [1; 16], index, location: Location::Remote.number(), platform, reserved: [0; 8] }
    }

    fn taken(copies: &[ListedCopy], count: u32) -> Vec<ListedCopy> {
        let rendezvous = Rendezvous::new().unwrap();
        copies.iter().for_each(|copy| rendezvous.list(copy).unwrap());
        take(&rendezvous, count).unwrap()
    }

    /// What is taken where somebody else has written these bytes in place of the first copies.
    fn scribbled(bytes: &[u8], count: u32) -> Vec<ListedCopy> {
        let rendezvous = Rendezvous::new().unwrap();
        rendezvous.file().write_all_at(bytes, COPIES as u64).unwrap();
        take(&rendezvous, count).unwrap()
    }

    #[test]
    fn what_the_platform_has_listed_is_told() {
        let alone = ListedCopy { platform: [0; 32], location: Location::Local.number(), ..good(2) };
        let copies = [good(1), alone, good(3)];
        assert_eq!(taken(&copies, 3), copies);
        assert_eq!(taken(&copies, 4), [], "one is missing");
    }

    #[test]
    fn what_no_platform_would_write_is_not_told() {
        for bad in [
            ListedCopy { vm_id: [0; 16], ..good(2) },
            ListedCopy { location: 0, ..good(2) },
            ListedCopy { location: 3, ..good(2) },
            ListedCopy { platform: [0xff; 32], ..good(2) },
            ListedCopy { platform: pad_text("../x").unwrap(), ..good(2) },
            ListedCopy { platform: array::from_fn(|at| if at == 1 { 0 } else { b'a' }), ..good(2) },
            ListedCopy { reserved: [1; 8], ..good(2) },
            good(1),
            good(3),
        ] {
            assert_eq!(scribbled(&[good(1).to_bytes(), bad.to_bytes()].concat(), 2), [], "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_scribbled_the_guest_is_told_of_possible_copies_only(
            changes in proptest::collection::vec((0..128_usize, any::<u8>()), 0..4),
        ) {
            let mut bytes = [good(1).to_bytes(), good(2).to_bytes()].concat();
            changes.iter().for_each(|&(at, byte)| bytes[at] = byte);
            let told = scribbled(&bytes, 2);
            prop_assert!(told.is_empty() || told.len() == 2);
            for (index, copy) in (1..).zip(told) {
                prop_assert!(copy.index == index && (1..=2).contains(&copy.location) && copy.vm_id != [0; 16]);
                prop_assert!(padded_text(&copy.platform).is_some_and(|name| !name.contains(['/', '\n', '\x1b'])));
            }
        }
    }
}
