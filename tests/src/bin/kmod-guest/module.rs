//! The module itself, loaded and unloaded while others use it.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail, ensure};
use nix::{
    errno::Errno,
    libc,
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::{complaints, device, drain, is_child};

/// The module's file, for the kernel that runs.
fn path() -> anyhow::Result<PathBuf> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(PathBuf::from(format!("/lib/modules/{}/extra/vmfork.ko", release.trim())))
}

/// Loads it (finit_module).
pub(crate) fn load() -> Result<(), Errno> {
    let file = path().ok().and_then(|path| File::open(path).ok()).ok_or(Errno::ENOENT)?;
    // SAFETY: the parameters are an empty string.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    Errno::result(result).map(drop)
}

/// Unloads it, unless somebody uses it (delete_module).
fn unload() -> Result<(), Errno> {
    // SAFETY: the name is a string.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, c"vmfork".as_ptr(), libc::O_NONBLOCK) };
    Errno::result(result).map(drop)
}

pub(crate) fn run(rounds: u32) -> anyhow::Result<()> {
    let file = device::open()?;
    println!("UNLOAD open {:?}", unload());
    // SAFETY: the kernel chooses an address that nothing else uses.
    let page = unsafe { mmap(None, 4096.try_into()?, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, &file, 0) }?;
    drop(file);
    println!("UNLOAD mapped {:?}", unload());
    // SAFETY: the page was mapped above, and nobody has looked at it.
    unsafe { munmap(page, 4096) }?;
    println!("UNLOAD unused {:?}", unload_soon());
    println!("UNLOAD again {:?}", unload());
    ensure!(
        device::open().is_err_and(|error| error.kind() == io::ErrorKind::NotFound),
        "the device is still there"
    );
    println!("LOAD {:?}", load());
    println!("LOAD again {:?}", load());

    let ended = Arc::new(AtomicBool::new(false));
    let opened = Arc::new(AtomicU32::new(0));
    let users: Vec<_> = (0..2).map(|_| use_it(Arc::clone(&ended), Arc::clone(&opened))).collect();
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut reloaded = 0;
    while reloaded < rounds {
        ensure!(Instant::now() < deadline, "only {reloaded} rounds of {rounds}");
        match unload() {
            Ok(()) => {
                load()?;
                reloaded += 1;
            }
            Err(Errno::EAGAIN) => thread::yield_now(),
            Err(errno) => bail!("the module can't be unloaded: {errno}"),
        }
    }
    ended.store(true, Ordering::SeqCst);
    for user in users {
        user.join().map_err(|_| anyhow!("a thread panicked"))??;
    }
    println!("RELOADED {reloaded} {}", opened.load(Ordering::SeqCst));
    drain()?;
    let forked = device::fork(&device::open()?, device::fork_arguments(1))
        .map_err(|refused| anyhow!("{refused:?}"))?;
    println!("FORKED {}", if is_child(&forked.identity) { "child" } else { "parent" });
    complaints()
}

/// Unloads it, as soon as the kernel has put away what was used before.
fn unload_soon() -> Result<(), Errno> {
    for _ in 0..200 {
        match unload() {
            Err(Errno::EAGAIN) => thread::sleep(Duration::from_millis(10)),
            result => return result,
        }
    }
    unload()
}

/// Opens, asks and closes, as long as it is not told to end.
fn use_it(ended: Arc<AtomicBool>, opened: Arc<AtomicU32>) -> thread::JoinHandle<anyhow::Result<()>> {
    thread::spawn(move || {
        while !ended.load(Ordering::SeqCst) {
            match device::open() {
                Ok(file) => {
                    ensure!(device::status(&file)?.control_page_gpa != 0, "a device without a control page");
                    opened.fetch_add(1, Ordering::SeqCst);
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {}
                    _ => bail!("the device can't be opened: {error}"),
                },
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    })
}
