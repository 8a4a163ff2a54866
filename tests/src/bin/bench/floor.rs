//! The floor: the raw system calls of a child's launch, straight down, in a warm VM that stands ready.
//!
//! Map the image, write the registers, run to the first port write. Whatever a fork does beyond that is its
//! own cost. Here too are the floors of the other figures: a VM from nothing, many of them at once, and a
//! plain copy of memory.

use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    process,
    ptr::NonNull,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::{
    libc,
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, mremap, munmap},
        wait::wait,
    },
    unistd::{ForkResult, fork, ftruncate},
};

use crate::REST;

/// Where the guest's page tables and code lie in its memory.
const TABLES: usize = 0x1000;
pub(crate) const CODE: usize = 0x20_0000;

/// A private view of an image.
pub(crate) const PRIVATE: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);

/// Where the guest finds its control page.
pub(crate) const CONTROL: u64 = 0xd000_0000;

/// `mov eax, [rsi]; mov edx, 0x501; out dx, eax; jmp` to the start: what a guest does when its fork returns.
const INSTRUCTIONS: [u8; 10] = [0x8b, 0x06, 0xba, 0x01, 0x05, 0x00, 0x00, 0xef, 0xeb, 0xf6];

/// Where it begins to write to ECX pages from RDI on, before it does that.
const WRITING: usize = CODE - WRITE.len();

/// `mov [rdi], al; add rdi, 4096; dec ecx; jnz` to the start.
const WRITE: [u8; 13] = [0x88, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0xff, 0xc9, 0x75, 0xf3];

/// Memory that it writes to.
const DATA: usize = 4 << 20;

/// A mapped range; unmapped on drop.
#[derive(Debug)]
pub(crate) struct Range {
    start: NonNull<libc::c_void>,
    bytes: usize,
}

impl Range {
    pub(crate) fn reserve(bytes: usize) -> Result<Self> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        let length = bytes.try_into().context("an empty range")?;
        // SAFETY: a new mapping at an address that the kernel chooses touches no existing one.
        let start = unsafe { mmap_anonymous(None, length, ProtFlags::PROT_NONE, flags) }?;
        Ok(Self { start, bytes })
    }

    /// Maps a file over all of it.
    pub(crate) fn map(&self, file: &OwnedFd, flags: MapFlags) -> Result<()> {
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let (address, length) = (self.start.addr(), self.bytes.try_into()?);
        // SAFETY: the range is this value's own, and no Rust object lies in it.
        unsafe { mmap(Some(address), length, protection, flags | MapFlags::MAP_FIXED, file.as_fd(), 0) }?;
        Ok(())
    }

    /// Moves what is mapped here to another range, of the same size.
    pub(crate) fn move_to(&self, other: &Self) -> Result<()> {
        assert_eq!(self.bytes, other.bytes, "ranges of one size");
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: both ranges are their owners' own, and no Rust object lies in either.
        unsafe { mremap(self.start, self.bytes, other.bytes, flags, Some(other.start)) }?;
        Ok(())
    }

    pub(crate) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes, "a write within the range");
        // SAFETY: the range is mapped writable, and long enough, as just checked.
        let target = unsafe { self.start.cast::<u8>().byte_add(at) };
        // SAFETY: as above; the two do not overlap.
        unsafe { target.copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and nobody refers into it any more.
        if let Err(errno) = unsafe { munmap(self.start, self.bytes) } {
            eprintln!("bench: munmap failed: {errno}");
        }
    }
}

/// An image of a guest at CPL 3 that is about to write a port, all of its memory resident.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) file: OwnedFd,
    pub(crate) bytes: usize,
}

impl Image {
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        let file = memfd_create("bench-image", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&file, bytes.try_into()?)?;
        let range = Range::reserve(bytes)?;
        range.map(&file, MapFlags::MAP_SHARED)?;
        // SAFETY: populating changes no content.
        unsafe { madvise(range.start, bytes, MmapAdvise::MADV_POPULATE_WRITE) }?;
        // User pages, present and writable: the first GiB and the control page's by pages of 2 MiB.
        let entry = |target: usize, flags: u64| (target as u64 | flags).to_le_bytes();
        range.write(TABLES, &entry(TABLES + 0x1000, 7));
        range.write(TABLES + 0x1000, &entry(TABLES + 0x2000, 7));
        range.write(TABLES + 0x1018, &entry(TABLES + 0x3000, 7));
        for page in 0..512 {
            range.write(TABLES + 0x2000 + 8 * page, &entry(page << 21, 0x87));
            range.write(TABLES + 0x3000 + 8 * page, &entry(3 << 30 | page << 21, 0x87));
        }
        range.write(CODE, &INSTRUCTIONS);
        range.write(WRITING, &WRITE);
        Ok(Self { file, bytes })
    }
}

