//! Clones between two platforms of this host, over loopback addresses and mutual TLS; and what the same TLS
//! moves by itself.

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use api::{CloneWish, client};
use axum::serve::Listener as _;
use cluster::tls::{Credentials, Endpoint, Listener, connect};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime,
    task::JoinSet,
};
use vmfork_abi::flags;
use vmfork_tests::{
    cluster::Platforms,
    process::cpu_time,
    proxy::Proxy,
    user_guest::{self, Order},
    vmm::{Running, Vmm},
};

use crate::REST;

/// Type of the bare guest's copies.
const TYPE: &str = "bench";

/// How long something may take that is waited for.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How long everything is left alone after a lazy clone whose memory has come as a whole.
const REST_AFTER_CLONE: Duration = Duration::from_millis(500);

/// Connections for the memory of a clone, as by default.
const CONNECTIONS: usize = 2;

/// Bytes that are written at once where nothing but TLS is measured.
const PIECE_BYTES: usize = 256 << 10;

/// Two platforms, and a guest on the first one that forks when it is told to.
#[derive(Debug)]
pub(crate) struct Pair {
    source: Running,
    target: Running,
    node: Pid,
    /// The way from source to target.
    way: Proxy,
    _platforms: Platforms,
    _kernel: NamedTempFile,
}

impl Pair {
    /// Starts both. With `lazy`, copies of forks run before all of their memory has come. With `counted`,
    /// bytes are counted on their way, which is a detour.
    pub(crate) fn start(mem: &str, lazy: bool, counted: bool) -> Result<Self> {
        let platforms = Platforms::with_certificates(&["a", "b"]);
        let way = Proxy::start(platforms.address("b"))?;
        let target = Vmm::serve(&platforms.config("b", "")).start()?;
        let kernel = user_guest::kernel();
        let by_way = counted.then(|| ("b", way.address()));
        let config =
            platforms.config_by_way("a", by_way, &format!("keep = [\"{TYPE}\"]\n[clone]\nlazy = {lazy}"));
        let vmm = Vmm::kernel(kernel.path()).option("--mem", mem).flag("--prealloc").config(&config);
        let mut source = vmm.start()?;
        source.wait_for_line("00000001").context("the bare guest does not start")?;
        let node = Pid::from_raw(source.node("vm")?.cast_signed());
        let pair = Self { source, target, node, way, _platforms: platforms, _kernel: kernel };
        for platform in [&pair.source, &pair.target] {
            wait(platform, &["platforms", "--json"], |known| {
                known["platforms"].as_array().is_some_and(|all| all.len() == 2)
            })?;
        }
        kill(node, Signal::SIGSTOP)?;
        Ok(pair)
    }

    /// Has the guest fork, and gives the report.
    fn fork(&mut self, order: Order) -> Result<Value> {
        kill(self.node, Signal::SIGCONT)?;
        self.source.type_bytes(&order.to_bytes())?;
        loop {
            let event = self.source.next_event()?;
            if event["event"] == "forked" {
                ensure!(event["code"] == 0, "a fork failed: {event}");
                thread::sleep(REST);
                kill(self.node, Signal::SIGSTOP)?;
                return Ok(event);
            }
        }
    }

    /// From the doorbell to the first exit of a clone on the other platform, in nanoseconds. Returns when all
    /// of its memory is there.
    pub(crate) fn fork_away(&mut self) -> Result<u64> {
        let order = Order { count: 1, flags: flags::REMOTE, ..Order::default() };
        let rung_ns = self.fork(order)?["rung_ns"].as_u64().context("a report without its time")?;
        let first_exit_ns = loop {
            let event = self.target.next_event()?;
            if event["event"] == "launched" {
                let last = event["steps"].as_array().and_then(|steps| steps.last()).context("no steps")?;
                break last[2].as_u64().context("a step without its end")?;
            }
        };
        let images = wait(&self.target, &["image", "ls", "--json"], |images| images[0]["id"].is_string())?;
        self.forget(images[0]["id"].as_str().unwrap_or_default())?;
        // The host takes back the memory of it.
        thread::sleep(REST_AFTER_CLONE);
        Ok(first_exit_ns.saturating_sub(rung_ns))
    }

    /// Has the target let go of an image.
    fn forget(&self, image: &str) -> Result<()> {
        self.target.ask(&["image", "rm", image]).map(drop)
    }

    /// Forks on the source's own platform, after the guest has written to so many pages, and gives the ID of
    /// the image.
    pub(crate) fn make_image(&mut self, dirty_pages: u32) -> Result<String> {
        self.fork(Order { count: 1, dirty_pages, flags: flags::LOCAL, ..Order::default() })?;
        let seq = |images: &Value| images.as_array().is_some_and(|images| !images.is_empty());
        let images = wait(&self.source, &["image", "ls", "--json"], seq)?;
        let newest = images.as_array().and_then(|images| images.last()).context("no image")?;
        Ok(newest["id"].as_str().context("an image without an ID")?.to_owned())
    }

    /// Clones an image, and gives how long that took, and how many bytes went between the two.
    pub(crate) fn clone_image(&self, image: &str) -> Result<(Duration, u64)> {
        self.way.set(vmfork_tests::proxy::Fault::None);
        let wish = CloneWish { from: None, to: "b".into(), count: 1, lazy: false };
        let started = Instant::now();
        client::clone_image(Some(&client::Endpoint::Socket(self.source.socket())), image, &wish)?;
        Ok((started.elapsed(), self.way.passed()))
    }

