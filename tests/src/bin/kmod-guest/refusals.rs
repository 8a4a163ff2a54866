//! What the module must not do.

use std::{
    fs::File,
    io::Read,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
};

use anyhow::anyhow;
use nix::{
    errno::Errno,
    libc::c_void,
    sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect},
};
use vmfork_abi::{
    MAX_CHILDREN,
    device::{self as abi, ForkArguments, Notice, StatusArguments},
    pad_text,
};

use crate::{
    complaints,
    device::{self, size},
    drain, is_child,
};

const PAGE: usize = 4096;

pub(crate) fn run() -> anyhow::Result<()> {
    let mut file = device::open()?;
    let before = device::status(&file)?.forks;
    forks(&file);
    addresses(&file)?;
    numbers(&file);
    let short = file.read(&mut [0; Notice::BYTES - 1]).map(|_| ()).map_err(|error| error.raw_os_error());
    println!("REFUSED short-read {}", name(short.map_err(|errno| Errno::from_raw(errno.unwrap_or(0)))));
    let reader = File::open(abi::PATH)?;
    device::identity(&reader)?;
    let looked = device::fork(&reader, device::fork_arguments(1)).map(drop).map_err(|refused| refused.errno);
    println!("REFUSED reader {}", name(looked));
    mappings(&file)?;
    println!("FORKS {}", device::status(&file)?.forks - before);
    // The device still does what it is for.
    drain()?;
    let forked = device::fork(&file, device::fork_arguments(1)).map_err(|refused| anyhow!("{refused:?}"))?;
    println!("FORKED {}", if is_child(&forked.identity) { "child" } else { "parent" });
    complaints()
}

fn name(result: Result<(), Errno>) -> String {
    result.map_or_else(|errno| format!("{errno:?}"), |()| "nothing".to_owned())
}

/// Arguments that are each wrong in one way.
fn forks(file: &File) {
    let good = device::fork_arguments(1);
    let mut unpadded = pad_text("web").unwrap_or_default();
    unpadded[10] = b'x';
    let cases = [
        ("size", ForkArguments { bytes: good.bytes - 8, ..good }),
        ("no-size", ForkArguments { bytes: 0, ..good }),
        ("version", ForkArguments { version: abi::VERSION + 1, ..good }),
        ("no-version", ForkArguments { version: 0, ..good }),
        ("no-children", ForkArguments { count: 0, ..good }),
        ("too-many-children", ForkArguments { count: MAX_CHILDREN + 1, ..good }),
        ("flags", ForkArguments { flags: 1 << 31, ..good }),
        ("no-type", ForkArguments { vm_type: [0; 32], ..good }),
        ("type", ForkArguments { vm_type: pad_text("Web").unwrap_or_default(), ..good }),
        ("unpadded-type", ForkArguments { vm_type: unpadded, ..good }),
        ("deadline", ForkArguments { deadline_ns: 1, ..good }),
    ];
    for (case, arguments) in cases {
        println!(
            "REFUSED {case} {}",
            name(device::fork(file, arguments).map(drop).map_err(|refused| refused.errno))
        );
    }
    // Refused by the VMM, which says so in its own words.
    let wild = ForkArguments { vm_type: pad_text("forbidden").unwrap_or_default(), ..good };
    if let Err(refused) = device::fork(file, wild) {
        println!("REFUSED by-vmm {:?} {}", refused.errno, refused.code);
    }
}

