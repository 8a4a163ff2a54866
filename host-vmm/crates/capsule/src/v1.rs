//! Capsules of version 1 of the format: read, and not written any more.
//!
//! ```text
//! 0       header
//! 4096    the pages of the layers that are not zero, one behind another
//! ...     the description: what is in which layer, the state as it was packed then, and one digest of all pages
//! ```

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use serde::Deserialize;
use types::{MAX_RAM_BYTES, PAGE_BYTES, VmIdentity, VmShape};
use uuid::Uuid;
use vmm::{
    devices::{ControlPageState, OlderDevicesState},
    kvm::{OlderVcpuState, VmState},
    machine::MachineState,
    memory::{self, Budget, MAX_LAYERS},
};

use super::{
    Capsule, Error, Header, ImageMetadata, LayerContents, MAX_BYTES, codec, header::DATA_OFFSET, image, pack,
};

/// Bytes that are read at once.
const PIECE_BYTES: u64 = 1 << 20;

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
struct Description {
    id: Uuid,
    created_ns: u64,
    vm_type: String,
    original: VmIdentity,
    config: VmShape,
    seq: u64,
    state: Vec<u8>,
    layers: Vec<LayerDescription>,
    /// Digest of all pages.
    data_digest: [u8; 32],
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
struct LayerDescription {
    /// Size of the layer's file in pages.
    pages: u64,
    /// Runs of pages that are not zero: first page, and how many.
    runs: Vec<(u64, u64)>,
}

#[derive(Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
struct Contents {
    machine: Machine,
    pages: u64,
    layers: Vec<LayerContents>,
}

/// A machine's state, which did not say how fast its time-stamp counter runs.
#[derive(Deserialize)]
#[cfg_attr(test, derive(serde::Serialize))]
struct Machine {
    config: VmShape,
    vm: VmState,
    vcpus: Vec<OlderVcpuState>,
    devices: OlderDevicesState,
}

/// Reads the rest of a file of version 1.
///
/// # Errors
/// [`Error`]: whatever is wrong with it, or [`Error::NoRoom`].
pub(super) fn load(
    file: &File,
    header: &Header,
    description: &[u8],
    budget: &Budget,
) -> Result<Capsule, Error> {
    let description: Description = codec::decode(description)?;
    check(&description, header.data_bytes)?;
    let mut grant = budget.reserve(header.data_bytes)?;
    let mut pages = Reader { file, at: DATA_OFFSET, digest: blake3::Hasher::new() };
    let files: Vec<Arc<File>> =
        description.layers.iter().map(|layer| pages.layer(layer).map(Arc::new)).collect::<Result<_, _>>()?;
    for (layer, file) in description.layers.iter().zip(&files) {
        let layer_pages: u64 = layer.runs.iter().map(|(_, pages)| pages).sum();
        grant.pass_on(file, layer_pages * PAGE_BYTES);
    }
    if *pages.digest.finalize().as_bytes() != description.data_digest {
        return Err(Error::Digest("the memory"));
    }
    let Contents { machine: Machine { config, vm, vcpus, devices }, pages, layers } =
        codec::decode(&description.state)?;
    let vcpus = OlderVcpuState::into_current(vcpus);
    let (devices, control_page) = (devices.into(), ControlPageState::forked(description.seq));
    let machine =
        MachineState { config, vm, vcpus, devices, control_page, tsc_khz: None, capabilities: Vec::new() };
    let state = pack(&machine, &image(pages, layers, &files)?, &files)?;
    let Description { id, created_ns, vm_type, original, config, seq, .. } = description;
    let metadata = ImageMetadata { id, created_ns, vm_type, original, config, seq };
    metadata.check()?;
    Ok(Capsule { metadata, state, files })
}

/// Checks that the layers are of a possible size, that their runs are sorted and within them, and that the
/// pages are all theirs.
fn check(description: &Description, data_bytes: u64) -> Result<(), Error> {
    let Description { layers, state, .. } = description;
    if layers.len() > MAX_LAYERS || state.len() > MAX_BYTES {
        return Err(Error::Invalid("it has too many layers, or too large a state"));
    }
    let mut pages: u64 = 0;
    for layer in layers {
        if layer.pages > MAX_RAM_BYTES / PAGE_BYTES {
            return Err(Error::Invalid("a layer is too large"));
        }
        let mut free_from = 0;
        for &(page, count) in &layer.runs {
            let end =
                page.checked_add(count).filter(|end| count > 0 && page >= free_from && *end <= layer.pages);
            free_from = end.ok_or(Error::Invalid("a layer's runs are not sorted, or reach out of it"))?;
            pages += count;
        }
    }
    if pages.checked_mul(PAGE_BYTES) == Some(data_bytes) {
        Ok(())
    } else {
        Err(Error::Invalid("it has more or fewer pages than its layers"))
    }
}

/// Pages on their way from a file.
struct Reader<'f> {
    file: &'f File,
    at: u64,
    digest: blake3::Hasher,
}

impl Reader<'_> {
    fn layer(&mut self, layer: &LayerDescription) -> Result<File, Error> {
        let target = memory::unsealed("vm-loaded", layer.pages * PAGE_BYTES)?;
        let mut buffer = vec![0; usize::try_from(PIECE_BYTES).unwrap_or(0)];
        for &(page, pages) in &layer.runs {
            let (mut to, end) = (page * PAGE_BYTES, (page + pages) * PAGE_BYTES);
            while to < end {
                let piece = &mut buffer[..usize::try_from(PIECE_BYTES.min(end - to)).unwrap_or(0)];
                self.file
                    .read_exact_at(piece, self.at)
                    .map_err(|error| Error::Io("read the capsule", error))?;
                self.digest.update(piece);
                target.write_all_at(piece, to).map_err(|error| Error::Io("write to memory", error))?;
                (self.at, to) = (self.at + piece.len() as u64, to + piece.len() as u64);
            }
        }
        memory::seal("vm-loaded", &target)?;
        Ok(target)
    }
}

#[cfg(test)]
#[path = "v1_test.rs"]
pub(crate) mod tests;
