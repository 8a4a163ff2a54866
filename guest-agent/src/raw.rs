//! What safe Rust can't say: CPUID, the doorbell port, a page shared with the VMM, the kernel module's
//! device, scheduling and capabilities.

mod device;

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vmfork_abi::PAGE_BYTES;
use vmfork_abi::cpuid::{Interface, Registers};

pub(crate) use self::device::{CopyBytes, DeviceFile, head};

/// What CPUID answers to `leaf`, with subleaf 0.
pub(crate) fn cpuid(leaf: u32) -> Registers {
    let answer = core::arch::x86_64::__cpuid(leaf);
    Registers { eax: answer.eax, ebx: answer.ebx, ecx: answer.ecx, edx: answer.edx }
}

/// Permission of the calling thread to write the doorbell port, taken back on drop: execve(2) would pass it
/// on.
#[derive(Debug)]
pub(crate) struct DoorbellPort {
    port: u16,
    /// The permission is the thread's own, so this must not leave the thread.
    thread_bound: PhantomData<*const ()>,
}

impl DoorbellPort {
    /// Permits the calling thread to write the doorbell port: ioperm(2).
    ///
    /// # Errors
    ///
    /// EPERM without CAP_SYS_RAWIO or under kernel lockdown, ENOSYS in a kernel without
    /// CONFIG_X86_IOPL_IOPERM.
    pub(crate) fn acquire(interface: Interface) -> io::Result<Self> {
        let port = interface.doorbell_port;
        set_port_permission(port, true)?;
        Ok(Self { port, thread_bound: PhantomData })
    }

    /// Writes the 32-bit `command` to the port.
    pub(crate) fn ring(&self, command: u32) {
        // SAFETY: this thread may write the port, since `self` exists and can't leave its thread. Behind the
        // port stands the VMM's doorbell, which changes no memory but the control page; as this is not
        // `nomem`, the compiler moves no access to that across it.
        unsafe {
            core::arch::asm!(
                "out dx, eax",
                in("dx") self.port,
                in("eax") command,
                options(nostack, preserves_flags)
            );
        }
    }
}

impl Drop for DoorbellPort {
    fn drop(&mut self) {
        // Giving a permission up needs no privilege, and the range is the one that was accepted before: it
        // can't fail.
        drop(set_port_permission(self.port, false));
    }
}

/// Sets whether the calling thread may use the doorbell's ports: ioperm(2).
fn set_port_permission(port: u16, permitted: bool) -> io::Result<()> {
    // SAFETY: ioperm reads no memory of ours; a permission by itself does nothing.
    let result = unsafe {
        libc::ioperm(port.into(), vmfork_abi::doorbell::WIDTH_BYTES as libc::c_ulong, permitted.into())
    };
    Ok(Errno::result(result).map(drop)?)
}

/// Pages of a file, shared with whoever else maps them, and unmapped on drop.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u64>,
    bytes: NonZeroUsize,
}

impl Mapping {
    /// Maps the pages at `offset` of `file` that hold `bytes` bytes, at least one: mmap(2).
    fn new(file: &File, offset: u64, bytes: usize, access: ProtFlags) -> io::Result<Self> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES).and_then(NonZeroUsize::new);
        let bytes = bytes.ok_or(Errno::EINVAL)?;
        let offset = offset.try_into().map_err(|_| Errno::EINVAL)?;
        // SAFETY: the kernel chooses an address that nothing else uses.
        let base = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, file, offset)? };
        Ok(Self { base: base.cast(), bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `new` made this mapping of this length, and no pointer into it outlives `self`.
        let unmapped = unsafe { munmap(self.base.cast(), self.bytes.get()) };
        debug_assert_eq!(unmapped, Ok(()), "a whole mapping can always be unmapped");
    }
}

/// Memory shared with the VMM, one page or more, read and written in volatile 64-bit words.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    mapping: Mapping,
}

const WORD_BYTES: usize = size_of::<u64>();

impl SharedMemory {
    /// Maps the pages at `offset` of `file` that hold `bytes` bytes, at least one.
    ///
    /// # Errors
    ///
    /// EINVAL where `offset` is no page's; for /dev/mem, EPERM where the kernel does not let these pages be
    /// mapped.
    pub(crate) fn map(file: &File, offset: u64, bytes: usize) -> io::Result<Self> {
        Ok(Self { mapping: Mapping::new(file, offset, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)? })
    }

