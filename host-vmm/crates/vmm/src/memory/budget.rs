//! A budget for memory that is allocated on behalf of files or other platforms: images, and their
//! descriptions.
//!
//! All of it is reserved before any of it is allocated: a description of some hundred KiB can stand for
//! hundreds of GiB. A [`Grant`] gives its share back when it is dropped; a share that was passed on to a file
//! is given back when the last reference to that file in this process is dropped.

use std::{
    fmt,
    fs::File,
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, Weak},
};

use base::{
    host_memory::{self, HostMemory},
    sync::lock,
};

use super::is_frozen;

/// Bytes of a block that `stat` counts.
const BLOCK_BYTES: u64 = 512;

/// Default budget as a fraction of the host's memory: half of it, since VMs that run from such images need
/// memory of their own.
const DEFAULT_PART: u64 = 2;

/// Fraction of the host's memory that stays available in any case, for pages that running VMs write to next.
const RESERVED_PART: u64 = 16;

/// Why there is no memory for something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The budget has not so much left.
    #[error(
        "{wanted} bytes of memory for an image do not fit: images from elsewhere may take {limit} bytes here, and {held} of them are taken; remove \
         images (`host-vmm image rm`), or raise image_memory (`--image-memory`)"
    )]
    Budget {
        /// How much was asked for.
        wanted: u64,
        /// How much is granted to others.
        held: u64,
        /// How much there is in all.
        limit: u64,
    },
    /// The host has not so much left.
    #[error(
        "{wanted} bytes of memory for an image do not fit: this host has {available} bytes available, of which {promised} are promised to other images \
         and {reserved} stay free; stop VMs, remove images, or use another host"
    )]
    Host {
        /// How much was asked for.
        wanted: u64,
        /// What the host has available.
        available: u64,
        /// What was granted to others, and is not there yet.
        promised: u64,
        /// What is to stay available.
        reserved: u64,
    },
    /// The host does not say how much it has.
    #[error("can't find out how much memory is available for an image")]
    Unknown(#[from] host_memory::Error),
}

/// A limit for the sum of all grants. Clones of it share the limit.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Inner>);

struct Inner {
    limit: u64,
    reserved: u64,
    available: Box<dyn Fn() -> Result<u64, host_memory::Error> + Send + Sync>,
    granted: Mutex<Granted>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limit, reserved, granted, .. } = self;
        let mut fields = f.debug_struct("Budget");
        fields
            .field("limit", limit)
            .field("reserved", reserved)
            .field("granted", granted)
            .finish_non_exhaustive()
    }
}

/// What is granted, in bytes.
#[derive(Debug, Default)]
struct Granted {
    /// To those who have a grant.
    here: u64,
    /// To files: each may take so much.
    files: Vec<(Weak<File>, u64)>,
}

/// A reservation of memory. Dropping it gives the memory back.
#[derive(Debug)]
#[must_use]
pub struct Grant {
    budget: Budget,
    bytes: u64,
}

impl Budget {
    /// A budget of so many bytes, or of half of this host's memory. A sixteenth of that stays available in
    /// any case.
    ///
    /// # Errors
    /// [`Error::Unknown`].
    pub fn of_this_host(limit: Option<u64>) -> Result<Self, Error> {
        let total = HostMemory::read()?.total;
        let available = || HostMemory::read().map(|memory| memory.available);
        Ok(Self::new(limit.unwrap_or(total / DEFAULT_PART), total / RESERVED_PART, available))
    }

    /// A budget of `limit` bytes, on a host that has `available` bytes at present, of which so many stay so.
    pub fn new(
        limit: u64,
        reserved: u64,
        available: impl Fn() -> Result<u64, host_memory::Error> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner { limit, reserved, available: Box::new(available), granted: Mutex::default() }))
    }

    /// Reserves `wanted` bytes, where budget and host have them. For 0 bytes neither is asked.
    ///
    /// # Errors
    /// [`Error`].
    pub fn reserve(&self, wanted: u64) -> Result<Grant, Error> {
        let Inner { limit, reserved, available, granted } = &*self.0;
        let mut granted = lock(granted);
        if wanted > 0 {
            let (held, promised) = granted.sum();
            if held.checked_add(wanted).is_none_or(|held| held > *limit) {
                return Err(Error::Budget { wanted, held, limit: *limit });
            }
            let available = available()?;
            if promised.saturating_add(*reserved).checked_add(wanted).is_none_or(|taken| taken > available) {
                return Err(Error::Host { wanted, available, promised, reserved: *reserved });
            }
        }
        granted.here = granted.here.saturating_add(wanted);
        Ok(Grant { budget: self.clone(), bytes: wanted })
    }

    /// How much can be granted in all, in bytes.
    pub fn limit(&self) -> u64 {
        self.0.limit
    }

    /// How much is granted, in bytes.
    pub fn held(&self) -> u64 {
        lock(&self.0.granted).sum().0
    }
}

