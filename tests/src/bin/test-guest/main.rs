//! What the end-to-end tests run in Linux guests. Each command tells on the console, in lines that start with
//! a word in capitals, what the test then checks.

use std::{
    arch::asm,
    fs,
    hint::black_box,
    io::{BufRead, stdin, stdout},
    process::Child,
    ptr::NonNull,
    sync::{
        Arc, Barrier,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, anyhow, bail, ensure};
use clap::{Args, Parser, Subcommand};
use nix::{
    fcntl::{Flock, FlockArg},
    libc,
    mount::{MsFlags, mount},
    sched::{CloneFlags, CpuSet, sched_setaffinity, unshare},
    sys::{
        mman::{MapFlags, ProtFlags, mmap, munmap},
        reboot::RebootMode,
        stat::{Mode, SFlag, makedev, mknod},
        termios::tcdrain,
    },
    time::{ClockId, clock_gettime, clock_settime},
    unistd::Pid,
};
use serde_json::json;
use vmfork::{Fork, ForkError, ForkRequest, Placement, Role};
use vmfork_abi::{Request, doorbell};
use vmfork_tests::bare_guest::{CONTROL_PAGE, DOORBELL};

mod clocks;

const PAGE: usize = 4096;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print that it is there, and end.
    Hello,
    /// Print the kernel's log.
    KernelLog,
    /// Fork so often, while a thread on each vCPU looks whether a clock goes back; each copy prints its
    /// clocks.
    Clocks { forks: u32 },
    /// Make the kernel panic.
    Panic,
    /// Set the clock an hour back, and fork once for each count; each copy prints who it is, and ends.
    Forks { counts: Vec<u32> },
    /// Fill memory, fork, write in all copies, and check every page in each.
    Memory { mib: usize, children: u32 },
    /// Fork, in the child again, and so on.
    Nested { depth: u32 },
    /// Fork a process of several threads; all of them must go on in each copy.
    Threads { threads: usize, children: u32 },
    /// Ask for a fork again and again; print the error codes of those that fail.
    Errors { times: u32 },
    /// Count, fork to another platform when told to, and go on counting there.
    CountElsewhere,
    /// Fork, and do nothing.
    Idle { children: u32 },
    /// Fork for ever; each child lives a moment.
    Storm,
    /// Ring the doorbell on all vCPUs at once, past the library and its lock, and then fork as one should.
    RingAtOnce { rings: u32 },
    /// Fork from so many containers at once, first while this program has the turn, and then without; each
    /// prints what it is told.
    Containers { containers: u32 },
    /// Be such a container: in namespaces of its own, and every second one with a /dev of its own, start the
    /// program in it.
    Container(Contained),
    /// Be the program in such a container: fork into one child or two, and in a child power the VM off.
    Contained(Contained),
}

#[derive(Debug, Clone, Copy, Args)]
struct Contained {
    /// Which container it is.
    number: u32,
    /// How long it waits for its turn; without it, for ever.
    timeout_ms: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Hello => {
            println!("READY");
            println!("HELLO {}", line()?);
        }
        Command::KernelLog => {
            for line in kernel_log()?.lines() {
                println!("LOG {line}");
            }
        }
        Command::Clocks { forks } => clocks::run(forks)?,
        Command::Panic => fs::write("/proc/sysrq-trigger", "c")?,
        Command::Forks { counts } => forks(&counts)?,
        Command::Memory { mib, children } => memory(mib, children)?,
        Command::Nested { depth } => nested(depth)?,
        Command::Threads { threads, children } => threads_go_on(threads, children)?,
        Command::Errors { times } => errors(times)?,
        Command::CountElsewhere => count_elsewhere()?,
        Command::Idle { children } => {
            let fork = fork("web", children)?;
            println!("IDLE {}", fork.index);
            thread::sleep(Duration::from_secs(3600));
        }
        Command::Storm => storm()?,
        Command::RingAtOnce { rings } => ring_at_once(rings)?,
        Command::Containers { containers } => fork_from_containers(containers)?,
        Command::Container(arguments) => container(arguments)?,
        Command::Contained(arguments) => contained(arguments)?,
    }
    Ok(())
}