    /// Copies the `N` bytes at `OFFSET` out of the first page.
    pub(crate) fn read<const OFFSET: usize, const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        for (index, word) in bytes.chunks_exact_mut(WORD_BYTES).enumerate() {
            let at = self.words::<OFFSET, N>().wrapping_add(index);
            // SAFETY: `words` keeps the range within the first page, which is mapped while `self` lives, and
            // aligned.
            let value = unsafe { at.read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    /// Copies the `N` bytes at `offset` out, or gives `None` where not all of them are whole words that are
    /// mapped.
    pub(crate) fn read_at<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        const { assert!(N.is_multiple_of(WORD_BYTES)) };
        if !offset.is_multiple_of(WORD_BYTES) || offset.checked_add(N)? > self.mapping.bytes.get() {
            return None;
        }
        let mut bytes = [0; N];
        for (index, word) in (offset / WORD_BYTES..).zip(bytes.chunks_exact_mut(WORD_BYTES)) {
            // SAFETY: the word is aligned, and lies within what is mapped while `self` lives, as just
            // checked.
            let value = unsafe { self.mapping.base.as_ptr().wrapping_add(index).read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
        }
        Some(bytes)
    }

    /// Copies `bytes` to `OFFSET` of the first page.
    pub(crate) fn write<const OFFSET: usize, const N: usize>(&self, bytes: &[u8; N]) {
        let (words, _) = bytes.as_chunks::<WORD_BYTES>();
        for (index, word) in words.iter().enumerate() {
            let at = self.words::<OFFSET, N>().wrapping_add(index);
            // SAFETY: as in `read`; nobody holds a reference into the memory.
            unsafe { at.write_volatile(u64::from_ne_bytes(*word)) };
        }
    }

    /// First of the words that hold the `N` bytes at `OFFSET`, all of them whole words of the first page.
    fn words<const OFFSET: usize, const N: usize>(&self) -> *mut u64 {
        const {
            assert!(OFFSET.is_multiple_of(WORD_BYTES) && N.is_multiple_of(WORD_BYTES));
            assert!(OFFSET + N <= PAGE_BYTES);
        }
        self.mapping.base.as_ptr().wrapping_add(OFFSET / WORD_BYTES)
    }
}

/// A 64-bit word that the VMM writes and this program reads: the first of a file.
#[derive(Debug)]
pub(crate) struct SharedWord {
    mapping: Mapping,
}

// SAFETY: the mapping belongs to the process and not to a thread, and may be undone from any.
unsafe impl Send for SharedWord {}
// SAFETY: nobody in this process writes the word, and reads of it that are volatile and aligned do not
// disturb one another.
unsafe impl Sync for SharedWord {}

impl SharedWord {
    /// Maps the first page of `file`, to read alone.
    pub(crate) fn map(file: &File) -> io::Result<Self> {
        Ok(Self { mapping: Mapping::new(file, 0, WORD_BYTES, ProtFlags::PROT_READ)? })
    }

    /// The word as it is now.
    pub(crate) fn get(&self) -> u64 {
        // SAFETY: the first word of a page that is mapped to be read while `self` lives.
        unsafe { self.address().read_volatile() }
    }

    /// Where the word is, while `self` lives.
    pub(crate) fn address(&self) -> *const u64 {
        self.mapping.base.as_ptr()
    }
}

/// How the kernel schedules one thread, nice value aside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scheduling {
    policy: libc::c_int,
    parameters: libc::sched_param,
}

impl Scheduling {
    /// Above every other task but deadline ones: SCHED_FIFO with its highest priority, 99 on Linux
    /// (sched(7)).
    pub(crate) const TOP: Self =
        Self { policy: libc::SCHED_FIFO, parameters: libc::sched_param { sched_priority: 99 } };

    /// The calling thread's: sched_getscheduler(2) and sched_getparam(2).
    pub(crate) fn current() -> io::Result<Self> {
        let mut parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: 0 is the calling thread; no memory is touched.
        let policy = Errno::result(unsafe { libc::sched_getscheduler(0) })?;
        // SAFETY: 0 is the calling thread; the kernel writes one sched_param.
        Errno::result(unsafe { libc::sched_getparam(0, &raw mut parameters) })?;
        Ok(Self { policy, parameters })
    }

    /// Schedules the calling thread so: sched_setscheduler(2). A nice value stays.
    ///
    /// # Errors
    ///
    /// EPERM without CAP_SYS_NICE, or in a control group without real-time budget.
    pub(crate) fn apply(&self) -> io::Result<()> {
        // SAFETY: 0 is the calling thread; the kernel reads one sched_param.
        let result = unsafe { libc::sched_setscheduler(0, self.policy, &raw const self.parameters) };
        Ok(Errno::result(result).map(drop)?)
    }
}

/// The calling thread, scheduled in another way than before, until this is dropped: also where that is by a
/// panic.
#[derive(Debug)]
pub(crate) struct Raised {
    /// How it was scheduled; `None` once it is again.
    before: Option<Scheduling>,
    /// The scheduling is the thread's own, so this must not leave the thread.
    thread_bound: PhantomData<*const ()>,
}

impl Raised {
    /// Schedules the calling thread as `to` says.
    ///
    /// # Errors
    ///
    /// As [`Scheduling::apply`]; and where the thread could not be put back, as a deadline task can't: then
    /// it is left alone.
    pub(crate) fn to(to: Scheduling) -> io::Result<Self> {
        let before = Scheduling::current()?;
        before.apply()?;
        to.apply()?;
        Ok(Self { before: Some(before), thread_bound: PhantomData })
    }

