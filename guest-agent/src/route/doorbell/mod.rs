//! From user space alone: the control page through /dev/mem, and the doorbell by a port write.
//!
//! [`Doorbell::fork`] has the order. The calling thread takes its turn by a lock of the whole guest, holds
//! back the other tasks of its vCPU, and gives a copy its identity itself.

mod control_page;
mod lock;
mod privilege;
mod random;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use vmfork_abi::cpuid::Interface;
use vmfork_abi::{ErrorCode, PAGE_BYTES, doorbell};

use self::control_page::ControlPage;
pub use self::control_page::HeaderError;
pub use self::lock::LockError;
use self::lock::{Devtmpfs, ForkLock};
pub use self::privilege::PrivilegeError;
pub(crate) use self::random::{PATH as RANDOM_PATH, RandomPool};
use crate::fork::which;
use crate::raw::{DoorbellPort, Raised, Scheduling, SharedMemory};
use crate::route::RawReport;
use crate::{Fork, ForkError, ForkRequest, OpenError, Vmm, identity};

/// How often, and after what time, a request is made again that is refused since an operator forks this VM.
/// For most of that time the VM stands still.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// The control page of this guest, mapped, and where its doorbell is.
#[derive(Debug)]
pub(crate) struct Doorbell {
    interface: Interface,
    page: ControlPage,
    /// Mounted by the first fork.
    devtmpfs: OnceLock<Devtmpfs>,
}

/// What the steps around the doorbell use, made before it so that a lack of it fails while there is only one
/// VM.
struct Tools {
    port: DoorbellPort,
    pool: RandomPool,
    /// ID of the VM in which the request was made.
    asker: [u8; 16],
    /// Held until the identity is complete too: another fork in between would copy a VM that is half itself.
    _lock: ForkLock,
}

impl Doorbell {
    /// Finds the VMM by CPUID, maps the control page, and checks that it is one: CAP_SYS_RAWIO, and no kernel
    /// lockdown.
    ///
    /// # Errors
    ///
    /// [`OpenError::Detect`], [`OpenError::OpenMemory`], [`OpenError::MapPage`] or [`OpenError::Header`].
    pub(crate) fn open() -> Result<Self, OpenError> {
        let interface = Vmm::detect().map_err(OpenError::Detect)?;
        let gpa = interface.control_page_gpa;
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_SYNC)
            .open("/dev/mem")
            .map_err(|source| OpenError::OpenMemory { source })?;
        let map = |bytes| {
            let memory = SharedMemory::map(&memory, gpa, bytes)
                .map_err(|source| OpenError::MapPage { gpa, source })?;
            ControlPage::new(memory).map_err(|source| OpenError::Header { gpa, source })
        };
        // The page says how much there is behind it.
        let page = map(PAGE_BYTES)?;
        let needed_bytes = page.needed_bytes();
        let page = if needed_bytes > PAGE_BYTES { map(needed_bytes)? } else { page };
        Ok(Self { interface, page, devtmpfs: OnceLock::new() })
    }

    /// Who this VM is, and how it came out of its latest fork, unchecked.
    pub(crate) fn report(&self) -> RawReport {
        self.page.report()
    }

    /// Goes through a fork but for the doorbell.
    ///
    /// # Errors
    ///
    /// What [`Self::fork`] would return without asking the VMM.
    pub(crate) fn check(&self) -> Result<(), ForkError> {
        let _tools = self.prepare(None)?;
        Raised::to(Scheduling::TOP).and_then(Raised::lower).map_err(|source| ForkError::Raise { source })
    }

    /// Forks this VM once it is this caller's turn, and returns in the parent and in every child.
    ///
    /// # Errors
    ///
    /// [`ForkError`], in the caller's VM or in a copy.
    pub(crate) fn fork(&self, request: &ForkRequest) -> Result<Fork, ForkError> {
        let deadline = request.timeout().and_then(|timeout| Instant::now().checked_add(timeout));
        let tools = self.prepare(deadline)?;
        for _ in 1..TRIES {
            match self.fork_once(&tools, request) {
                Err(ForkError::Refused(ErrorCode::Busy)) => {}
                other => return other,
            }
            // Before the deadline is looked at: a copy must learn that it is one.
            self.check_original(tools.asker)?;
            if passed(deadline) {
                return Err(ForkError::DeadlinePassed);
            }
            thread::sleep(PAUSE);
            self.check_original(tools.asker)?;
        }
        self.fork_once(&tools, request)
    }

    /// Makes what the rest of the fork uses, and waits for its turn.
    fn prepare(&self, deadline: Option<Instant>) -> Result<Tools, ForkError> {
        let port = self.interface.doorbell_port;
        let port =
            DoorbellPort::acquire(self.interface).map_err(|source| ForkError::Port { port, source })?;
        privilege::check().map_err(ForkError::Privilege)?;
        let pool = RandomPool::open().map_err(|source| ForkError::OpenRandom { source })?;
        let asker = self.page.identity().vm_id;
        let lock = self.lock(deadline).map_err(ForkError::Lock)?;
        // Whoever holds it may have forked meanwhile, and hold it in this copy too, until after the deadline.
        self.check_original(asker)?;
        Ok(Tools { port, pool, asker, _lock: lock.ok_or(ForkError::DeadlinePassed)? })
    }

    /// Waits for the caller's turn, or until the deadline: then there is `None`.
    fn lock(&self, deadline: Option<Instant>) -> Result<Option<ForkLock>, LockError> {
        // Of several first callers, all but one drop theirs again.
        let devtmpfs = match self.devtmpfs.get() {
            Some(mounted) => mounted,
            None => {
                let mounted = Devtmpfs::mount()?;
                self.devtmpfs.get_or_init(|| mounted)
            }
        };
        ForkLock::acquire(devtmpfs, deadline)
    }

    /// Checks that this is the VM `asker`, and not a copy of it.
    fn check_original(&self, asker: [u8; 16]) -> Result<(), ForkError> {
        if self.page.identity().vm_id == asker { Ok(()) } else { Err(ForkError::Copied) }
    }

    /// Asks for a fork once.
    fn fork_once(&self, tools: &Tools, request: &ForkRequest) -> Result<Fork, ForkError> {
        let raised = Raised::to(Scheduling::TOP).map_err(|source| ForkError::Raise { source })?;
        let forked = self.ring(tools, request);
        let lowered = raised.lower();
        let fork = forked?;
        lowered.map_err(|source| ForkError::Lower { role: fork.role, source })?;
        Ok(fork)
    }

    /// Rings, and makes the VM in which that returns the one that it should be.
    fn ring(&self, tools: &Tools, request: &ForkRequest) -> Result<Fork, ForkError> {
        let doorbell_at = identity::monotonic().map_err(|source| ForkError::ReadClock { source })?;
        let nonce = tools.pool.bits().map_err(|source| ForkError::OpenRandom { source })?;
        let report = self.page.exchange(request, tools.asker, nonce, || tools.port.ring(doorbell::FORK))?;
        // From here on there are several VMs, and this is any one of them.
        let fork = which(&report)?;
        identity::assume(&fork, &report.identity, &tools.pool, doorbell_at)
            .map_err(|source| ForkError::Identity { role: fork.role, source })?;
        // An operator may have made a copy of that VM meanwhile, which has become the VM that it was told to
        // be, and is another.
        self.check_original(report.identity.vm_id)?;
        Ok(fork)
    }
}

/// Whether there is a deadline, and it has passed.
fn passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}