/// A VM that stands ready to become a copy of an image, as near to its first run as a VM can be: made in the
/// order that costs no waiting (memory slots before the interrupt controllers, no PIT).
#[derive(Debug)]
pub(crate) struct BlankVm {
    pub(crate) vcpu: VcpuFd,
    pub(crate) vm: VmFd,
    /// What a fresh vCPU holds.
    pub(crate) fresh: kvm_sregs,
    pub(crate) memory: Range,
    control: Range,
}

/// What is at the addresses of a warm VM's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Addresses {
    /// Nothing: as `host-vmm` has it.
    Empty,
    /// A mapping that nobody may access, which the image's takes the place of.
    Reserved,
}

impl BlankVm {
    pub(crate) fn new(kvm: &Kvm, bytes: usize, addresses: Addresses) -> Result<Self> {
        let vm = kvm.create_vm()?;
        let memory = Range::reserve(bytes)?;
        let control = Range::reserve(4096)?;
        let page = memfd_create("bench-control", MFdFlags::MFD_CLOEXEC)?;
        ftruncate(&page, 4096)?;
        control.map(&page, MapFlags::MAP_SHARED)?;
        for (slot, range, gpa) in [(0, &control, CONTROL), (1, &memory, 0)] {
            // What lies below the gap is enough here.
            let memory_size = (range.bytes as u64).min(3 << 30);
            let userspace_addr = range.start.as_ptr() as u64;
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size,
                userspace_addr,
            };
            // SAFETY: the range stays this value's own for as long as the VM lives.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        vm.create_irq_chip()?;
        let vcpu = vm.create_vcpu(0)?;
        vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        let fresh = vcpu.get_sregs()?;
        let blank = Self { vcpu, vm, fresh, memory, control };
        if addresses == Addresses::Empty {
            // SAFETY: the range is this value's own, and no Rust object lies in it.
            unsafe { munmap(blank.memory.start, blank.memory.bytes) }?;
        }
        Ok(blank)
    }

    /// Runs `out 0x80, al` in the control page, in real mode.
    pub(crate) fn warm_up(&mut self) -> Result<()> {
        self.control.write(0, &[0xe6, 0x80]);
        let mut system = self.fresh;
        system.cs.base = CONTROL;
        self.vcpu.set_sregs(&system)?;
        self.vcpu.set_regs(&kvm_regs { rflags: 2, ..Default::default() })?;
        ensure!(matches!(self.vcpu.run()?, VcpuExit::IoOut(0x80, _)), "the floor's VM does not run");
        self.complete_exit()
    }

    /// The straight way from an image to the guest's first port write.
    pub(crate) fn launch(&mut self, image: &Image) -> Result<()> {
        self.memory.map(&image.file, PRIVATE)?;
        self.begin(CODE, 0)?;
        self.run()
    }

    /// Makes it the image's own VM, which writes to the file itself, and has it write to so many bytes.
    pub(crate) fn write(&mut self, image: &Image, bytes: usize) -> Result<()> {
        self.memory.map(&image.file, MapFlags::MAP_SHARED)?;
        self.begin(WRITING, u64::try_from(bytes)? / 4096)?;
        self.run()
    }

    fn begin(&self, at: usize, pages: u64) -> Result<()> {
        self.vcpu.set_sregs(&long_mode(self.fresh, 3))?;
        let (rip, rcx, rdi) = (at as u64, pages, DATA as u64);
        Ok(self.vcpu.set_regs(&kvm_regs {
            rip,
            rcx,
            rdi,
            rsi: CONTROL,
            rflags: 0x3002,
            ..Default::default()
        })?)
    }

    /// Runs on, to the next port write.
    pub(crate) fn run(&mut self) -> Result<()> {
        match self.vcpu.run()? {
            VcpuExit::IoOut(0x501, _) => Ok(()),
            other => bail!("the floor's guest did {other:?}"),
        }
    }

