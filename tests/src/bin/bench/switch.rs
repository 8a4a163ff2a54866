//! Ways in which a VM whose memory is a file of its own can go on as a private view of that file, in a
//! straight line.
//!
//! What they take decides the pause of a booted VM at its first fork. `host-vmm` has it go on in a spare VM.

use std::time::{Duration, Instant};

use anyhow::Result;
use kvm_ioctls::Kvm;

use crate::floor::{Addresses, BlankVm, Image, PRIVATE, Range};

/// A way to switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// The private view is mapped over what was mapped before.
    Over,
    /// What was mapped before is moved to other addresses, and the private view is mapped in its place.
    Aside,
    /// The VM goes on in another one that stands ready.
    Spare,
}

impl Way {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Over, Self::Aside, Self::Spare];

    /// Name in the figures.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Over => "over",
            Self::Aside => "aside",
            Self::Spare => "spare",
        }
    }
}

/// A VM of so much memory, of which it has written to so much, is switched: the time from its last exit to
/// its next.
pub(crate) fn switch(kvm: &Kvm, way: Way, image: &Image, written_bytes: usize) -> Result<Duration> {
    let mut parent = BlankVm::new(kvm, image.bytes, Addresses::Empty)?;
    parent.write(image, written_bytes)?;
    let mut spare = BlankVm::new(kvm, image.bytes, Addresses::Empty)?;
    spare.warm_up()?;
    let aside = Range::reserve(image.bytes)?;
    let started = Instant::now();
    parent.complete_exit()?;
    let next = match way {
        Way::Over => {
            parent.memory.map(&image.file, PRIVATE)?;
            &mut parent
        }
        Way::Aside => {
            parent.memory.move_to(&aside)?;
            parent.memory.map(&image.file, PRIVATE)?;
            &mut parent
        }
        Way::Spare => {
            spare.memory.map(&image.file, PRIVATE)?;
            spare.take_over(&parent)?;
            &mut spare
        }
    };
    next.run()?;
    Ok(started.elapsed())
}