impl Granted {
    /// Sum of all grants, and how much of it is not allocated yet. An immutable file counts as what it takes.
    fn sum(&mut self) -> (u64, u64) {
        self.files.retain(|(file, _)| file.strong_count() > 0);
        let mut sum = (self.here, self.here);
        for (file, most) in self.files.iter().filter_map(|(file, most)| Some((file.upgrade()?, *most))) {
            // A file that can't be looked at counts as what it may become.
            let taken = file.metadata().map_or(0, |metadata| metadata.blocks().saturating_mul(BLOCK_BYTES));
            let (held, missing) = if is_frozen(&file).unwrap_or(false) {
                (taken, 0)
            } else {
                (most, most.saturating_sub(taken))
            };
            sum = (sum.0.saturating_add(held), sum.1.saturating_add(missing));
        }
        sum
    }
}

impl Grant {
    /// Passes a part of it on to a file that may grow to `bytes`: that part is given back with the last
    /// reference to the file.
    pub fn pass_on(&mut self, file: &Arc<File>, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        let mut granted = lock(&self.budget.0.granted);
        granted.here = granted.here.saturating_sub(bytes);
        granted.files.push((Arc::downgrade(file), bytes));
        drop(granted);
        self.bytes -= bytes;
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let mut granted = lock(&self.budget.0.granted);
        granted.here = granted.here.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory::{seal, unsealed};

    const MIB: u64 = 1 << 20;

    fn budget(limit: u64, available: u64) -> Budget {
        Budget::new(limit, MIB, move || Ok(available))
    }

    #[test]
    fn all_together_get_no_more_than_there_is_and_what_is_given_back_is_there_again() {
        let budget = budget(10 * MIB, 100 * MIB);
        let (one, other) = (budget.reserve(6 * MIB).unwrap(), budget.reserve(4 * MIB).unwrap());
        let Err(Error::Budget { wanted: 1, held, limit }) = budget.reserve(1) else {
            panic!("it is all taken")
        };
        assert_eq!((held, limit), (10 * MIB, 10 * MIB));
        drop(budget.reserve(0).unwrap());
        drop(one);
        assert!(matches!(budget.reserve(u64::MAX), Err(Error::Budget { .. })));
        assert!(matches!(budget.reserve(6 * MIB + 1), Err(Error::Budget { .. })));
        drop(budget.reserve(6 * MIB).unwrap());
        drop(other);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn what_the_host_does_not_have_is_not_granted() {
        let budget = budget(1000 * MIB, 10 * MIB);
        // What is promised is not gone from the host yet; a MiB stays.
        let promised = budget.reserve(5 * MIB).unwrap();
        let refused = budget.reserve(5 * MIB).unwrap_err();
        assert!(
            matches!(refused, Error::Host { promised: p, reserved: MIB, .. } if p == 5 * MIB),
            "{refused}"
        );
        drop(budget.reserve(4 * MIB).unwrap());
        drop(promised);
        drop(budget.reserve(9 * MIB).unwrap());
        let unknown = Budget::new(MIB, 0, || Err(host_memory::Error::Missing("MemAvailable")));
        assert!(matches!(unknown.reserve(1), Err(Error::Unknown(_))));
    }

    #[test]
    fn a_file_has_its_share_until_nobody_has_it() {
        let budget = budget(10 * MIB, 10 * MIB);
        let file = Arc::new(unsealed("test", 8 * MIB).unwrap());
        let mut grant = budget.reserve(9 * MIB).unwrap();
        grant.pass_on(&file, 8 * MIB);
        drop(grant);
        assert_eq!(budget.held(), 8 * MIB, "it may still be filled");
        // What is there by now is what the host tells of.
        assert!(matches!(budget.reserve(2 * MIB), Err(Error::Host { promised, .. }) if promised == 8 * MIB));
        file.write_all_at(&vec![1; 2 << 20], 0).unwrap();
        drop(budget.reserve(2 * MIB).unwrap());
        seal("test", &file).unwrap();
        assert_eq!(budget.held(), 2 * MIB, "it can't grow any more");
        let other = Arc::clone(&file);
        drop(file);
        assert_eq!(budget.held(), 2 * MIB);
        drop(other);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn this_host_has_a_budget() {
        let budget = Budget::of_this_host(None).unwrap();
        assert!(matches!(budget.reserve(1 << 60), Err(Error::Budget { .. })));
        let budget = Budget::of_this_host(Some(u64::MAX)).unwrap();
        assert!(matches!(budget.reserve(1 << 60), Err(Error::Host { .. })));
    }
}