    /// Completes the last exit, as it is done before registers are read.
    pub(crate) fn complete_exit(&mut self) -> Result<()> {
        self.vcpu.set_kvm_immediate_exit(1);
        ensure!(self.vcpu.run().is_err(), "the floor's guest does not stop");
        self.vcpu.set_kvm_immediate_exit(0);
        Ok(())
    }

    /// Goes on where another one was stopped.
    pub(crate) fn take_over(&self, other: &Self) -> Result<()> {
        self.vcpu.set_sregs(&other.vcpu.get_sregs()?)?;
        Ok(self.vcpu.set_regs(&other.vcpu.get_regs()?)?)
    }
}

/// Long mode at a privilege level, with the page tables of [`Image`].
pub(crate) fn long_mode(mut fresh: kvm_sregs, level: u8) -> kvm_sregs {
    let code = kvm_segment {
        limit: u32::MAX,
        selector: 0x30 | u16::from(level),
        type_: 11,
        present: 1,
        dpl: level,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { type_: 3, selector: 0x28 | u16::from(level), l: 0, db: 1, ..code };
    fresh.cs = code;
    (fresh.ds, fresh.es, fresh.fs, fresh.gs, fresh.ss) = (data, data, data, data, data);
    fresh.cr0 = 0x8005_0033;
    fresh.cr3 = TABLES as u64;
    fresh.cr4 = 0x20;
    fresh.efer = 0xd00;
    fresh
}

/// Makes a warm VM and launches a child in it: how long each took.
pub(crate) fn child(kvm: &Kvm, image: &Image, addresses: Addresses) -> Result<(Duration, Duration)> {
    let started = Instant::now();
    let mut blank = BlankVm::new(kvm, image.bytes, addresses)?;
    let made = started.elapsed();
    blank.warm_up()?;
    // A warm VM that stands ready has waited, as the others have.
    thread::sleep(REST);
    let started = Instant::now();
    blank.launch(image)?;
    Ok((made, started.elapsed()))
}

/// What memcpy takes for so many bytes, on all processors: into memory that nobody has used before, and into
/// memory that is there.
pub(crate) fn copy(bytes: usize) -> Result<(Duration, Duration)> {
    let (source, mut target) = (vec![1u8; bytes], vec![0u8; bytes]);
    let share = bytes.div_ceil(thread::available_parallelism()?.get());
    let mut pass = || {
        let started = Instant::now();
        thread::scope(|scope| {
            for (from, to) in source.chunks(share).zip(target.chunks_mut(share)) {
                scope.spawn(|| to.copy_from_slice(std::hint::black_box(from)));
            }
        });
        started.elapsed()
    };
    Ok((pass(), pass()))
}

/// Has the allocator ask the kernel for each large piece of memory anew, instead of keeping some.
pub(crate) fn keep_no_memory() {
    // SAFETY: the call changes a setting of the allocator, from the one thread that there is.
    let done = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10) };
    assert_eq!(done, 1, "glibc's allocator");
}

/// `count` VMs from one image, each in a process of its own, from nothing: until all have run, and how long
/// it takes to end them.
///
/// To be called in a process with one thread.
pub(crate) fn many(count: usize, mem_bytes: usize) -> Result<(Duration, Duration)> {
    let image = Image::new(mem_bytes)?;
    let (mut ran, has_run) = io::pipe()?;
    let (release, hold) = io::pipe()?;
    let started = Instant::now();
    for _ in 0..count {
        // SAFETY: this process has one thread, so that no lock is held by another one in the copy.
        if let ForkResult::Child = unsafe { fork() }? {
            drop(hold);
            let ran = launch_alone(&image).is_ok();
            let told = (&has_run).write_all(&[u8::from(ran)]).and_then(|()| (&release).read(&mut [0]));
            process::exit(i32::from(told.is_err()));
        }
    }
    for _ in 0..count {
        let mut byte = [0];
        ran.read_exact(&mut byte)?;
        ensure!(byte == [1], "a VM of the floor did not run");
    }
    let all_ran = started.elapsed();
    let started = Instant::now();
    drop(hold);
    for _ in 0..count {
        wait()?;
    }
    Ok((all_ran, started.elapsed()))
}

/// Makes a VM and runs it. The VM lives as long as the process.
fn launch_alone(image: &Image) -> Result<()> {
    let kvm = Kvm::new()?;
    let mut blank = BlankVm::new(&kvm, image.bytes, Addresses::Empty)?;
    blank.launch(image)?;
    std::mem::forget(blank);
    Ok(())
}
