//! Capsules for tests.

use std::sync::Arc;

use types::{PAGE_BYTES, VmIdentity, VmShape};
use uuid::Uuid;
use vmm::{
    devices::ControlPageState,
    machine::MachineState,
    memory::{self, Image, Layer, Run},
};

use crate::{Capsule, ImageMetadata, pack};

pub(crate) const PAGE: usize = 4096;

/// Pages of the memory of the capsules here.
pub(crate) const PAGES: u64 = 40;

/// A layer of one byte a page, and what it holds: all of the memory, or a few pages of it from the tenth on.
fn layer(pages: &[u8]) -> Arc<Layer> {
    let content: Vec<u8> = pages.iter().flat_map(|&byte| std::iter::repeat_n(byte, PAGE)).collect();
    let file = Arc::new(memory::sealed("test", &content).expect("there is memory"));
    let count = pages.len() as u64;
    let page = if count == PAGES { 0 } else { 10 };
    Arc::new(Layer { file, runs: vec![Run { page, pages: count, file_page: 0 }] })
}

/// A capsule with these layers above one of zeros: a byte a page.
pub fn capsule(layers: &[Vec<u8>]) -> Capsule {
    let layers: Vec<_> = std::iter::once(&vec![0; 40]).chain(layers).map(|pages| layer(pages)).collect();
    let files: Vec<_> = layers.iter().map(|layer| Arc::clone(&layer.file)).collect();
    let machine = MachineState { control_page: ControlPageState::forked(10), ..MachineState::blank() };
    let image = Image::new(PAGES, layers).expect("the layers fit");
    let state = pack(&machine, &image, &files).expect("a state can be packed");
    let original = VmIdentity {
        id: Uuid::from_u128(7),
        parent: Uuid::nil(),
        name: "vm".into(),
        vm_type: "vm".into(),
        index: 0,
        count: 0,
        generation: 3,
    };
    let config = VmShape { ram_bytes: PAGES * PAGE_BYTES, vcpus: 1 };
    let metadata = ImageMetadata {
        id: Uuid::from_u128(8),
        created_ns: 9,
        vm_type: "web".into(),
        original,
        config,
        seq: 10,
    };
    Capsule { metadata, state, files }
}
