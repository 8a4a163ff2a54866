//! What must differ between a VM and its copy, set from the identity that the VMM left.

use std::io;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::sethostname;
use vmfork_abi::{Identity, Role};

use crate::Fork;
use crate::route::doorbell::RandomPool;

/// Which part of its identity a VM did not get.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The VM's own seed is not in the kernel's random pool.
    #[error("the random seed can't be mixed into the kernel's pool")]
    MixSeed {
        /// What the ioctl RNDADDENTROPY answered.
        source: io::Error,
    },
    /// The kernel's generator goes on with a key that other copies have too.
    #[error("the kernel's random generator can't be reseeded")]
    Reseed {
        /// What the ioctl RNDRESEEDCRNG answered.
        source: io::Error,
    },
    /// The VM still has its parent's host name.
    #[error("the host name can't be set to {hostname}")]
    SetHostname {
        /// The name it should have.
        hostname: String,
        /// What sethostname(2) answered.
        source: io::Error,
    },
    /// How long ago the VM was started is not known.
    #[error("the monotonic clock can't be read")]
    ReadClock {
        /// What clock_gettime(2) answered.
        source: io::Error,
    },
    /// The kernel module could not set the VM's clock, which still shows the time of the capture.
    #[error("the kernel module can't set the clock")]
    KernelClock,
    /// The VM's clock still shows the time of the capture.
    #[error("the clock can't be set to {seconds} s since 1970")]
    StepClock {
        /// The time it should show.
        seconds: u64,
        /// What clock_settime(2) answered.
        source: io::Error,
    },
}

/// Makes this VM the one that `fork` and `identity` describe: the seed everywhere, host name and clock in a
/// child only.
///
/// `doorbell_at` is the monotonic time at which the fork was asked for. It stands still during the fork.
///
/// # Errors
///
/// [`IdentityError`] for the first step that fails; none behind it is taken.
pub(crate) fn assume(
    fork: &Fork,
    identity: &Identity,
    pool: &RandomPool,
    doorbell_at: Duration,
) -> Result<(), IdentityError> {
    pool.mix(&identity.seed).map_err(|source| IdentityError::MixSeed { source })?;
    pool.reseed().map_err(|source| IdentityError::Reseed { source })?;
    if fork.role == Role::Child {
        set_hostname(&fork.name)?;
        step_clock(identity.wall_clock_ns, doorbell_at)?;
    }
    Ok(())
}

/// Monotonic time of this guest.
pub(crate) fn monotonic() -> io::Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_MONOTONIC)?.into())
}

/// Gives this VM the host name that goes with its name: sethostname(2).
///
/// # Errors
///
/// [`IdentityError::SetHostname`], with EPERM where the caller lacks CAP_SYS_ADMIN.
pub(crate) fn set_hostname(name: &str) -> Result<(), IdentityError> {
    let hostname = hostname(name);
    sethostname(&hostname).map_err(|errno| IdentityError::SetHostname { hostname, source: errno.into() })
}

/// Host name of the VM called `name`: a single label, since a dot would make a domain of what follows it.
fn hostname(name: &str) -> String {
    name.replace('.', "-")
}

fn step_clock(wall_clock_ns: u64, doorbell_at: Duration) -> Result<(), IdentityError> {
    let now = monotonic().map_err(|source| IdentityError::ReadClock { source })?;
    let wall_clock = wall_clock(wall_clock_ns, doorbell_at, now);
    clock_settime(ClockId::CLOCK_REALTIME, wall_clock.into())
        .map_err(|errno| IdentityError::StepClock { seconds: wall_clock.as_secs(), source: errno.into() })
}

/// Time since 1970 at the monotonic time `now`, in a VM whose vCPUs were started at `started_ns` since 1970.
fn wall_clock(started_ns: u64, doorbell_at: Duration, now: Duration) -> Duration {
    Duration::from_nanos(started_ns).saturating_add(now.saturating_sub(doorbell_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_is_one_label() {
        assert_eq!(hostname("web.2"), "web-2");
        assert_eq!(hostname("web.2.11"), "web-2-11");
        assert_eq!(hostname("web"), "web");
    }

    #[test]
    fn the_clock_goes_on_from_the_start_of_the_vcpus() {
        let doorbell_at = Duration::from_secs(90);
        let now = doorbell_at + Duration::from_micros(250);
        assert_eq!(
            wall_clock(1_700_000_000_000_000_000, doorbell_at, now).as_nanos(),
            1_700_000_000_000_250_000
        );
    }

    #[test]
    fn no_time_overflows() {
        let far = wall_clock(u64::MAX, Duration::ZERO, Duration::MAX);
        assert_eq!(far, Duration::MAX);
        assert_eq!(wall_clock(5, Duration::from_secs(1), Duration::ZERO).as_nanos(), 5);
    }
}
