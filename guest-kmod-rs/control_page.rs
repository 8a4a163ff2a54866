// SPDX-License-Identifier: GPL-2.0

//! The control page, and the pages behind it, as this module uses them: what they are, who this VM
//! is, and one request with its answer.
//!
//! The VMM writes this memory too. So each part is copied out once, by volatile reads, and only the
//! copy is looked at.

use core::{
    ptr::{addr_of_mut, NonNull},
    sync::atomic::{fence, Ordering},
};

use kernel::{c_str, ffi::c_int, prelude::*};
use vmfork_abi::{
    cpuid::Interface, CopyList, ErrorCode, Header, Identity, ListedCopy, Request, Response, Role,
    Status, ABI_VERSION, MAGIC, MAX_CHILDREN, PAGE, PAGE_BYTES,
};

use crate::bindings;

/// Most that a VMM may show from the page's address on, in bytes.
const MAX_BYTES: usize = 1 << 20;

/// How often is looked again at what should stay the same, at most: a VMM that goes on changing it
/// does not keep its guest here.
pub(crate) const STABLE: u32 = 16;

/// A control page whose header was checked. Nobody else has it: a kernel with
/// `CONFIG_STRICT_DEVMEM` keeps `/dev/mem` away from it meanwhile.
pub(crate) struct ControlPage {
    memory: Memory,
    _claim: Claim,
    gpa: u64,
}

/// Who a VM is, and how many copies are listed that its latest fork has made.
pub(crate) struct RawReport {
    pub(crate) identity: Identity,
    /// As the VMM says; 0 in a VM that is no parent, and where the VMM lists none.
    pub(crate) listed: u32,
}

/// How a request can fail.
pub(crate) enum Failure {
    /// The VMM did not look at it.
    NotAnswered,
    /// This VM is a copy of the one that has asked, and comes of somebody else's request.
    Copied,
    /// The VMM said no, and why.
    Refused(ErrorCode),
    /// The VMM's answer makes no sense.
    Nonsense { status: u32, error: u32 },
}

impl ControlPage {
    /// Maps the page, checks that it is one, and keeps others from it.
    ///
    /// # Errors
    ///
    /// `ENODEV` where it is none, `EBUSY` where another driver has it, `ENOMEM`; the kernel's log
    /// tells more.
    pub(crate) fn open(interface: &Interface) -> Result<Self> {
        let gpa = interface.control_page_gpa;
        if gpa % PAGE_BYTES as u64 != 0 {
            pr_err!("the VMM says that the control page is at {gpa:#x}, in the middle of a page\n");
            return Err(ENODEV);
        }
        let header = Header::from_bytes(&Memory::map(gpa, PAGE_BYTES)?.read(PAGE.header.offset)?);
        if header.magic != MAGIC
            || header.abi_version != ABI_VERSION
            || header.page_bytes as usize != PAGE_BYTES
        {
            pr_err!("there is no control page of ABI version {ABI_VERSION} at {gpa:#x}\n");
            return Err(ENODEV);
        }
        let copies_end = u64::from(header.copies_offset) + u64::from(header.copies_bytes);
        let generation_end = match header.generation_offset {
            0 => 0,
            offset => u64::from(offset) + PAGE_BYTES as u64,
        };
        let bytes = copies_end
            .max(generation_end)
            .max(PAGE_BYTES as u64)
            .next_multiple_of(PAGE_BYTES as u64) as usize;
        if bytes > MAX_BYTES {
            pr_err!("the control page at {gpa:#x} says that it is {bytes} bytes long\n");
            return Err(ENODEV);
        }
        let claim = Claim::new(gpa, bytes)?;
        Ok(Self {
            memory: Memory::map(gpa, bytes)?,
            _claim: claim,
            gpa,
        })
    }

    /// Guest-physical address of the page.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Guest-physical address of the page with the generation, where the VMM has one.
    pub(crate) fn generation_gpa(&self) -> Option<u64> {
        let offset = u64::from(self.header().generation_offset);
        let fits = offset != 0
            && offset % PAGE_BYTES as u64 == 0
            && offset + PAGE_BYTES as u64 <= self.memory.bytes as u64;
        fits.then(|| self.gpa + offset)
    }

