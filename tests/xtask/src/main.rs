//! `cargo xtask`: the demo, every test, and the lab.
//!
//! Programs run on this machine's KVM where `host-vmm check` finds it usable. Elsewhere the same programs run
//! in the **lab**: QEMU, whose software CPU has AMD's virtualisation, booting Debian's kernel with a /dev/kvm
//! of its own.
//!
//! What it makes is below cargo's target directory:
//!
//! - `assets/`: what the demo and the tests work with; they find it by `VMFORK_ASSETS`
//! - `guest/`: programs as they go into images
//! - `lab/`: the lab's own image, and the console log of a run that failed
//! - `vmfork-cache/`: Debian packages, and kernels that were built; remove it to get newer ones

mod bench;
mod cargo;
mod cli;
mod demo;
mod images;
mod kernel;
mod lab;
mod probe;
mod setup;
mod soak;
mod steps;
mod test;
mod tidy;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::cli::{Cli, Task};
use crate::steps::Steps;

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<u8> {
    let mut steps = Steps::default();
    match task {
        Task::Demo(arguments) => demo::run(&mut steps, &arguments),
        Task::Tidy => tidy::command(&mut steps),
        Task::Test(arguments) => test::run(&mut steps, &arguments),
        Task::Soak(arguments) => soak::run(&mut steps, &arguments),
        Task::Bench(arguments) => bench::run(&mut steps, &arguments),
        Task::Lab(arguments) => lab::command(&mut steps, &arguments),
        Task::Image => images::command(&mut steps),
        Task::Kernel(arguments) => kernel::command(&mut steps, &arguments),
    }
}
