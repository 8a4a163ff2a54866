//! The guest side of VM fork: a process asks the VMM to fork the VM it runs in, and learns which copy it is in.
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
//! A fork from the caller's side, in order ([`Vmm::fork`]):
//!
//! ```text
//! detect       CPUID names the VMM, its ABI version, control page and doorbell
//! open         the route to the VMM: today the doorbell port and the control page in /dev/mem
//! prepare      whatever a copy will need, while there is only one VM to fail
//! lock         one fork at a time in this guest
//! raise        the calling thread above every other task of its vCPU
//! ring         the request is written, and the VMM forks the VM      ->  parent      children
//! assume       the identity that the VMM left                            seed        seed, host name, clock
//! lower        the calling thread to where it was; then the lock is dropped
//! ```
//!
//! `route::doorbell` has that order. Unsafe code is confined to `raw`, `random` and `capi`.

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
pub use vmfork_abi::{ErrorCode, Location, Role};
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
