//! Round trips from a guest to its VMM, by port, by hypercall and by MMIO: under `host-vmm`, and in a loop
//! that does nothing else.
//!
//! Each guest makes many in a row. Under `host-vmm` it takes the time by its TSC, so that nobody else's is in
//! it.

use std::{
    arch::x86_64::{__cpuid, _rdtsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{kvm_enable_cap, kvm_regs};
use kvm_ioctls::{Cap, Kvm, VcpuExit};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::NamedTempFile;
use vmfork_abi::doorbell;
use vmfork_tests::{
    assets,
    doorbell_guest::{self, IDLE_ADDRESS, IDLE_PORT, Level, Trip},
    vmm::{Running, Vmm, console_line},
};

use crate::{
    Progress,
    floor::{Addresses, BlankVm, CODE, CONTROL, Image, PRIVATE, long_mode},
    stats::Samples,
};

/// Round trips that are made in a row: for less time than a scheduler gives, so that most are made without a
/// break.
const TRIPS: u32 = 200;

/// How long the TSC is held against the clock.
const CALIBRATION: Duration = Duration::from_millis(200);

/// What user code does, and its floor.
const USER: [(&str, Trip); 3] =
    [("trip.port.answered", Trip::PortAnswered), ("trip.port", Trip::Port), ("trip.mmio", Trip::Mmio)];
const USER_FLOOR: [(&str, Way); 2] = [("floor.trip.port", Way::Port), ("floor.trip.mmio", Way::Mmio)];

/// What only kernel code can do, and its floor.
const KERNEL: [(&str, Trip); 2] =
    [("trip.hypercall.answered", Trip::HypercallAnswered), ("trip.hypercall", Trip::Hypercall)];
const KERNEL_FLOOR: (&str, Way) = ("floor.trip.hypercall", Way::Hypercall);

/// How the floor's guest leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Port,
    Hypercall,
    Mmio,
}

/// Measures all kinds that this machine's KVM can complete, in turn.
pub(crate) fn measure(kvm: &Kvm, repeats: usize, samples: &mut Samples, progress: &Progress) -> Result<()> {
    let hypercalls = assets::probe().hypercall;
    if !hypercalls {
        eprintln!(
            "bench: hypercalls are left out: on this machine's KVM one from guest kernel code does not \
             come back (`host-vmm check`), and user code may make none"
        );
    }
    let ticks_per_ns = ticks_per_ns()?;
    let image = Image::new(16 << 20)?;
    let floors = USER_FLOOR.into_iter().chain(hypercalls.then_some(KERNEL_FLOOR));
    let mut floors =
        floors.map(|(name, way)| Ok((name, Floor::new(kvm, &image, way)?))).collect::<Result<Vec<_>>>()?;
    let mut guests = vec![(Guest::start(Level::User)?, &USER[..])];
    if hypercalls {
        guests.push((Guest::start(Level::Kernel)?, &KERNEL[..]));
    }
    progress.begin(&format!("{TRIPS} round trips of each kind"), repeats);
    // What is done for the first time takes longer.
    for round in 0..=repeats {
        let mut add = |name: &str, took_ns: f64| {
            if round > 0 {
                samples.add(name, "ns", took_ns / f64::from(TRIPS));
            }
        };
        for (name, floor) in &mut floors {
            add(name, floor.trips(TRIPS)?.as_secs_f64() * 1e9);
        }
        for (guest, trips) in &mut guests {
            for &(name, trip) in *trips {
                add(name, guest.trips(trip, TRIPS, ticks_per_ns)?);
            }
        }
        progress.step();
    }
    guests.into_iter().try_for_each(|(guest, _)| guest.end())
}

/// How fast the TSC is: that of guests, which nobody has told otherwise, too.
fn ticks_per_ns() -> Result<f64> {
    let now = || {
        // SAFETY: the instruction is there on every x86-64, and Linux does not forbid it to anybody who has
        // not asked for that.
        (Instant::now(), unsafe { _rdtsc() })
    };
    let (began, from) = now();
    thread::sleep(CALIBRATION);
    let (ended, to) = now();
    let ticks = f64::from(u32::try_from(to - from).context("a TSC that is too fast")?);
    Ok(ticks / ((ended - began).as_secs_f64() * 1e9))
}

/// A guest under `host-vmm`. While nobody has asked for anything, its process is stopped: its waiting is a
/// loop.
#[derive(Debug)]
struct Guest {
    running: Running,
    node: Pid,
    _kernel: NamedTempFile,
}

impl Guest {
    fn start(level: Level) -> Result<Self> {
        let kernel = doorbell_guest::kernel(level);
        let mut running = Vmm::kernel(kernel.path()).option("--mem", "64M").option("--ready", "0").start()?;
        running.wait_for_line("00000001").context("the bare guest does not start")?;
        let node = Pid::from_raw(running.node("vm")?.cast_signed());
        kill(node, Signal::SIGSTOP)?;
        Ok(Self { running, node, _kernel: kernel })
    }

    /// What so many of these take, in nanoseconds.
    fn trips(&mut self, trip: Trip, count: u32, ticks_per_ns: f64) -> Result<f64> {
        let began = Instant::now();
        kill(self.node, Signal::SIGCONT)?;
        self.running.type_bytes(&doorbell_guest::order(trip, count))?;
        let line = loop {
            if let Some((_, line)) = console_line(&self.running.next_event()?, "") {
                break line;
            }
        };
        kill(self.node, Signal::SIGSTOP)?;
        let ticks =
            u32::from_str_radix(&line, 16).with_context(|| format!("{line} is no number of ticks"))?;
        let (took_ns, waited_ns) = (f64::from(ticks) / ticks_per_ns, began.elapsed().as_secs_f64() * 1e9);
        ensure!(
            took_ns <= waited_ns,
            "the guest's TSC says {took_ns} ns, of {waited_ns} ns that it can have taken"
        );
        Ok(took_ns)
    }

    fn end(self) -> Result<()> {
        kill(self.node, Signal::SIGCONT)?;
        self.running.signal(Signal::SIGTERM)?;
        self.running.end().map(drop)
    }
}

/// A guest that does nothing but leave, and a loop that does nothing but run it.
#[derive(Debug)]
struct Floor {
    blank: BlankVm,
    way: Way,
}

impl Floor {
    fn new(kvm: &Kvm, image: &Image, way: Way) -> Result<Self> {
        let blank = BlankVm::new(kvm, image.bytes, Addresses::Empty)?;
        blank.memory.map(&image.file, PRIVATE)?;
        let (level, code): (u8, &[u8]) = match way {
            Way::Port => (3, &[0xef, 0xeb, 0xfd]),       // out dx, eax; jmp
            Way::Mmio => (3, &[0x89, 0x07, 0xeb, 0xfc]), // mov [rdi], eax; jmp
            Way::Hypercall => {
                let args = [1 << doorbell::HYPERCALL, 0, 0, 0];
                blank.vm.enable_cap(&kvm_enable_cap {
                    cap: Cap::ExitHypercall as u32,
                    args,
                    ..Default::default()
                })?;
                // mov rax, r8; vmcall or vmmcall; jmp
                let intel: &[u8] = &[0x4c, 0x89, 0xc0, 0x0f, 0x01, 0xc1, 0xeb, 0xf8];
                (0, if is_amd() { &[0x4c, 0x89, 0xc0, 0x0f, 0x01, 0xd9, 0xeb, 0xf8] } else { intel })
            }
        };
        blank.memory.write(CODE, code);
        blank.vcpu.set_sregs(&long_mode(blank.fresh, level))?;
        let (rdx, rcx) = if way == Way::Hypercall { (0, 1) } else { (IDLE_PORT.into(), 0) };
        let (rip, rbx, rdi, r8) = (CODE as u64, CONTROL, IDLE_ADDRESS, doorbell::HYPERCALL);
        blank.vcpu.set_regs(&kvm_regs {
            rip,
            rbx,
            rcx,
            rdx,
            rdi,
            r8,
            rflags: 0x3002,
            ..Default::default()
        })?;
        Ok(Self { blank, way })
    }

    fn trips(&mut self, count: u32) -> Result<Duration> {
        let started = Instant::now();
        for _ in 0..count {
            match (self.way, self.blank.vcpu.run()?) {
                (Way::Port, VcpuExit::IoOut(IDLE_PORT, _))
                | (Way::Mmio, VcpuExit::MmioWrite(IDLE_ADDRESS, _)) => {}
                (Way::Hypercall, VcpuExit::Hypercall(call)) => *call.ret = 0,
                (_, other) => bail!("the floor's guest did {other:?}"),
            }
        }
        Ok(started.elapsed())
    }
}

/// Whether hypercalls are made by AMD's instruction here.
fn is_amd() -> bool {
    matches!(&__cpuid(0).ebx.to_le_bytes(), b"Auth" | b"Hygo")
}
