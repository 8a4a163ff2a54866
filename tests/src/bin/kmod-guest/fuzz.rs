//! Anything that a process can do with the device, at random. The VMM is to refuse all forks meanwhile.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{anyhow, ensure};
use fastrand::Rng;
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
};
use vmfork_abi::{
    ListedCopy,
    device::{FORK, ForkArguments, IDENTITY, Notice, STATUS, StatusArguments, VERSION},
    pad_text,
};

use crate::{
    complaints,
    device::{self, size},
};

const THREADS: usize = 4;
const PAGE: usize = 4096;

pub(crate) fn run(seconds: u64, seed: u64) -> anyhow::Result<()> {
    let file = Arc::new(device::open()?);
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let deadline = Instant::now() + Duration::from_secs(seconds);
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let file = Arc::clone(&file);
            let mut rng = Rng::with_seed(seed.wrapping_add(number as u64));
            thread::spawn(move || {
                let mut calls = 0u64;
                // Where answers may go: memory of the fuzzer's own, which nothing else lies in.
                let mut memory = vec![0u8; 32 * PAGE];
                while Instant::now() < deadline {
                    call(&mut rng, file.as_raw_fd(), &mut memory);
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    let mut calls = 0;
    for thread in threads {
        calls += thread.join().map_err(|_| anyhow!("a thread panicked"))?;
    }
    ensure!(device::identity(&file)?.generation == 0, "a fork was made");
    println!("FUZZED {calls}");
    complaints()
}

fn call(rng: &mut Rng, fd: RawFd, memory: &mut [u8]) {
    match rng.u8(..16) {
        0..8 => {
            let number = number(rng);
            let address = place(rng, number, memory);
            // Whatever it answers.
            let _answer = device::control(fd, number, address);
        }
        8 | 9 => {
            let (address, bytes) = (address(rng, memory), length(rng, memory.len()));
            // SAFETY: the kernel checks the address; what it may write to is the fuzzer's memory.
            unsafe { libc::read(fd, address.cast(), bytes) };
        }
        10 => {
            let (address, bytes) = (address(rng, memory), length(rng, memory.len()));
            // SAFETY: the kernel checks the address.
            unsafe { libc::write(fd, address.cast(), bytes) };
        }
        11 => {
            let mut polled = libc::pollfd { fd, events: rng.i16(..), revents: 0 };
            // SAFETY: one entry is there.
            unsafe { libc::poll(&raw mut polled, 1, rng.i32(0..2)) };
        }
        12 | 13 => map(rng, fd),
        14 => {
            // SAFETY: these calls touch no memory of this process.
            unsafe { libc::lseek(fd, rng.i64(..), rng.i32(0..5)) };
        }
        _ => {
            // Another file, for a moment.
            if let Ok(other) = device::open() {
                let _identity = device::identity(&other);
            }
        }
    }
}

/// Maps as it comes, and unmaps what came of it.
fn map(rng: &mut Rng, fd: RawFd) {
    let bytes = rng.usize(0..4) * PAGE;
    let (protection, flags) = (rng.i32(0..8), rng.i32(1..4));
    let offset = rng.i64(0..3) * 4096;
    // SAFETY: the kernel chooses an address that nothing else uses.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, fd, offset) };
    if page != libc::MAP_FAILED {
        if protection & libc::PROT_READ != 0 {
            // SAFETY: the page can be read.
            let _generation = unsafe { page.cast::<u64>().read_volatile() };
        }
        // SAFETY: the pages are the fuzzer's, which looks at them no more.
        unsafe { libc::mprotect(page, bytes, rng.i32(0..8)) };
        // SAFETY: as above.
        unsafe { libc::munmap(page, bytes) };
    }
}

fn number(rng: &mut Rng) -> u32 {
    match rng.u8(..8) {
        0..3 => FORK,
        3 | 4 => STATUS,
        5 => IDENTITY,
        6 => FORK ^ 1 << rng.u32(..32),
        _ => rng.u32(..),
    }
}

fn length(rng: &mut Rng, most: usize) -> usize {
    [0, 1, Notice::BYTES - 1, Notice::BYTES, Notice::BYTES + 1, most][rng.usize(..6)]
}

/// An address: mostly in the fuzzer's memory, or nobody's.
fn address(rng: &mut Rng, memory: &mut [u8]) -> *mut u8 {
    match rng.u8(..6) {
        0 => std::ptr::null_mut(),
        1 => std::ptr::without_provenance_mut(rng.usize(..PAGE)),
        // The kernel's half, and the hole before it.
        2 => std::ptr::without_provenance_mut(rng.usize(..) | 1 << 63),
        _ => memory.as_mut_ptr(),
    }
}

/// Puts arguments somewhere, and returns the address.
fn place(rng: &mut Rng, number: u32, memory: &mut [u8]) -> *mut u8 {
    let mut bytes = arguments(rng, number, memory.as_mut_ptr() as u64 + 16 * PAGE as u64);
    for _ in 0..rng.usize(..3) {
        let at = rng.usize(..bytes.len());
        bytes[at] = rng.u8(..);
    }
    // Copies must not be told to any memory but the fuzzer's: an address that was changed is the kernel's or
    // low.
    guard(number, &mut bytes, memory);
    let offset = [0, 1, 8, 4001][rng.usize(..4)];
    memory[offset..offset + bytes.len()].copy_from_slice(&bytes);
    if rng.u8(..8) == 0 { address(rng, memory) } else { memory[offset..].as_mut_ptr() }
}

fn arguments(rng: &mut Rng, number: u32, copies: u64) -> Vec<u8> {
    let copies_address = [0, 8, 1 << 63, copies, copies][rng.usize(..5)];
    let copies_room = [0, 1, 3, 255, 1024, u32::MAX][rng.usize(..6)];
    let vm_type = pad_text(["web", "a", "x-1"][rng.usize(..3)]).unwrap_or_default();
    match number {
        STATUS => {
            let bytes = size(StatusArguments::BYTES);
            StatusArguments { bytes, version: VERSION, copies_address, copies_room, ..Default::default() }
                .to_bytes()
                .to_vec()
        }
        IDENTITY => {
            Notice { bytes: size(Notice::BYTES), version: VERSION, ..Default::default() }.to_bytes().to_vec()
        }
        _ => ForkArguments {
            bytes: size(ForkArguments::BYTES),
            version: VERSION,
            count: [1, 2, 64, 1024][rng.usize(..4)],
            flags: rng.u32(..4),
            deadline_ns: [0, 1, u64::MAX, rng.u64(..)][rng.usize(..4)],
            vm_type,
            copies_address,
            copies_room,
            ..Default::default()
        }
        .to_bytes()
        .to_vec(),
    }
}

/// Keeps the address for copies out of the memory of this process that is not the fuzzer's.
fn guard(number: u32, bytes: &mut [u8], memory: &[u8]) {
    let at = match number {
        STATUS => 8,
        IDENTITY => return,
        _ => 56,
    };
    let Some(field) = bytes.get_mut(at..at + 8) else { return };
    let value = u64::from_le_bytes(field.try_into().unwrap_or_default());
    let (start, end) = (memory.as_ptr() as u64, memory.as_ptr() as u64 + memory.len() as u64);
    let in_memory = value >= start && value + 1024 * ListedCopy::BYTES as u64 <= end;
    if !in_memory && value >= PAGE as u64 && value >> 63 == 0 {
        field.copy_from_slice(&(value | 1 << 63).to_le_bytes());
    }
}
