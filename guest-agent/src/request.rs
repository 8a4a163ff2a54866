//! What a caller asks for.

use std::time::Duration;

use vmfork_abi::device::ForkArguments;
use vmfork_abi::{MAX_CHILDREN, Request, VM_TYPE_BYTES, flags, is_vm_type, pad_text};

/// A fork to ask for: how many children, of which VM type, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForkRequest {
    vm_type: [u8; VM_TYPE_BYTES],
    count: u32,
    placement: Placement,
    timeout: Option<Duration>,
}

/// Where the copies of a fork are to run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Placement {
    /// Wherever the VMM chooses.
    #[default]
    Any,
    /// On the platform of their parent.
    Local,
    /// On others.
    Remote,
}

impl Placement {
    fn flags(self) -> u32 {
        match self {
            Self::Any => 0,
            Self::Local => flags::LOCAL,
            Self::Remote => flags::REMOTE,
        }
    }
}

/// Why no VMM would take the request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// See [`is_vm_type`].
    #[error("{vm_type:?} is no VM type: 1 to {VM_TYPE_BYTES} of a-z, 0-9 and -, with no - at either end")]
    VmType {
        /// What was given.
        vm_type: String,
    },
    /// Every fork makes at least one child, and at most [`MAX_CHILDREN`].
    #[error("{count} children: a fork makes 1 to {MAX_CHILDREN}")]
    Count {
        /// What was given.
        count: u32,
    },
}

impl ForkRequest {
    /// A fork that makes `count` children (1 to [`MAX_CHILDREN`]) of the type `vm_type`.
    ///
    /// # Errors
    ///
    /// [`RequestError`] where the type is not one by [`is_vm_type`], or the count is out of range.
    pub fn new(vm_type: &str, count: u32) -> Result<Self, RequestError> {
        let padded = pad_text(vm_type).filter(|_| is_vm_type(vm_type));
        let vm_type = padded.ok_or_else(|| RequestError::VmType { vm_type: vm_type.to_owned() })?;
        if !(1..=MAX_CHILDREN).contains(&count) {
            return Err(RequestError::Count { count });
        }
        Ok(Self { vm_type, count, placement: Placement::Any, timeout: None })
    }

    /// The same fork, with its copies where `placement` says.
    #[must_use]
    pub fn placed(self, placement: Placement) -> Self {
        Self { placement, ..self }
    }

    /// The same fork, if it is the caller's turn within `timeout`: else it is not made
    /// ([`ForkError::DeadlinePassed`](crate::ForkError)).
    ///
    /// Callers in one guest are served one after another. How long the fork itself takes is not for them to
    /// say.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self }
    }

    /// How many children it makes.
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// How long the caller waits for its turn; `None` where it waits for ever.
    pub(crate) fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// The request as the control page takes it, under the number `seq`, for the VM `asker`.
    pub(crate) fn numbered(&self, seq: u64, asker: [u8; 16]) -> Request {
        let Self { vm_type, count, placement, .. } = *self;
        Request { seq, count, vm_type, asker, flags: placement.flags(), ..Request::default() }
    }

    /// The request as the kernel module takes it, made at the monotonic time `now`. Size, version and room
    /// for copies are for others to say.
    pub(crate) fn at(&self, now: Duration) -> ForkArguments {
        let Self { vm_type, count, placement, timeout } = *self;
        let deadline_ns = timeout.map_or(0, |timeout| nonzero_ns(now.saturating_add(timeout)));
        ForkArguments { count, flags: placement.flags(), deadline_ns, vm_type, ..ForkArguments::default() }
    }
}

/// The monotonic time `deadline` in nanoseconds. Zero would be no deadline.
fn nonzero_ns(deadline: Duration) -> u64 {
    u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reaches_the_page_whole() {
        let request = ForkRequest::new("web", 4).unwrap().numbered(7, [3; 16]);
        assert_eq!((request.seq, request.count, request.flags), (7, 4, 0));
        assert_eq!(vmfork_abi::padded_text(&request.vm_type), Some("web"));
        let request = ForkRequest::new("web", 4).unwrap().placed(Placement::Remote).numbered(7, [3; 16]);
        assert_eq!(request.flags, flags::REMOTE);
    }

    #[test]
    fn a_request_reaches_the_kernel_module_whole() {
        let request = ForkRequest::new("web", 4).unwrap().placed(Placement::Local);
        let expected = ForkArguments {
            count: 4,
            flags: flags::LOCAL,
            vm_type: pad_text("web").unwrap(),
            ..ForkArguments::default()
        };
        assert_eq!(request.at(Duration::from_secs(90)), expected);
    }

    #[test]
    fn a_timeout_is_a_deadline_that_is_never_none() {
        let deadline_ns =
            |now, timeout| ForkRequest::new("web", 1).unwrap().with_timeout(timeout).at(now).deadline_ns;
        assert_eq!(deadline_ns(Duration::from_secs(90), Duration::from_millis(1500)), 91_500_000_000);
        assert_eq!(deadline_ns(Duration::ZERO, Duration::ZERO), 1);
        assert_eq!(deadline_ns(Duration::from_secs(90), Duration::MAX), u64::MAX);
    }

    #[test]
    fn what_a_vmm_would_refuse_is_refused_here() {
        assert_eq!(ForkRequest::new("Web", 1), Err(RequestError::VmType { vm_type: "Web".to_owned() }));
        assert_eq!(ForkRequest::new("web", 0), Err(RequestError::Count { count: 0 }));
        assert_eq!(
            ForkRequest::new("web", MAX_CHILDREN + 1),
            Err(RequestError::Count { count: MAX_CHILDREN + 1 })
        );
        assert!(ForkRequest::new("web", MAX_CHILDREN).is_ok());
    }
}
