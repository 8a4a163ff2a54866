//! `host-vmm platforms`, `host-vmm place` and `host-vmm clone`: several platforms.

use std::{
    io::{IsTerminal, stderr},
    process::ExitCode,
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use api::{
    self, CloneWish, Transfer,
    client::{self, Endpoint},
};
use base::text::Name;
use cluster::placement::{Explanation, Wish};
use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use types::VmShape;
use uuid::Uuid;

use super::{
    asked::endpoint,
    fork::print_forked,
    image::print_spawned,
    table::{Column, json, size, table},
};
use crate::cli::{self, Original};

/// How often it is looked how far a clone is.
const LOOK: Duration = Duration::from_millis(200);

/// Lists the platforms that one knows.
///
/// # Errors
/// Where no platform answers, or it knows no others.
pub(crate) fn platforms(options: &cli::Platforms) -> anyhow::Result<ExitCode> {
    let platforms = client::platforms(endpoint(&options.platform)?.as_ref())?;
    if options.json {
        println!("{}", json(&platforms)?);
        return Ok(ExitCode::SUCCESS);
    }
    print!("{}", list(&platforms.platforms));
    if platforms.partitioned {
        eprintln!("host-vmm: the platform that was asked is cut off from its cluster: others send it no VMs");
    }
    Ok(ExitCode::SUCCESS)
}

fn list(platforms: &[api::Platform]) -> String {
    use Column::{Numbers, Words};
    let head = [
        ("NAME", Words),
        ("CLUSTER", Words),
        ("ADDRESS", Words),
        ("VMS", Numbers),
        ("MOST", Numbers),
        ("FREE", Numbers),
        ("SEEN", Numbers),
    ];
    let rows = platforms.iter().map(|api::Platform { member, age_ms }| {
        [
            member.name.clone(),
            member.cluster.clone(),
            member.address.to_string(),
            member.load.vms.to_string(),
            member.load.max_vms.to_string(),
            size(member.load.memory_available_bytes),
            format!("{} ago", HumanDuration(Duration::from_millis(*age_ms))),
        ]
    });
    table(head, rows)
}

/// Tells where copies would go.
///
/// # Errors
/// Where no platform answers, or it knows no others.
pub(crate) fn place(options: &cli::Place) -> anyhow::Result<ExitCode> {
    let wish = Wish {
        vm_type: options.vm_type.clone(),
        count: options.count,
        config: VmShape { ram_bytes: options.mem, vcpus: options.cpus },
        location: options.location.into(),
        images: options.image.iter().copied().collect(),
        source: String::new(),
    };
    let explanation = client::explain(endpoint(&options.platform)?.as_ref(), wish)?;
    if options.json {
        println!("{}", json(&explanation)?);
    } else if options.explain {
        let head = Explanation::HEAD.map(|title| (title, Column::Words));
        print!("{}", table(head, explanation.rows().into_iter()));
    } else {
        for reason in explanation.platforms.iter().filter(|reason| reason.copies > 0) {
            println!("{} {}", Name::from(reason.platform.as_str()), reason.copies);
        }
    }
    Ok(if explanation.placed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Launches copies of a VM on another platform, or of a kept image, and shows how far that is.
///
/// # Errors
/// Where no platform answers, or it can't be done.
pub(crate) fn clone(options: &cli::Clone) -> anyhow::Result<ExitCode> {
    let platform = endpoint(&options.platform)?;
    let cli::Clone { from, to, count, lazy, .. } = options;
    let wish = CloneWish { from: from.clone(), to: to.clone(), count: *count, lazy: *lazy };
    let Original { image, vm } = options.original.clone();
    match (vm, image) {
        (Some(vm), _) => {
            let named = vm.clone();
            let is_it = move |sent: &Transfer| sent.original_name == named || begins(sent.original, &named);
            let ask = move |platform: Option<&Endpoint>| client::clone_vm(platform, &vm, &wish);
            print_forked(&with_progress(platform, to, is_it, ask)?, options.json)
        }
        (None, Some(image)) => {
            let named = image.clone();
            let is_it = move |sent: &Transfer| begins(sent.image, &named);
            let ask = move |platform: Option<&Endpoint>| client::clone_image(platform, &image, &wish);
            print_spawned(&with_progress(platform, to, is_it, ask)?, options.json)
        }
        (None, None) => anyhow::bail!("neither --image nor --vm says what is copied"),
    }
}

fn begins(id: Uuid, start: &str) -> bool {
    id.to_string().starts_with(start)
}

/// Asks a platform for a clone, and shows meanwhile how far the one is that is sent to `to`, and is it.
fn with_progress<T: Send + 'static>(
    platform: Option<Endpoint>,
    to: &str,
    is_it: impl Fn(&Transfer) -> bool,
    ask: impl FnOnce(Option<&Endpoint>) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (sender, done) = mpsc::channel();
    let asked = platform.clone();
    thread::spawn(move || {
        // Nobody listens any more where this command has failed.
        drop(sender.send(ask(asked.as_ref())));
    });
    let bar = stderr().is_terminal().then(|| {
        let style =
            ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec}");
        ProgressBar::new(0)
            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            .with_message(to.to_owned())
    });
    let mut told = false;
    loop {
        match done.recv_timeout(LOOK) {
            Ok(result) => {
                bar.inspect(ProgressBar::finish_and_clear);
                return result;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                anyhow::bail!("the thread that asks the platform panicked")
            }
        }
        let transfers = client::transfers(platform.as_ref()).unwrap_or_default();
        let transfer = transfers.iter().find(|sent| sent.to == to && sent.wanted_bytes > 0 && is_it(sent));
        let Some(transfer) = transfer else { continue };
        let Transfer { wanted_bytes, sent_bytes, spared_bytes, .. } = *transfer;
        if let Some(bar) = &bar {
            bar.set_length(wanted_bytes);
            bar.set_position(sent_bytes);
        } else if !std::mem::replace(&mut told, true) {
            eprintln!(
                "host-vmm: {} of memory go to {to}; {} of it are there already",
                HumanBytes(wanted_bytes),
                HumanBytes(spared_bytes)
            );
        }
    }
}
