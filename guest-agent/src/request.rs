//! What a caller asks for.

use vmfork_abi::{MAX_CHILDREN, Request, VM_TYPE_BYTES, flags, is_vm_type, pad_text};

/// A fork to ask for: how many children, of which VM type, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForkRequest {
    vm_type: [u8; VM_TYPE_BYTES],
    count: u32,
    placement: Placement,
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
        Ok(Self { vm_type, count, placement: Placement::Any })
    }

    /// The same fork, with its copies where `placement` says.
    #[must_use]
    pub fn placed(self, placement: Placement) -> Self {
        Self { placement, ..self }
    }

    /// The request as the control page takes it, under the number `seq`.
    pub(crate) fn numbered(&self, seq: u64) -> Request {
        let Self { vm_type, count, placement } = *self;
        Request { seq, count, vm_type, flags: placement.flags(), ..Request::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_reaches_the_page_whole() {
        let request = ForkRequest::new("web", 4).unwrap().numbered(7);
        assert_eq!((request.seq, request.count, request.flags), (7, 4, 0));
        assert_eq!(vmfork_abi::padded_text(&request.vm_type), Some("web"));
        let request = ForkRequest::new("web", 4).unwrap().placed(Placement::Remote).numbered(7);
        assert_eq!(request.flags, flags::REMOTE);
    }

    #[test]
    fn what_a_vmm_would_refuse_is_refused_here() {
        assert_eq!(ForkRequest::new("Web", 1), Err(RequestError::VmType { vm_type: "Web".to_owned() }));
        assert_eq!(ForkRequest::new("web", 0), Err(RequestError::Count { count: 0 }));
        assert_eq!(ForkRequest::new("web", MAX_CHILDREN + 1), Err(RequestError::Count { count: MAX_CHILDREN + 1 }));
        assert!(ForkRequest::new("web", MAX_CHILDREN).is_ok());
    }
}
