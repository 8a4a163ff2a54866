//! How a guest asks: a 32-bit port write from user space, or a hypercall from ring 0. Both carry a command
//! and mean the same.

/// Command: serve the [`Request`](crate::Request) in the control page. Any other value is answered with
/// [`ErrorCode::UnknownCommand`](crate::ErrorCode::UnknownCommand).
pub const FORK: u32 = 1;

/// Width of the port write in bytes; other widths are answered like an unknown command.
pub const WIDTH_BYTES: usize = 4;

/// The one hypercall that Linux hands to its user space: KVM_HC_MAP_GPA_RANGE (kernel documentation,
/// virt/kvm/api.rst, KVM_CAP_EXIT_HYPERCALL). Arguments here: RBX = GPA of the control page, RCX = 1 page,
/// RDX = command.
pub const HYPERCALL: u64 = 12;

/// Hypercall result: look at the response in the control page.
pub const HYPERCALL_ANSWERED: i64 = 0;

/// Hypercall result: not the control page's GPA, or not one page (Linux's `-EINVAL`).
pub const HYPERCALL_INVALID: i64 = -22;