/// Arguments and answers where there is no memory for them.
fn addresses(file: &File) -> anyhow::Result<()> {
    let fd = file.as_raw_fd();
    let at = |address: usize| ptr::without_provenance_mut::<u8>(address);
    for (case, address) in
        [("null", 0), ("low", 8), ("kernel", 0xffff_8000_0000_0000), ("last", usize::MAX - 7)]
    {
        for (what, number) in [("fork", abi::FORK), ("status", abi::STATUS), ("identity", abi::IDENTITY)] {
            println!("REFUSED {what}-at-{case} {}", name(device::control(fd, number, at(address))));
        }
    }
    // Memory that can be read and not written.
    let read_only = pages(1)?;
    let good = device::fork_arguments(1).to_bytes();
    // SAFETY: the page is there, and longer than the arguments.
    unsafe { ptr::copy_nonoverlapping(good.as_ptr(), read_only.as_ptr(), good.len()) };
    protect(read_only, ProtFlags::PROT_READ)?;
    println!("REFUSED fork-read-only {}", name(device::control(fd, abi::FORK, read_only.as_ptr())));
    // Arguments that reach out of their page.
    let two = pages(2)?;
    // SAFETY: the second page lies behind the first.
    let second = unsafe { two.add(PAGE) };
    protect(second, ProtFlags::PROT_NONE)?;
    // SAFETY: this still lies in the first page.
    let across = unsafe { second.sub(good.len() - 8) };
    // SAFETY: as many bytes lie before the second page.
    unsafe { ptr::copy_nonoverlapping(good.as_ptr(), across.as_ptr(), good.len() - 8) };
    println!("REFUSED fork-across {}", name(device::control(fd, abi::FORK, across.as_ptr())));
    // Copies that can't be told.
    for (case, copies_address) in [("nowhere", 0), ("low", 8), ("kernel", 0xffff_8000_0000_0000)] {
        let mut bytes =
            ForkArguments { copies_room: 4, copies_address, ..device::fork_arguments(4) }.to_bytes();
        println!("REFUSED copies-{case} {}", name(device::control(fd, abi::FORK, bytes.as_mut_ptr())));
    }
    Ok(())
}

/// Numbers of no ioctl.
fn numbers(file: &File) {
    let mut bytes = [0; 8192];
    let smaller = abi::FORK - (8 << 16);
    for (case, number) in [("number", abi::FORK + 100), ("smaller", smaller), ("none", 0), ("tcgets", 0x5401)]
    {
        println!(
            "REFUSED other-{case} {}",
            name(device::control(file.as_raw_fd(), number, bytes.as_mut_ptr()))
        );
    }
    let mut old = StatusArguments { bytes: 16, version: abi::VERSION, ..Default::default() }.to_bytes();
    println!(
        "REFUSED status-size {}",
        name(device::control(file.as_raw_fd(), abi::STATUS, old.as_mut_ptr()))
    );
    let mut old = Notice { bytes: size(Notice::BYTES), version: 9, ..Default::default() }.to_bytes();
    println!(
        "REFUSED identity-version {}",
        name(device::control(file.as_raw_fd(), abi::IDENTITY, old.as_mut_ptr()))
    );
}

fn mappings(file: &File) -> anyhow::Result<()> {
    let (read, write) = (ProtFlags::PROT_READ, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    let cases = [
        ("writable", PAGE, write, MapFlags::MAP_SHARED, 0),
        ("private-writable", PAGE, write, MapFlags::MAP_PRIVATE, 0),
        ("two-pages", 2 * PAGE, read, MapFlags::MAP_SHARED, 0),
        ("second-page", PAGE, read, MapFlags::MAP_SHARED, i64::try_from(PAGE)?),
    ];
    for (case, bytes, protection, flags, offset) in cases {
        // SAFETY: the kernel chooses an address that nothing else uses.
        let mapped = unsafe { mmap(None, bytes.try_into()?, protection, flags, file, offset) };
        println!("REFUSED map-{case} {}", name(mapped.map(drop)));
    }
    // SAFETY: as above.
    let page = unsafe { mmap(None, PAGE.try_into()?, read, MapFlags::MAP_SHARED, file, 0) }?;
    println!("REFUSED map-then-writable {}", name(protect(page.cast(), write)));
    Ok(())
}

fn pages(count: usize) -> anyhow::Result<NonNull<u8>> {
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses an address that nothing else uses.
    Ok(unsafe { mmap_anonymous(None, (count * PAGE).try_into()?, access, MapFlags::MAP_PRIVATE) }?.cast())
}

fn protect(page: NonNull<u8>, protection: ProtFlags) -> nix::Result<()> {
    // SAFETY: the page belongs to the test, which looks at it no more where it can't.
    unsafe { mprotect(page.cast::<c_void>(), PAGE, protection) }
}