    /// The VMM's version of the ABI.
    pub(crate) fn abi_version(&self) -> u32 {
        self.header().abi_version
    }

    /// Who this VM is, unchecked. Where the VM becomes a copy meanwhile, what was read of it before
    /// is another's: it is read until it stays the same.
    pub(crate) fn identity(&self) -> Identity {
        let read = || Identity::from_bytes(&self.part(PAGE.identity.offset));
        let mut last = read();
        for _ in 0..STABLE {
            let now = read();
            if now == last {
                break;
            }
            last = now;
        }
        last
    }

    /// Who this VM is, and how it came out of its latest fork; of the copies, as many as fit go to
    /// `copies`. Where an operator forks the VM meanwhile, this begins in the one and ends in its
    /// copy: the copy starts again.
    pub(crate) fn report(&self, copies: &mut [u8]) -> RawReport {
        let mut report = self.report_once(copies);
        for _ in 0..STABLE {
            if self.identity() == report.identity {
                break;
            }
            report = self.report_once(copies);
        }
        report
    }

    fn report_once(&self, copies: &mut [u8]) -> RawReport {
        let identity = self.identity();
        let is_parent = identity.role == Role::Parent.number();
        let listed = if is_parent { self.copies(copies) } else { 0 };
        RawReport { identity, listed }
    }

    /// Writes the request, rings by `ring`, and reads the answer: what the page says of the VM that
    /// this has returned in.
    ///
    /// # Errors
    ///
    /// [`Failure`]; this VM is a copy in [`Failure::Copied`] alone.
    pub(crate) fn exchange(
        &self,
        request: &Request,
        copies: &mut [u8],
        ring: impl FnOnce(),
    ) -> Result<RawReport, Failure> {
        let last = Request::from_bytes(&self.part(PAGE.request.offset)).seq;
        let seq = next_seq(last, self.response().seq);
        self.memory
            .write(PAGE.request.offset, &Request { seq, ..*request }.to_bytes());
        fence(Ordering::SeqCst);
        ring();
        fence(Ordering::SeqCst);
        match accept(seq, self.response()) {
            Ok(()) => Ok(self.report(copies)),
            // Whatever the answer is, this VM is not the one that has asked.
            Err(_) if self.identity().vm_id != request.asker => Err(Failure::Copied),
            Err(failure) => Err(failure),
        }
    }

    fn header(&self) -> Header {
        Header::from_bytes(&self.part(PAGE.header.offset))
    }

    fn response(&self) -> Response {
        Response::from_bytes(&self.part(PAGE.response.offset))
    }

    /// Copies as many of the listed copies out as fit, and returns how many there are. Where the
    /// list is, is asked anew each time: this VM may have gone to a VMM that has none, or another.
    fn copies(&self, copies: &mut [u8]) -> u32 {
        let offset = self.header().copies_offset as usize;
        let Some(list) = Some(offset)
            .filter(|&offset| offset != 0)
            .and_then(|offset| self.memory.read(offset).ok())
        else {
            return 0;
        };
        let count = CopyList::from_bytes(&list).count;
        let known = count.min(MAX_CHILDREN) as usize;
        for (number, copy) in copies
            .chunks_exact_mut(ListedCopy::BYTES)
            .take(known)
            .enumerate()
        {
            match self
                .memory
                .read::<{ ListedCopy::BYTES }>(offset + CopyList::at(number))
            {
                Ok(bytes) => copy.copy_from_slice(&bytes),
                Err(_) => return 0,
            }
        }
        count
    }

    /// A part that lies in the first page, all of which is mapped.
    fn part<const BYTES: usize>(&self, offset: usize) -> [u8; BYTES] {
        self.memory.read(offset).unwrap_or([0; BYTES])
    }
}

/// A number that differs from the last request's and the last response's.
fn next_seq(last_request: u64, last_response: u64) -> u64 {
    let next = last_request.wrapping_add(1);
    if next == last_response {
        next.wrapping_add(1)
    } else {
        next
    }
}

