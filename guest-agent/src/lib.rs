//! The guest side of VM fork: a process asks the VMM to fork the VM it runs in, and learns which copy it is
//! in.
//!
//! ```no_run
//! use vmfork::{ForkRequest, Role};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let fork = vmfork::fork(&ForkRequest::new("web", 4)?)?;
//! match fork.role {
//!     Role::Child => println!("worker {} of {}", fork.index, fork.count),
//!     _ => println!("{} workers were started", fork.count),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A fork from the caller's side begins with the route to the VMM ([`Vmm::open`]): by the kernel module's
//! device if there is one for the caller, else by the doorbell. Then it goes, in order ([`Vmm::fork`]):
//!
//! ```text
//! by the device          one ioctl of /dev/vmfork, in which the module
//!     wait               takes callers one after another
//!     call               asks the VMM, which forks the VM            ->  parent      children
//!     assume             sets what the VMM left                          seed        seed, clock
//! name                   the caller, if it may                                       host name
//!
//! by the doorbell        the control page in /dev/mem, and a port, where the caller itself does
//!     prepare            whatever a copy will need, while there is only one VM to fail
//!     lock               one fork at a time in this guest
//!     raise              the calling thread above every other task of its vCPU
//!     ring               asks the VMM, which forks the VM            ->  parent      children
//!     assume             sets what the VMM left                          seed        seed, host name, clock
//!     lower              the calling thread to where it was; then the lock is dropped
//! ```
//!
//! By the device, nothing of the guest runs between the fork and the new seed. By the doorbell, the tasks of
//! other vCPUs do: in a copy, they draw random numbers that its parent and the other copies may draw too,
//! until the seed is set.
//!
//! Each route is a file in `route`, which has that order; another would be one file more, and its place in
//! the choice. Who asks for nothing, but wants to know when its VM has become another: [`Watch`],
//! [`GenerationPage`]. Unsafe code is confined to `raw`, `random` and `capi`.

mod capi;
mod detect;
mod fork;
mod generation;
mod identity;
mod outcome;
mod raw;
mod request;
mod route;
mod vmm;
mod watch;

pub use detect::DetectError;
pub use fork::ForkError;
pub use generation::{GenerationError, GenerationPage};
pub use identity::IdentityError;
pub use outcome::{Fork, ForkCopy, OutcomeError};
pub use request::{ForkRequest, Placement, RequestError};
pub use route::doorbell::{HeaderError, LockError, PrivilegeError};
pub use route::{UnknownVia, Via};
pub use vmfork_abi::cpuid::Interface;
pub use vmfork_abi::{ErrorCode, Location, Role, features};
pub use vmm::{OpenError, StatusError, Vmm};
pub use watch::{Notice, Watch, WatchError};

/// Forks the VM that this runs in: [`Vmm::open`] and [`Vmm::fork`] in one.
///
/// # Errors
///
/// [`ForkError::Open`] where the VMM can't be reached, or what [`Vmm::fork`] returns.
pub fn fork(request: &ForkRequest) -> Result<Fork, ForkError> {
    Vmm::open().map_err(ForkError::Open)?.fork(request)
}
