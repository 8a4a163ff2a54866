//! `host-vmm image` and `host-vmm spawn`: images that a platform keeps, and copies of them.

use std::process::ExitCode;

use super::table::{Column, size, table};
use crate::{
    api::{Image, client},
    cli::{self, ImageCommand},
};

/// How much of an ID is shown where it is for people: enough to name an image.
const SHORT_ID: usize = 8;

/// Lists, shows, removes, saves or loads images.
///
/// # Errors
/// Where no platform answers, or it has no such image.
pub fn image(command: &ImageCommand) -> anyhow::Result<ExitCode> {
    match command {
        ImageCommand::Ls { platform, json } => {
            let images = client::images(platform.api.as_deref())?;
            if *json {
                println!("{}", serde_json::to_string(&images)?);
            } else {
                print!("{}", list(&images));
            }
        }
        ImageCommand::Show { platform, id } => {
            let image = client::image(platform.api.as_deref(), id)?;
            println!("{}", serde_json::to_string_pretty(&image)?);
        }
        ImageCommand::Rm { platform, ids } => {
            for id in ids {
                client::remove_image(platform.api.as_deref(), id)?;
            }
        }
        ImageCommand::Save { platform, id, file } => client::save_image(platform.api.as_deref(), id, file)?,
        ImageCommand::Load { platform, file } => {
            println!("{}", client::load_image(platform.api.as_deref(), file)?.id);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Launches copies of an image.
///
/// # Errors
/// Where no platform answers, or it can't launch them.
pub fn spawn(options: &cli::Spawn) -> anyhow::Result<ExitCode> {
    let spawned = client::spawn(options.platform.api.as_deref(), &options.image, options.count)?;
    if options.json {
        println!("{}", serde_json::to_string(&spawned)?);
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
