//! Platforms as they are: their sizes, and what copies take of them.

use std::collections::BTreeMap;

use cluster::{
    member::{Load, Member, Ready},
    placement::{charge_bytes, count},
};
use fastrand::Rng;
use types::VmShape;
use uuid::Uuid;

/// What VMs are built as.
pub(crate) const SHAPES: [VmShape; 3] = [
    VmShape { ram_bytes: 512 << 20, vcpus: 1 },
    VmShape { ram_bytes: 1 << 30, vcpus: 1 },
    VmShape { ram_bytes: 2 << 30, vcpus: 2 },
];

/// What platforms are built as: processors, nodes, memory in GiB, and how many of 20 are so.
const SIZES: [(u32, u32, u64, usize); 3] = [(8, 8, 16, 10), (16, 16, 32, 7), (32, 48, 128, 3)];

/// What of its memory a host needs for itself, as a divisor.
const HOST_PART: u64 = 16;

/// Warm VMs of each shape: more are made as soon as some are taken.
const READY: u32 = 4;

/// Images of which a platform tells others.
const IMAGES: usize = 16;

/// A platform without VMs, of a size that chance says.
pub(crate) fn platform(at: u32, rng: &mut Rng) -> Member {
    let sizes: Vec<_> = SIZES.iter().flat_map(|size| std::iter::repeat_n(size, size.3)).collect();
    let &(processors, max_vms, memory_gib, _) = sizes[rng.usize(..sizes.len())];
    let memory_bytes = memory_gib << 30;
    let load = Load {
        max_vms,
        processors,
        memory_bytes,
        memory_available_bytes: memory_bytes - memory_bytes / HOST_PART,
        ready: SHAPES.map(|config| Ready { config, shells: READY }).to_vec(),
        ..Load::default()
    };
    Member {
        name: format!("p{at:05}"),
        cluster: "main".to_owned(),
        address: ([127, 0, 0, 1], 7000).into(),
        labels: BTreeMap::new(),
        cpu_profile: String::new(),
        load,
    }
}

/// How many of so many copies a platform has room for.
pub(crate) fn room(load: &Load, config: VmShape, copies: u32, on_source: bool) -> u32 {
    let free = load.max_vms.saturating_sub(load.vms).min(copies);
    let fits = |copies: &u32| charge_bytes(config, *copies, on_source) <= load.memory_available_bytes;
    (1..=free).rev().find(fits).unwrap_or(0)
}

/// Enters copies, and the images that they come with.
pub(crate) fn enter(load: &mut Load, config: VmShape, copies: u32, on_source: bool, images: &[Uuid]) {
    count(load, config, copies, on_source);
    load.images.retain(|image| !images.contains(image));
    load.images.extend_from_slice(images);
    let too_many = load.images.len().saturating_sub(IMAGES);
    load.images.drain(..too_many);
    press(load);
}

/// Takes away one of so many copies that came with one image; the image goes with the last one.
pub(crate) fn leave(load: &mut Load, config: VmShape, copies: u32, on_source: bool) {
    load.vms -= 1;
    let charge_bytes = |copies| charge_bytes(config, copies, on_source);
    load.memory_available_bytes += charge_bytes(copies) - charge_bytes(copies - 1);
    press(load);
}

/// Lets something wait where there are more VMs than processors, or where less than a tenth of the memory is
/// left.
fn press(load: &mut Load) {
    let part = |part: u64, whole: u64| u32::try_from(part * 1000 / whole.max(1)).unwrap_or(1000);
    load.cpu_pressure_permille = part(load.vms.saturating_sub(load.processors).into(), load.vms.into());
    let tenth = load.memory_bytes / 10;
    load.memory_pressure_permille =
        part(tenth.saturating_sub(load.memory_available_bytes) >> 10, tenth >> 10);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_entered_and_left_has_left_nothing() {
        let mut rng = Rng::with_seed(1);
        let Load { memory_available_bytes, max_vms, .. } = platform(0, &mut rng).load;
        for on_source in [true, false] {
            let mut load = platform(0, &mut Rng::with_seed(1)).load;
            enter(&mut load, SHAPES[2], 3, on_source, &[Uuid::from_u128(1)]);
            let image_bytes = if on_source { 0 } else { SHAPES[2].ram_bytes };
            assert_eq!(load.memory_available_bytes + image_bytes + 3 * (128 << 20), memory_available_bytes);
            assert_eq!((load.vms, room(&load, SHAPES[0], 1000, true)), (3, max_vms - 3));
            for copies in [3, 2, 1] {
                leave(&mut load, SHAPES[2], copies, on_source);
            }
            assert_eq!((load.vms, load.memory_available_bytes), (0, memory_available_bytes));
        }
    }

    #[test]
    fn pressure_comes_with_the_last_memory_and_without_processors() {
        let mut load = Load {
            processors: 2,
            memory_bytes: 10 << 30,
            memory_available_bytes: 2 << 30,
            ..Load::default()
        };
        let pressure = |load: &Load| (load.cpu_pressure_permille, load.memory_pressure_permille);
        enter(&mut load, SHAPES[2], 2, true, &[]);
        assert_eq!(pressure(&load), (0, 0));
        enter(&mut load, SHAPES[1], 2, false, &[]);
        assert_eq!(pressure(&load), (500, 375));
    }
}
