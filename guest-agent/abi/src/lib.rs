//! The binary interface between a guest and its VMM, defined once for both sides.
//!
//! A guest finds the VMM by [`cpuid`], writes a [`Request`] into the **control page**, rings the **doorbell**
//! (a port write from user space, or a hypercall from ring 0), and reads the [`Response`] and its
//! [`Identity`] when the doorbell's instruction completes. By then there are several VMs: the parent, and
//! every copy, each with a page of its own. The parent's has a [`CopyList`] too.
//!
//! An operator can fork a VM too. Its guest is not told: nothing in the parent's page changes, whatever the
//! guest is about to do with it. In a copy's page [`Request`] and [`Response`] stand as the parent had them
//! at that instant, and the [`Identity`] is the copy's own: a child's, with another ID. A ring that comes
//! while such a fork is under way is refused ([`ErrorCode::Busy`]), and so is one for a request that names
//! another VM than the one that rings: its parent's, in the operator's copy ([`ErrorCode::Copied`]).
//!
//! There is one request at a time, so callers in a guest take turns, from before they write the request until
//! their copy is whole. The kernel module lets its own take turns, and keeps others from the page. Programs
//! that use the page themselves, in whatever namespaces, hold an exclusive flock(2) on the node `mem` in the
//! kernel's devtmpfs, which none but they can open. Each chooses the number of its request at random, so that
//! it takes no answer to another's request for its own; and whoever finds another VM's ID in the [`Identity`]
//! than before its ring is in a copy, whatever the response is.
//!
//! In every copy, whoever has asked for it, another [`Generation`] stands before the copy runs, and in the
//! parent the same one as before. It has a page of its own, which a kernel can show to all processes: the
//! control page has the seed too, which is for few to see.
//!
//! The page is little-endian. Each part is a `#[repr(C)]` struct without padding; [`PAGE`] gives the parts'
//! offsets. Either side copies a part out of the page once, as bytes, and looks only at the copy.
#![no_std]
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod device;
pub mod doorbell;
pub mod features;
pub mod flags;
mod page;
mod part;
mod status;

pub use page::{
    CopyList, Generation, Header, Identity, Layout, ListedCopy, PAGE, PAGE_BYTES, Part, REGION_BYTES,
    Request, Response,
};
pub use status::{ErrorCode, Location, Role, Status};

/// Version of everything in this crate: a guest refuses a VMM whose version differs. What a VMM has beside,
/// it says by its [`features`].
pub const ABI_VERSION: u32 = 1;

/// First field of the control page: `VMFORKCP` in ASCII, read as a little-endian integer.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VMFORKCP");

/// Longest VM type in bytes; shorter ones are padded with NUL.
pub const VM_TYPE_BYTES: usize = 32;

/// Longest VM name in bytes; shorter ones are padded with NUL.
pub const NAME_BYTES: usize = 64;

/// Longest name of a platform in bytes; shorter ones are padded with NUL.
pub const PLATFORM_BYTES: usize = 32;

/// Most children that one fork can ask for.
pub const MAX_CHILDREN: u32 = 1024;

/// Text of a NUL-padded field, or `None` where it is not UTF-8 or has anything behind the first NUL.
pub fn padded_text(field: &[u8]) -> Option<&str> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let (text, padding) = field.split_at(end);
    if padding.iter().any(|&byte| byte != 0) {
        return None;
    }
    core::str::from_utf8(text).ok()
}

/// NUL-padded field of `N` bytes that holds `text`, or `None` where it does not fit or contains a NUL.
pub fn pad_text<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut field = [0; N];
    if text.contains('\0') {
        return None;
    }
    field.get_mut(..text.len())?.copy_from_slice(text.as_bytes());
    Some(field)
}

/// Whether `name` can be a VM type: 1 to [`VM_TYPE_BYTES`] of `a-z`, `0-9` and `-`, first and last no `-`. It
/// becomes part of host names.
pub fn is_vm_type(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=VM_TYPE_BYTES).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_text_is_what_was_padded() {
        let field: [u8; 8] = pad_text("web").unwrap();
        assert_eq!(padded_text(&field), Some("web"));
        assert_eq!(pad_text::<2>("web"), None);
        assert_eq!(pad_text::<8>("a\0b"), None);
        assert_eq!(padded_text(b"ab\0c"), None);
        assert_eq!(padded_text(b"\xff\0"), None);
        assert_eq!(padded_text(b"full"), Some("full"));
    }

    #[test]
    fn vm_types_are_host_name_labels() {
        for good in ["web", "a", "db-2", "0"] {
            assert!(is_vm_type(good), "{good}");
        }
        for bad in ["", "-a", "a-", "Web", "a.b", "a/b", "ä", "a b", "123456789012345678901234567890123"] {
            assert!(!is_vm_type(bad), "{bad}");
        }
    }
}
