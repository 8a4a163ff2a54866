//! A shell does once what it will have to do fast.
//!
//! The first time that a process runs a piece of code, or uses a page of its heap or stack, costs it a page fault: 4 to 10 us each, and
//! 150 us in all between a child's order and its run (measured). So a shell that has nothing else to do goes through the motions.

use std::{fs, slice, sync::Arc, time::Duration};

use crate::{
    capsule,
    fork::rendezvous::{self, Rendezvous},
    machine::Shell,
    memory::{self, Image, Layer},
};

/// What can go wrong with it. A shell is as good without it, only slower.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("can't find this program's code")]
    Maps(#[from] std::io::Error),
    #[error("can't touch this program's code, or make an image")]
    Memory(#[from] memory::Error),
    #[error("can't meet itself")]
    Rendezvous(#[from] rendezvous::Error),
    #[error("can't pack and unpack a state")]
    Capsule(#[from] capsule::Error),
}

/// Hands a state over to itself.
pub(super) fn rehearse(shell: &Shell) -> Result<(), Error> {
    touch_code()?;
    let Some(state) = shell.fresh_state() else { return Ok(()) };
    let file = Arc::new(memory::sealed("vm-rehearsal", &[0; 4096])?);
    let image = Image::new(1, vec![Arc::new(Layer::whole(Arc::clone(&file), 1))])?;
    let parent = Rendezvous::new()?;
    parent.publish(&capsule::pack(&state, &image, slice::from_ref(&file))?)?;
    let child = Rendezvous::open(parent.file().try_clone()?)?;
    capsule::unpack(&child.wait_state(|| true)?, &[file])?;
    child.arrive()?;
    parent.wait_arrivals(1, Duration::ZERO, || true)?;
    parent.commit()?;
    child.wait_commit(|| true)?;
    Ok(())
}

/// Makes this program's code and constants present in its page tables: they are in memory anyhow, since other nodes run them.
fn touch_code() -> Result<(), Error> {
    for line in fs::read_to_string("/proc/self/maps")?.lines() {
        let mut words = line.split_ascii_whitespace();
        let (range, access) = (words.next(), words.next());
        let is_file = words.next_back().is_some_and(|path| path.starts_with('/'));
        if let (Some(range), Some("r-xp" | "r--p"), true) = (range, access, is_file) {
            let ends = range.split_once('-').map(|(start, end)| [start, end].map(|end| usize::from_str_radix(end, 16)));
            if let Some([Ok(start), Ok(end)]) = ends {
                memory::touch(start..end)?;
            }
        }
    }
    Ok(())
}