    /// As [`Pair::clone_image`], to a target that has nothing of it. So many bytes are moved for it.
    pub(crate) fn clone_anew(&self, image: &str, bytes: u64) -> Result<Moved> {
        let clock = Clock::start(&[self.source.pid(), self.target.pid()])?;
        self.clone_image(image)?;
        let moved = clock.stop(bytes)?;
        self.forget(image)?;
        Ok(moved)
    }

    pub(crate) fn end(self) -> Result<()> {
        for platform in [self.source, self.target] {
            platform.signal(Signal::SIGTERM)?;
            platform.end()?;
        }
        Ok(())
    }
}

/// Waits until the command prints JSON that is as it should be.
fn wait(platform: &Running, command: &[&str], is_right: impl Fn(&Value) -> bool) -> Result<Value> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let answer: Value =
            serde_json::from_str(&platform.ask(command).unwrap_or_default()).unwrap_or_default();
        if is_right(&answer) {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "{command:?}: {answer}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// What TLS alone moves from one memory to another: from one that is filled into a new one, as a clone does,
/// or, with `cached`, from and to a buffer that stays in the processor's cache; on as many connections as a
/// clone has.
pub(crate) fn tls(memory: &File, cached: bool) -> Result<Moved> {
    let bytes = memory.metadata()?.len();
    let platforms = Platforms::with_certificates(&["a", "b"]);
    let load = |name: &str| -> Result<Credentials> {
        let [ca, certificate, key]: [PathBuf; 3] = platforms.files(name).context("no certificates")?;
        Ok(Credentials::load(&ca, &certificate, &key)?)
    };
    let (ours, theirs) = (load("a")?, load("b")?);
    runtime::Builder::new_multi_thread().worker_threads(2 * CONNECTIONS).enable_all().build()?.block_on(
        async {
            let mut listener = Listener::bind(([127, 0, 0, 1], 0).into(), &theirs).await?;
            let endpoint =
                Endpoint::Tls { address: listener.address()?, platform: "b".into(), credentials: ours };
            let mut pairs = Vec::new();
            for _ in 0..CONNECTIONS {
                let (sender, (receiver, _)) = tokio::join!(connect(&endpoint), listener.accept());
                pairs.push((sender?, receiver));
            }
            let clock = Clock::start(&[process::id()])?;
            let copy = Arc::new(vmm::memory::unresizable("vm-floor", bytes)?);
            let memory = Arc::new(memory.try_clone()?);
            let share = bytes / CONNECTIONS as u64;
            let mut tasks: JoinSet<Result<()>> = JoinSet::new();
            for ((mut sender, mut receiver), start) in
                pairs.into_iter().zip((0..).map(|number| number * share))
            {
                let (from, to) = (Arc::clone(&memory), Arc::clone(&copy));
                tasks.spawn(async move {
                    let mut piece = vec![0x5a; PIECE_BYTES];
                    for at in (start..start + share).step_by(PIECE_BYTES) {
                        if !cached {
                            from.read_exact_at(&mut piece, at)?;
                        }
                        sender.write_all(&piece).await?;
                    }
                    Ok(sender.shutdown().await?)
                });
                tasks.spawn(async move {
                    let mut piece = vec![0; PIECE_BYTES];
                    for at in (start..start + share).step_by(PIECE_BYTES) {
                        receiver.read_exact(&mut piece).await?;
                        if !cached {
                            to.write_all_at(&piece, at)?;
                        }
                    }
                    Ok(())
                });
            }
            while let Some(done) = tasks.join_next().await {
                done??;
            }
            clock.stop(bytes)
        },
    )
}

/// A memory file with something in each page.
pub(crate) fn filled(bytes: u64) -> Result<File> {
    let file = vmm::memory::unresizable("vm-floor", bytes)?;
    let piece = vec![0x5a; PIECE_BYTES];
    (0..bytes).step_by(PIECE_BYTES).try_for_each(|at| file.write_all_at(&piece, at))?;
    Ok(file)
}

/// What it took to move memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moved {
    /// Bytes a second.
    pub(crate) per_second: f64,
    /// Processor time for each GiB, of both sides together, in seconds.
    pub(crate) cpu_per_gib: f64,
}

/// Measures time, and what processes have of the processors meanwhile.
#[derive(Debug)]
struct Clock {
    processes: Vec<(u32, Duration)>,
    started: Instant,
}

impl Clock {
    fn start(processes: &[u32]) -> Result<Self> {
        let processes = processes.iter().map(|pid| Ok((*pid, cpu_time(*pid)?))).collect::<Result<_>>()?;
        Ok(Self { processes, started: Instant::now() })
    }

    fn stop(&self, bytes: u64) -> Result<Moved> {
        let took = self.started.elapsed();
        let all = self.processes.iter().map(|(pid, before)| Ok(cpu_time(*pid)?.saturating_sub(*before)));
        let cpu: Duration = all.sum::<Result<_>>()?;
        Ok(Moved {
            per_second: per_second(bytes, took),
            cpu_per_gib: cpu.as_secs_f64() * f64::from(1 << 30) / exact(bytes),
        })
    }
}

/// Bytes a second.
fn per_second(bytes: u64, time: Duration) -> f64 {
    exact(bytes) / time.as_secs_f64()
}

/// 52 bits are enough for what is moved within a bench.
fn exact(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes >> 12).unwrap_or(u32::MAX)) * 4096.0
}