fn fork(vm_type: &str, count: u32) -> anyhow::Result<Fork> {
    Ok(try_fork(vm_type, count)??)
}

/// Forks once the console has sent everything: what is still to be sent, every copy would send.
fn try_fork(vm_type: &str, count: u32) -> anyhow::Result<Result<Fork, ForkError>> {
    request_fork(&ForkRequest::new(vm_type, count)?)
}

fn request_fork(request: &ForkRequest) -> anyhow::Result<Result<Fork, ForkError>> {
    tcdrain(stdout()).context("the console does not take its output")?;
    Ok(vmfork::fork(request))
}

/// Waits for a line on standard input: the test's word to go on.
fn line() -> anyhow::Result<String> {
    let mut line = String::new();
    stdin().lock().read_line(&mut line)?;
    Ok(line.trim().to_owned())
}

fn kernel_log() -> anyhow::Result<String> {
    let output = std::process::Command::new("dmesg").output().context("dmesg")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Who this is, with what must differ between copies.
fn print_copy(fork: &Fork) -> anyhow::Result<()> {
    let mut random = [0; 16];
    getrandom::fill(&mut random).context("getrandom")?;
    let copy = json!({
        "fork": fork,
        "hostname": nix::unistd::gethostname()?.to_string_lossy(),
        "uuid": fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim(),
        "random": random,
        "wall_ms": wall()?.as_millis(),
    });
    println!("COPY {copy}");
    Ok(())
}

fn wall() -> anyhow::Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

fn forks(counts: &[u32]) -> anyhow::Result<()> {
    clock_settime(ClockId::CLOCK_REALTIME, (wall()? - Duration::from_secs(3600)).into())?;
    for &count in counts {
        let fork = fork("web", count)?;
        print_copy(&fork)?;
        if fork.role == Role::Child {
            return Ok(());
        }
    }
    Ok(())
}

/// The pattern of a page: which one it is, and who wrote it.
fn pattern(page: usize, writer: u64) -> u64 {
    (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ writer << 56
}

fn write_pages(memory: &mut [u8], writer: u64) {
    for (page, bytes) in memory.chunks_exact_mut(PAGE).enumerate() {
        let value = pattern(page, writer).to_le_bytes();
        // First and last bytes of each page.
        bytes[..8].copy_from_slice(&value);
        bytes[PAGE - 8..].copy_from_slice(&value);
    }
    black_box(memory);
}

fn check_pages(memory: &[u8], writer: u64) -> anyhow::Result<()> {
    for (page, bytes) in memory.chunks_exact(PAGE).enumerate() {
        let value = pattern(page, writer).to_le_bytes();
        ensure!(bytes[..8] == value && bytes[PAGE - 8..] == value, "page {page} is not as {writer} wrote it");
    }
    Ok(())
}

fn memory(mib: usize, children: u32) -> anyhow::Result<()> {
    const BEFORE: u64 = 0xff;
    const PARENT: u64 = 0x80;
    let mut memory = vec![0; mib << 20];
    write_pages(&mut memory, BEFORE);
    let fork = fork("web", children)?;
    if fork.role == Role::Parent {
        write_pages(&mut memory, PARENT);
        println!("PARENT wrote");
        // The children check and write meanwhile; the test tells when they are done.
        line()?;
        check_pages(&memory, PARENT)?;
        println!("PARENT ok");
        return Ok(());
    }
    // By then, the parent has written everything.
    thread::sleep(Duration::from_secs(2));
    check_pages(&memory, BEFORE)?;
    write_pages(&mut memory, u64::from(fork.index));
    println!("CHILD wrote");
    thread::sleep(Duration::from_secs(2));
    check_pages(&memory, u64::from(fork.index))?;
    println!("CHILD ok {}", memory.len() / PAGE);
    Ok(())
}

/// Counts in a thread. Each copy prints how far that was when it was to fork, and how far it is a while
/// later.
fn count_elsewhere() -> anyhow::Result<()> {
    let counter = Arc::new(AtomicU64::new(0));
    let count = || counter.load(Ordering::Relaxed);
    let counting = Arc::clone(&counter);
    thread::spawn(move || {
        loop {
            counting.fetch_add(1, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
        }
    });
    println!("READY");
    line()?;
    let before = count();
    let fork = request_fork(&ForkRequest::new("web", 1)?.placed(Placement::Remote))??;
    let deadline = Instant::now() + Duration::from_secs(60);
    while count() < before + 100 {
        ensure!(Instant::now() < deadline, "the count does not go on from {before}: it is {}", count());
        thread::sleep(Duration::from_millis(10));
    }
    println!("COUNT {before}");
    print_copy(&fork)?;
    if fork.role == Role::Parent {
        // The memory of its copy may still be on its way.
        line()?;
    }
    Ok(())
}

fn nested(depth: u32) -> anyhow::Result<()> {
    let mut memory = vec![0; 4 << 20];
    let pages = memory.len() / PAGE;
    let share = pages / usize::try_from(depth + 1)?;
    for generation in 0..depth {
        // Each generation writes pages of its own, which all later ones must find.
        let start = usize::try_from(generation)? * share * PAGE;
        write_pages(&mut memory[start..start + share * PAGE], u64::from(generation));
        let fork = fork("gen", 1)?;
        ensure!(
            fork.generation == generation + u32::from(fork.role == Role::Child),
            "generation {}",
            fork.generation
        );
        if fork.role == Role::Parent {
            break;
        }
        for earlier in 0..=generation {
            let start = usize::try_from(earlier)? * share * PAGE;
            check_pages(&memory[start..start + share * PAGE], u64::from(earlier))?;
        }
        println!("GENERATION {} parent {}", fork.generation, fork.parent_id.unwrap_or_default());
    }
    Ok(())
}

fn threads_go_on(threads: usize, children: u32) -> anyhow::Result<()> {
    let counters: Arc<Vec<AtomicU64>> = Arc::new((0..threads).map(|_| AtomicU64::new(0)).collect());
    for index in 0..threads {
        let counters = Arc::clone(&counters);
        thread::spawn(move || {
            loop {
                counters[index].fetch_add(1, Ordering::Relaxed);
                // Some of them sleep, so that timers have to go on too.
                if index % 2 == 0 {
                    thread::sleep(Duration::from_millis(1));
                } else {
                    thread::yield_now();
                }
            }
        });
    }
    let values = || counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect::<Vec<_>>();
    thread::sleep(Duration::from_millis(200));
    let fork = fork("web", children)?;
    let at_fork = values();
    ensure!(at_fork.iter().all(|&value| value > 0), "a thread did not run before the fork: {at_fork:?}");
    let deadline = Instant::now() + Duration::from_secs(20);
    while values().iter().zip(&at_fork).any(|(now, then)| now <= then) {
        if Instant::now() > deadline {
            bail!("a thread does not go on: {at_fork:?}, then {:?}", values());
        }
        thread::sleep(Duration::from_millis(10));
    }
    clocks_agree()?;
    println!("THREADS ok {}", fork.index);
    Ok(())
}

/// Goes from vCPU to vCPU, and finds that no clock ever goes back on the way.
fn clocks_agree() -> anyhow::Result<()> {
    let clocks = [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME, ClockId::CLOCK_REALTIME];
    let mut last = [Duration::ZERO; 3];
    for round in 0..400 {
        let mut cpus = CpuSet::new();
        cpus.set(round % cpu_count()?)?;
        sched_setaffinity(Pid::from_raw(0), &cpus)?;
        for (clock, last) in clocks.into_iter().zip(&mut last) {
            let now = Duration::from(clock_gettime(clock)?);
            ensure!(now >= *last, "{clock:?} went back from {last:?} to {now:?}");
            *last = now;
        }
    }
    Ok(())
}

fn cpu_count() -> anyhow::Result<usize> {
    let processors = fs::read_to_string("/proc/cpuinfo")?;
    Ok(processors.lines().filter(|line| line.starts_with("processor")).count())
}

/// A request that is as it should be stands in the control page all the time, so that every ring asks for a
/// fork.
fn ring_at_once(rings: u32) -> anyhow::Result<()> {
    let page = ControlPage::map()?;
    let vm_type = vmfork_abi::pad_text("wild").context("a type")?;
    let start = Arc::new(Barrier::new(cpu_count()?));
    let threads = (0..cpu_count()?).map(|cpu| {
        let (page, start) = (page, Arc::clone(&start));
        thread::spawn(move || -> anyhow::Result<()> {
            let mut cpus = CpuSet::new();
            cpus.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &cpus)?;
            permit_doorbell()?;
            start.wait();
            for seq in 1..=u64::from(rings) {
                page.write(&Request { seq, count: 1, vm_type, ..Default::default() });
                ring(doorbell::FORK);
                if page.generation() > 0 {
                    // A copy has nothing to do. Its other threads may ring on until it is gone.
                    nix::sys::reboot::reboot(RebootMode::RB_POWER_OFF)?;
                }
            }
            Ok(())
        })
    });
    for thread in threads.collect::<Vec<_>>() {
        thread.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    // The library maps it in its own way, and the kernel lets there be one way at a time.
    page.unmap()?;
    let fork = fork("tame", 1)?;
    println!("TAME {}", fork.index);
    Ok(())
}

/// The control page, for a guest that does not behave.
#[derive(Clone, Copy)]
struct ControlPage(NonNull<u8>);

// SAFETY: the page stays mapped to the end, and is accessed by volatile bytes only.
unsafe impl Send for ControlPage {}

impl ControlPage {
    fn map() -> anyhow::Result<Self> {
        let memory = fs::OpenOptions::new().read(true).write(true).open("/dev/mem")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let (length, offset) = (PAGE.try_into()?, i64::try_from(CONTROL_PAGE)?);
        // SAFETY: the kernel chooses an address that nothing else uses.
        let page = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, memory, offset) }?;
        Ok(Self(page.cast()))
    }

    /// To be called when nobody uses it any more.
    fn unmap(self) -> nix::Result<()> {
        // SAFETY: the page was mapped by `map`, and its users have ended.
        unsafe { munmap(self.0.cast(), PAGE) }
    }

    fn write(self, request: &Request) {
        for (at, byte) in (vmfork_abi::PAGE.request.offset..).zip(request.to_bytes()) {
            // SAFETY: the request lies within the page, which is mapped.
            unsafe { self.0.as_ptr().wrapping_add(at).write_volatile(byte) };
        }
    }

    fn generation(self) -> u8 {
        // SAFETY: the identity lies within the page, which is mapped.
        unsafe { self.0.as_ptr().wrapping_add(vmfork_abi::PAGE.identity.offset + 12).read_volatile() }
    }
}

/// Lets the calling thread use the doorbell's ports (ioperm).
fn permit_doorbell() -> anyhow::Result<()> {
    // SAFETY: the call touches no memory of this process.
    let result = unsafe { libc::ioperm(u64::from(DOORBELL), 4, 1) };
    Ok(nix::errno::Errno::result(result).map(drop)?)
}

fn ring(command: u32) {
    // SAFETY: the calling thread may use the port, and what stands behind it changes the control page only.
    unsafe { asm!("out dx, eax", in("dx") DOORBELL, in("eax") command, options(nostack, preserves_flags)) };
}

/// Starts this program again, with another command.
fn again(command: &str, Contained { number, timeout_ms }: Contained) -> std::io::Result<Child> {
    let arguments = [u64::from(number)].into_iter().chain(timeout_ms).map(|argument| argument.to_string());
    std::process::Command::new("/proc/self/exe").arg(command).args(arguments).spawn()
}

fn fork_from_containers(containers: u32) -> anyhow::Result<()> {
    // What a slow host makes the kernel say would stand in the middle of a line.
    fs::write("/proc/sys/kernel/printk", "1")?;
    // As vmfork-abi says of programs that use the page themselves. This guest's /dev is the kernel's
    // devtmpfs.
    let turn =
        Flock::lock(fs::File::open("/dev/mem")?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    start_containers(containers, Some(50))?;
    drop(turn);
    start_containers(containers, None)
}

fn start_containers(containers: u32, timeout_ms: Option<u64>) -> anyhow::Result<()> {
    let start = |number| again("container", Contained { number, timeout_ms });
    for mut container in (0..containers).map(start).collect::<Result<Vec<_>, _>>()? {
        let status = container.wait()?;
        ensure!(status.success(), "a container ended with {status}");
    }
    Ok(())
}

fn container(arguments: Contained) -> anyhow::Result<()> {
    let of_its_own = [
        CloneFlags::CLONE_NEWNS,
        CloneFlags::CLONE_NEWCGROUP,
        CloneFlags::CLONE_NEWIPC,
        CloneFlags::CLONE_NEWNET,
        CloneFlags::CLONE_NEWPID,
        CloneFlags::CLONE_NEWUTS,
    ];
    unshare(of_its_own.into_iter().collect())?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(none, "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    if arguments.number % 2 == 1 {
        mount(none, "/dev", Some("tmpfs"), MsFlags::empty(), none)?;
        for (path, minor) in [("/dev/mem", 1), ("/dev/null", 3), ("/dev/urandom", 9)] {
            mknod(path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(1, minor))?;
        }
    }
    let status = again("contained", arguments)?.wait()?;
    ensure!(status.success(), "the program ended with {status}");
    Ok(())
}

fn contained(Contained { number, timeout_ms }: Contained) -> anyhow::Result<()> {
    let vm_type = format!("w{number}");
    let request = ForkRequest::new(&vm_type, 1 + number % 2)?;
    let timeout = timeout_ms.map(Duration::from_millis);
    let forked = request_fork(&timeout.map_or(request, |timeout| request.with_timeout(timeout)))?;
    let told = match &forked {
        Ok(fork) => format!("{} {}", fork.role, fork.count),
        Err(error) => match (error.role(), error.code()) {
            (None, Some(code)) => format!("refused {code:?}"),
            (Some(role), None) => format!("{role} of another"),
            _ => format!("{error:?}"),
        },
    };
    println!("TOLD {vm_type} {told}");
    if forked.is_ok_and(|fork| fork.role == Role::Child) {
        tcdrain(stdout()).context("the console does not take its output")?;
        // In a namespace of processes, reboot(2) is for that namespace alone.
        fs::write("/proc/sysrq-trigger", "o")?;
    }
    Ok(())
}

fn errors(times: u32) -> anyhow::Result<()> {
    for _ in 0..times {
        match try_fork("web", 2)? {
            Ok(fork) => {
                println!("FORKED {}", fork.index);
                if fork.role == Role::Child {
                    return Ok(());
                }
            }
            Err(error) => {
                ensure!(error.role().is_none(), "a failed fork has made a {:?}", error.role());
                println!("ERROR {}", error.code().context(error)?.number());
            }
        }
    }
    Ok(())
}

fn storm() -> anyhow::Result<()> {
    loop {
        // The test kills children: also those that a fork waits for.
        match try_fork("storm", 2)? {
            Ok(fork) if fork.role == Role::Child => {
                println!("STORM child");
                thread::sleep(Duration::from_millis(300));
                return Ok(());
            }
            Ok(_) => println!("STORM forked"),
            Err(error) => println!("STORM {error}"),
        }
    }
}
