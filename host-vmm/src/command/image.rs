//! `host-vmm image` and `host-vmm spawn`: images that a platform keeps, and copies of them.

use std::{fs::File, path::Path, process::ExitCode};

use anyhow::Context;
use api::{Image, Spawned, client};
use capsule::{self, Description, compat::Requirements};
use serde::Serialize;
use types::PAGE_BYTES;
use uuid::Uuid;

use super::{
    asked::{endpoint, endpoint_here},
    table::{Column, json, json_lines, size, table},
};
use crate::cli::{self, ImageCommand};

/// How much of an ID is shown where it is for people: enough to name an image.
const SHORT_ID: usize = 8;

/// Lists, shows, removes, saves or loads images.
///
/// # Errors
/// Where no platform answers, or it has no such image.
pub(crate) fn image(command: &ImageCommand) -> anyhow::Result<ExitCode> {
    match command {
        ImageCommand::Ls { platform, json: as_json } => {
            let images = client::images(endpoint(platform)?.as_ref())?;
            if *as_json {
                println!("{}", json(&images)?);
            } else {
                print!("{}", list(&images));
            }
        }
        ImageCommand::Show { platform, id } => {
            let image = client::image(endpoint(platform)?.as_ref(), id)?;
            println!("{}", json_lines(&image)?);
        }
        ImageCommand::Rm { platform, ids } => {
            let platform = endpoint(platform)?;
            ids.iter().try_for_each(|id| client::remove_image(platform.as_ref(), id))?;
        }
        ImageCommand::Save { platform, id, file, compress } => {
            client::save_image(endpoint_here(platform)?.as_ref(), id, file, *compress)?;
        }
        ImageCommand::Inspect { file } => {
            let inspection =
                Inspection::of(file).with_context(|| format!("can't read {}", file.display()))?;
            println!("{}", json_lines(&inspection)?);
        }
        ImageCommand::Verify { file } => {
            let opened = File::open(file).with_context(|| format!("can't open {}", file.display()))?;
            capsule::file::verify(&opened).with_context(|| file.display().to_string())?;
            println!("{} is whole", file.display());
        }
        ImageCommand::Load { platform, file } => {
            println!("{}", client::load_image(endpoint_here(platform)?.as_ref(), file)?.id);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a file says of the image that it holds.
#[derive(Debug, Serialize)]
struct Inspection {
    format_version: u32,
    compressed: bool,
    /// Size of the memory as it is stored, in bytes.
    stored_bytes: u64,
    /// BLAKE3 digest of the description, and so of all of the image.
    digest: String,
    id: Uuid,
    created_ms: u64,
    #[serde(rename = "type")]
    vm_type: String,
    original: Uuid,
    original_name: String,
    generation: u32,
    vcpus: u8,
    ram_bytes: u64,
    layers: Vec<Layer>,
    requirements: Requirements,
}

/// What it says of a layer.
#[derive(Debug, Serialize)]
struct Layer {
    /// Pages of the guest's memory that it holds.
    pages: u64,
    /// Pieces of the guest's memory in which these lie.
    runs: usize,
    /// Size of those that are not zero, in bytes.
    data_bytes: u64,
    /// Chunks that these are in.
    chunks: usize,
}

impl Inspection {
    fn of(file: &Path) -> anyhow::Result<Self> {
        let (header, description) = capsule::file::inspect(&File::open(file)?)?;
        let Description { metadata, requirements, memory, .. } = description;
        let layers = memory.layers.iter().map(|layer| Layer {
            pages: layer.runs.iter().map(|run| run.pages).sum(),
            runs: layer.runs.len(),
            data_bytes: layer.chunks.iter().map(capsule::Chunk::data_bytes).sum(),
            chunks: layer.chunks.len(),
        });
        Ok(Self {
            format_version: header.version,
            compressed: header.is_compressed,
            stored_bytes: header.data_bytes,
            digest: blake3::Hash::from_bytes(header.description_digest).to_hex().to_string(),
            id: metadata.id,
            created_ms: metadata.created_ns / 1_000_000,
            vm_type: metadata.vm_type,
            original: metadata.original.id,
            original_name: metadata.original.name,
            generation: metadata.original.generation.saturating_add(1),
            vcpus: metadata.config.vcpus,
            ram_bytes: memory.pages.saturating_mul(PAGE_BYTES),
            layers: layers.collect(),
            requirements,
        })
    }
}

/// Launches copies of an image.
///
/// # Errors
/// Where no platform answers, or it can't launch them.
pub(crate) fn spawn(options: &cli::Spawn) -> anyhow::Result<ExitCode> {
    let spawned = client::spawn(endpoint(&options.platform)?.as_ref(), &options.image, options.count)?;
    print_spawned(&spawned, options.json)
}

/// Says which VMs were made.
pub(super) fn print_spawned(spawned: &Spawned, as_json: bool) -> anyhow::Result<ExitCode> {
    if as_json {
        println!("{}", json(spawned)?);
    } else {
        for vm in &spawned.vms {
            println!("{}", vm.name);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(images: &[Image]) -> String {
    use Column::{Numbers, Words};
    let head = [
        ("ID", Words),
        ("TYPE", Words),
        ("OF", Words),
        ("GEN", Numbers),
        ("VCPUS", Numbers),
        ("RAM", Numbers),
        ("LAYERS", Numbers),
        ("PRIVATE", Numbers),
        ("SHARED", Numbers),
    ];
    let rows = images.iter().map(|image| {
        [
            image.id.to_string()[..SHORT_ID].to_owned(),
            image.vm_type.clone(),
            image.original_name.clone(),
            image.generation.to_string(),
            image.vcpus.to_string(),
            size(image.ram_bytes),
            image.layers.to_string(),
            size(image.private_bytes),
            size(image.shared_bytes),
        ]
    });
    table(head, rows)
}
