//! Random numbers that are drawn without a pause while the VM becomes several.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use anyhow::{Context, anyhow, bail, ensure};
use nix::{
    libc,
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use vmfork_abi::PAGE;

use crate::{complaints, device, drain, is_child, notices::Page};

/// How many draws a VM tells of from before and from after a fork.
const TOLD: usize = 64;

/// Most draws of which a copy tells that its guest has not asked for.
const MOST: usize = 4096;

/// What the kernel says when it has heard of another generation ID.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";

/// The control page.
const CONTROL_PAGE: u64 = 0xd000_0000;

/// A number, and in which generation it was drawn; none where that changed meanwhile.
struct Draw {
    generation: Option<u64>,
    value: u64,
}

/// Draws a number: so few bytes at once come from one state of the generator.
fn draw(page: &Page) -> anyhow::Result<Draw> {
    let before = page.generation();
    let mut value = [0; 8];
    getrandom::fill(&mut value).context("getrandom")?;
    let generation = Some(before).filter(|before| page.generation() == *before);
    Ok(Draw { generation, value: u64::from_ne_bytes(value) })
}

/// Draws on the last CPU while the module forks the VM on the first one. Each VM prints what it has drawn
/// around the fork: a copy since it began, the parent before and after the call has returned.
pub(crate) fn run(count: u32) -> anyhow::Result<()> {
    // It would reseed the generator too, a moment after a copy's start.
    let driver = Path::new("/sys/bus/platform/drivers/vmgenid");
    ensure!(!driver.exists(), "the driver of the VM generation ID is there: the module is not alone");
    let file = device::open()?;
    let page = Page::map(&file, 0)?;
    let booted = page.generation();
    let last = thread::available_parallelism()?.get() - 1;
    // The task that makes the forks, so that it is the first vCPU that rings.
    for pid in tasks_called("vmfork")? {
        pin(pid, 0)?;
    }
    let returned = Arc::new(AtomicBool::new(false));
    let drawer = {
        let returned = Arc::clone(&returned);
        thread::spawn(move || -> anyhow::Result<Vec<Draw>> {
            pin(Pid::from_raw(0), last)?;
            let mut draws = Vec::new();
            let (mut is_first, mut left) = (true, TOLD);
            while left > 0 {
                let draw = draw(&page)?;
                let is_later = draw.generation.is_some_and(|generation| generation != booted);
                if is_later && is_first {
                    (is_first, left) = (false, TOLD);
                    draws.clear();
                }
                if is_later || returned.load(Ordering::SeqCst) {
                    left -= 1;
                }
                draws.push(draw);
            }
            Ok(draws)
        })
    };
    pin(Pid::from_raw(0), 0)?;
    drain()?;
    let forked = device::fork(&file, device::fork_arguments(count));
    returned.store(true, Ordering::SeqCst);
    let forked = forked.map_err(|refused| anyhow!("no fork: {refused:?}"))?;
    let draws = drawer.join().map_err(|_| anyhow!("a thread panicked"))??;
    let told = if is_child(&forked.identity) { TOLD } else { 2 * TOLD };
    let draws = draws.iter().skip(draws.len().saturating_sub(told));
    for draw in draws.filter(|draw| draw.generation.is_some()) {
        println!("DRAW {:016x}", draw.value);
    }
    complaints()
}

/// Draws until this is a copy, and then until the kernel says that it has reseeded its generator for that. A
/// copy prints when and what it has drawn since it began, in microseconds and as half a word, and then what
/// it draws from there on.
pub(crate) fn alone() -> anyhow::Result<()> {
    let page = page_without_module()?;
    let mut log = Log::open()?;
    let booted = page.generation();
    println!("READY");
    let mut draws: Vec<(Instant, u64)> = Vec::new();
    loop {
        let Draw { generation, value } = draw(&page)?;
        if generation.is_some_and(|generation| generation != booted) {
            draws.push((Instant::now(), value));
            if log.says(RESEEDED)? {
                break;
            }
        }
    }
    for (at, value) in draws.iter().take(MOST) {
        println!("DREW {} {:08x}", (*at - draws[0].0).as_micros(), value >> 32);
    }
    for _ in 0..TOLD {
        println!("DRAW {:016x}", draw(&page)?.value);
    }
    complaints()
}

/// The generation's page, with the module or, by an administrator, without it.
fn page_without_module() -> anyhow::Result<Page> {
    match device::open() {
        Ok(file) => Page::map(&file, 0),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let offset = CONTROL_PAGE + u64::try_from(PAGE.generation.offset)?;
            Page::map(&File::open("/dev/mem")?, offset.try_into()?)
        }
        Err(error) => Err(error.into()),
    }
}

/// The kernel's log, from now on.
struct Log(File);

impl Log {
    fn open() -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self(file))
    }

    /// Whether a line that has come since the last call has this text.
    fn says(&mut self, text: &str) -> anyhow::Result<bool> {
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(bytes) if String::from_utf8_lossy(&record[..bytes]).contains(text) => return Ok(true),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => bail!("the kernel's log can't be read: {error}"),
            }
        }
    }
}

/// Keeps a task on a CPU.
fn pin(task: Pid, cpu: usize) -> anyhow::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(task, &cpus).with_context(|| format!("can't keep task {task} on CPU {cpu}"))
}

/// The tasks with a name.
fn tasks_called(name: &str) -> anyhow::Result<Vec<Pid>> {
    let mut tasks = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // One that has ended by now has none.
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.trim_end() == name {
            tasks.push(Pid::from_raw(pid));
        }
    }
    Ok(tasks)
}