/// Passes if `response` says that request `seq` was served.
fn accept(seq: u64, response: Response) -> Result<(), Failure> {
    let Response { status, error, .. } = response;
    if response.seq != seq {
        return Err(Failure::NotAnswered);
    }
    match (Status::from_number(status), ErrorCode::from_number(error)) {
        (Some(Status::Forked), Some(ErrorCode::None)) => Ok(()),
        (Some(Status::Failed), Some(code)) if code != ErrorCode::None => {
            Err(Failure::Refused(code))
        }
        _ => Err(Failure::Nonsense { status, error }),
    }
}

/// Memory of the VMM's, mapped into the kernel.
struct Memory {
    start: NonNull<u64>,
    bytes: usize,
}

// SAFETY: The mapping belongs to no thread, and is read and written by volatile accesses alone.
unsafe impl Send for Memory {}
// SAFETY: As above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `bytes` bytes, a multiple of [`PAGE_BYTES`], at `gpa`.
    fn map(gpa: u64, bytes: usize) -> Result<Self> {
        // SAFETY: memremap takes any range. Of RAM it gives what is mapped anyway, which is only
        // read here until the range turns out to be a control page, and nobody else's.
        let start = unsafe { bindings::memremap(gpa, bytes, bindings::VMFORK_MEMREMAP_WB) };
        NonNull::new(start.cast())
            .map(|start| Self { start, bytes })
            .ok_or_else(|| {
                pr_err!("the control page at {gpa:#x} can't be mapped\n");
                ENOMEM
            })
    }

    /// Copies `BYTES` bytes out, a multiple of 8, as `offset` is.
    ///
    /// # Errors
    ///
    /// `EINVAL` where they are not all mapped.
    fn read<const BYTES: usize>(&self, offset: usize) -> Result<[u8; BYTES]> {
        let first = self.index(offset, BYTES)?;
        let mut out = [0; BYTES];
        for (number, word) in out.chunks_exact_mut(8).enumerate() {
            // SAFETY: `index` has checked that this word is mapped.
            let value = unsafe { self.start.as_ptr().add(first + number).read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
        }
        Ok(out)
    }

    /// Writes a part of the first page.
    fn write<const BYTES: usize>(&self, offset: usize, part: &[u8; BYTES]) {
        let Ok(first) = self.index(offset, BYTES) else {
            return;
        };
        for (number, word) in part.chunks_exact(8).enumerate() {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            // SAFETY: `index` has checked that this word is mapped.
            unsafe {
                self.start
                    .as_ptr()
                    .add(first + number)
                    .write_volatile(u64::from_ne_bytes(value))
            };
        }
    }

    /// Which word is the first of `bytes` bytes at `offset`, if all are mapped.
    fn index(&self, offset: usize, bytes: usize) -> Result<usize> {
        let end = offset.checked_add(bytes).ok_or(EINVAL)?;
        let whole_words = offset % 8 == 0 && bytes % 8 == 0;
        (whole_words && end <= self.bytes)
            .then_some(offset / 8)
            .ok_or(EINVAL)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: memremap has returned this address, and nothing refers to it any more.
        unsafe { bindings::memunmap(self.start.as_ptr().cast()) };
    }
}

/// A range of addresses that `/proc/iomem` shows as this module's, and `/dev/mem` does not show.
struct Claim {
    gpa: u64,
    bytes: usize,
}

impl Claim {
    fn new(gpa: u64, bytes: usize) -> Result<Self> {
        let parent = addr_of_mut!(bindings::iomem_resource);
        // SAFETY: The parent is the kernel's root of all memory, and the name is static.
        let claimed = unsafe {
            bindings::__request_region(
                parent,
                gpa,
                bytes as u64,
                c_str!("vmfork").as_char_ptr(),
                bindings::IORESOURCE_EXCLUSIVE as c_int,
            )
        };
        if claimed.is_null() {
            pr_err!("another driver has the control page at {gpa:#x}: see /proc/iomem\n");
            return Err(EBUSY);
        }
        Ok(Self { gpa, bytes })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // SAFETY: `new` has claimed this range of the same parent.
        unsafe {
            bindings::__release_region(
                addr_of_mut!(bindings::iomem_resource),
                self.gpa,
                self.bytes as u64,
            )
        };
    }
}