    /// Schedules the calling thread as before.
    ///
    /// # Errors
    ///
    /// As [`Scheduling::apply`].
    pub(crate) fn lower(mut self) -> io::Result<()> {
        self.before.take().map_or(Ok(()), |before| before.apply())
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // Only a panic leads here, which has the word. The thread was accepted with this scheduling
            // before.
            drop(before.apply());
        }
    }
}

/// Effective capabilities of the calling thread, bit n for capability n: capget(2).
pub(crate) fn effective_capabilities() -> io::Result<u64> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words of 32 capabilities each.
    const VERSION: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        thread: libc::c_int,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Sets {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let mut header = Header { version: VERSION, thread: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: the kernel reads and writes one header, and writes two sets for this version (capabilities(7)).
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut sets) };
    Errno::result(result)?;
    let [low, high] = sets.map(|set| u64::from(set.effective));
    Ok(low | high << 32)
}

#[cfg(test)]
pub(crate) mod tests {
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    /// Memory that no VMM looks at: a file of so many bytes.
    pub(crate) fn file(bytes: usize) -> File {
        let file = File::from(memfd_create("page", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(bytes as u64).unwrap();
        file
    }

    #[test]
    fn a_page_keeps_what_was_written_where_it_was_written() {
        let page = SharedMemory::map(&file(PAGE_BYTES), 0, PAGE_BYTES).unwrap();
        page.write::<64, 16>(b"0123456789abcdef");
        page.write::<4088, 8>(b"the end.");
        assert_eq!(&page.read::<64, 16>(), b"0123456789abcdef");
        assert_eq!(&page.read::<56, 16>(), b"\0\0\0\0\0\0\0\x0001234567");
        assert_eq!(&page.read::<4088, 8>(), b"the end.");
        assert_eq!(page.read_at(4088).as_ref(), Some(b"the end."));
    }

    #[test]
    fn nothing_is_read_but_whole_words_that_are_mapped() {
        let memory = SharedMemory::map(&file(2 * PAGE_BYTES), 0, PAGE_BYTES + 1).unwrap();
        assert_eq!(memory.read_at(2 * PAGE_BYTES - 16), Some([0; 16]));
        for offset in [1, 2 * PAGE_BYTES - 12, 2 * PAGE_BYTES - 8, 2 * PAGE_BYTES, usize::MAX - 7] {
            assert_eq!(memory.read_at::<16>(offset), None, "{offset}");
        }
    }

    #[test]
    fn a_word_changes_as_others_write_it() {
        let file = file(PAGE_BYTES);
        let word = SharedWord::map(&file).unwrap();
        assert_eq!(word.get(), 0);
        SharedMemory::map(&file, 0, WORD_BYTES).unwrap().write::<0, 8>(&7u64.to_le_bytes());
        assert_eq!(std::thread::scope(|scope| scope.spawn(|| word.get()).join().unwrap()), 7);
    }

    #[test]
    fn only_whole_pages_are_mapped() {
        let file = File::open("/proc/self/exe").unwrap();
        assert_eq!(SharedMemory::map(&file, 1, 1).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(SharedMemory::map(&file, u64::MAX, 1).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_thread_can_be_put_back_where_it_was() {
        let before = Scheduling::current().unwrap();
        before.apply().unwrap();
        let after = Scheduling::current().unwrap();
        assert_eq!(
            (after.policy, after.parameters.sched_priority),
            (before.policy, before.parameters.sched_priority)
        );
    }

    #[test]
    fn a_thread_is_put_back_also_where_it_panics() {
        let policy = || Scheduling::current().unwrap().policy;
        let before = policy();
        let batch =
            Scheduling { policy: libc::SCHED_BATCH, parameters: libc::sched_param { sched_priority: 0 } };
        let panicked = std::panic::catch_unwind(|| {
            let _raised = Raised::to(batch).unwrap();
            assert_eq!(policy(), libc::SCHED_OTHER, "as is to be seen");
        });
        assert!(
            panicked
                .unwrap_err()
                .downcast_ref::<String>()
                .is_some_and(|why| why.contains("as is to be seen"))
        );
        assert_eq!(policy(), before);
        let raised = Raised::to(batch).unwrap();
        assert_eq!(policy(), libc::SCHED_BATCH);
        raised.lower().unwrap();
        assert_eq!(policy(), before);
    }

    #[test]
    fn capabilities_agree_with_proc() {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        assert_eq!(effective_capabilities().unwrap(), u64::from_str_radix(line.trim(), 16).unwrap());
    }
}
