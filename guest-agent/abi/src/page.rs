//! The control page: parts at fixed offsets, each written by one side only.

use crate::{MAX_CHILDREN, NAME_BYTES, PLATFORM_BYTES, VM_TYPE_BYTES, part::part};

/// Size of the control page in bytes.
pub const PAGE_BYTES: usize = 4096;

/// What a VMM shows from the page's address on, in bytes: the page, the pages behind it that a long list of
/// copies reaches into, and the page of the [`Generation`].
pub const REGION_BYTES: usize = PAGE.generation.offset + PAGE_BYTES;

/// Offset in bytes and size in bytes of a part of the control page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte.
    pub offset: usize,
    /// Number of bytes.
    pub bytes: usize,
}

/// The parts of the page.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// [`Header`], written by the VMM at launch.
    pub header: Part,
    /// [`Request`], written by the guest.
    pub request: Part,
    /// [`Response`], written by the VMM.
    pub response: Part,
    /// [`Identity`], written by the VMM.
    pub identity: Part,
    /// [`CopyList`] and its [`ListedCopy`]s, written by the VMM. Where there are many, they reach beyond the
    /// page. A guest finds them by the header, which says whether there are any.
    pub copies: Part,
    /// [`Generation`], written by the VMM, on a page of its own, which a kernel can let every process read. A
    /// guest finds it by the header, which says whether there is one.
    pub generation: Part,
}

/// Where each part lies. What lies between and behind them is reserved.
pub const PAGE: Layout = Layout {
    header: Part { offset: 0, bytes: Header::BYTES },
    request: Part { offset: 64, bytes: Request::BYTES },
    response: Part { offset: 192, bytes: Response::BYTES },
    identity: Part { offset: 256, bytes: Identity::BYTES },
    copies: COPIES,
    generation: Part {
        offset: (COPIES.offset + COPIES.bytes).next_multiple_of(PAGE_BYTES),
        bytes: Generation::BYTES,
    },
};

const COPIES: Part = Part { offset: 768, bytes: CopyList::at(MAX_CHILDREN as usize) };

part! {
    /// What the page is.
    Header (64) {
        /// [`MAGIC`](crate::MAGIC).
        0 magic: u64,
        /// [`ABI_VERSION`](crate::ABI_VERSION).
        8 abi_version: u32,
        /// [`PAGE_BYTES`].
        12 page_bytes: u32,
        /// Offset in bytes of the [`CopyList`] from the page's first byte, a multiple of 8; zero where this
        /// VMM lists no copies.
        16 copies_offset: u32,
        /// Size in bytes of the list with as many [`ListedCopy`]s as there can be; zero where this VMM lists
        /// no copies.
        20 copies_bytes: u32,
        /// Offset in bytes of the [`Generation`] from the page's first byte, a multiple of [`PAGE_BYTES`];
        /// zero where this VMM has none.
        24 generation_offset: u32,
        /// Zero.
        28 padding: u32,
        /// [`features`](crate::features) of this VMM; zero where it does not say.
        32 features: u64,
        /// Zero.
        40 reserved: [u8; 24],
    }
}

part! {
    /// What the guest asks for.
    Request (128) {
        /// Number of this request, chosen by the guest: differs from the last one. The response repeats it.
        0 seq: u64,
        /// How many children, from 1 to [`MAX_CHILDREN`].
        8 count: u32,
        /// [`flags`](crate::flags); zero where the VMM is to choose where the copies run.
        12 flags: u32,
        /// The kind of worker, NUL-padded, as [`is_vm_type`](crate::is_vm_type) allows.
        16 vm_type: [u8; VM_TYPE_BYTES],
        /// ID of the VM that is to be forked, as its [`Identity`] had it when somebody asked for this: in a
        /// copy that came about since then, the request is refused
        /// ([`ErrorCode::Copied`](crate::ErrorCode::Copied)). Zero where any copy may make it.
        48 asker: [u8; 16],
        /// Zero.
        64 reserved: [u8; 64],
    }
}

part! {
    /// How the VMM answered.
    Response (64) {
        /// Number of the request that this answers. A request whose number it is not was not looked at:
        /// another vCPU's fork was under way ([`ErrorCode::Busy`](crate::ErrorCode::Busy)). A fork that an
        /// operator asks for answers none.
        0 seq: u64,
        /// A [`Status`](crate::Status).
        8 status: u32,
        /// An [`ErrorCode`](crate::ErrorCode).
        12 error: u32,
        /// Zero.
        16 reserved: [u8; 48],
    }
}

part! {
    /// Who this VM is.
    Identity (512) {
        /// A [`Role`](crate::Role).
        0 role: u32,
        /// Which child of its fork this is, from 1 to `count`; 0 in a parent and in a booted VM.
        4 index: u32,
        /// How many children the latest fork made that this VM has asked for, or comes from; 0 in a booted
        /// VM.
        8 count: u32,
        /// How many forks lie between this VM and a booted one.
        12 generation: u32,
        /// ID of this VM, a random UUID. No two VMs share one.
        16 vm_id: [u8; 16],
        /// ID of the VM that this one is a copy of; zero in a booted VM.
        32 parent_id: [u8; 16],
        /// Random bytes that no other VM was given, fresh in every copy, and after every fork that this VM
        /// has asked for.
        48 seed: [u8; 64],
        /// Wall-clock time in nanoseconds since 1970 (UTC): in a copy when its clocks began to go on from the
        /// capture, else when this VM's vCPUs were last started after a launch or a fork that it has asked
        /// for.
        112 wall_clock_ns: u64,
        /// Name of this VM on its platform, such as `web.2`, NUL-padded.
        120 name: [u8; NAME_BYTES],
        /// VM type under which this VM was launched, NUL-padded.
        184 vm_type: [u8; VM_TYPE_BYTES],
        /// Zero.
        216 reserved: [u8; 296],
    }
}

part! {
    /// Which copies the latest fork made, in the parent's page. As many [`ListedCopy`]s follow it, lowest
    /// index first.
    CopyList (64) {
        /// Number of the request that these copies come from.
        0 seq: u64,
        /// How many are listed: all of the fork's, or 0 where the VMM does not know.
        8 count: u32,
        /// Zero.
        12 reserved: [u8; 52],
    }
}

part! {
    /// One copy, and where it went.
    ListedCopy (64) {
        /// ID of the VM.
        0 vm_id: [u8; 16],
        /// Which child of its fork it is, from 1 to `count`.
        16 index: u32,
        /// A [`Location`](crate::Location).
        20 location: u32,
        /// Name of the platform that launched it, NUL-padded; empty where there is one platform alone.
        24 platform: [u8; PLATFORM_BYTES],
        /// Zero.
        56 reserved: [u8; 8],
    }
}

part! {
    /// How many forks lie between this VM and a booted one, for processes to look at without a system call.
    /// It changes in every copy before the copy runs, whoever asked for the fork, and never in a parent. In a
    /// VM that has moved to a VMM without it, its bytes are all ones.
    Generation (64) {
        /// As in [`Identity`].
        0 generation: u64,
        /// Zero.
        8 reserved: [u8; 56],
    }
}

impl CopyList {
    /// Offset in bytes of the [`ListedCopy`] number `number`, counted from 0, from the list's first byte.
    pub const fn at(number: usize) -> usize {
        Self::BYTES + number * ListedCopy::BYTES
    }
}

const _: () = {
    assert!(PAGE.header.offset + PAGE.header.bytes <= PAGE.request.offset);
    assert!(PAGE.request.offset + PAGE.request.bytes <= PAGE.response.offset);
    assert!(PAGE.response.offset + PAGE.response.bytes <= PAGE.identity.offset);
    assert!(PAGE.identity.offset + PAGE.identity.bytes <= PAGE.copies.offset);
    assert!(PAGE.copies.offset + CopyList::at(1) <= PAGE_BYTES, "a short list costs no further page");
    assert!(PAGE.copies.offset & 7 == 0);
    assert!(PAGE.generation.offset & (PAGE_BYTES - 1) == 0);
    assert!(PAGE.copies.offset + PAGE.copies.bytes <= PAGE.generation.offset);
    assert!(Generation::BYTES <= PAGE_BYTES);
    assert!(REGION_BYTES <= u32::MAX as usize);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_survive_the_page() {
        let request =
            Request { seq: 7, count: 4, vm_type: crate::pad_text("web").unwrap(), ..Default::default() };
        assert_eq!(Request::from_bytes(&request.to_bytes()), request);
        assert_eq!(request.to_bytes()[0], 7);
        assert_eq!(&request.to_bytes()[16..20], b"web\0");
    }

    #[test]
    fn a_header_of_before_the_features_says_nothing_of_them() {
        let header = Header { features: 0x8000_0000_0000_0001, ..Default::default() };
        assert_eq!(header.to_bytes()[32..40], [1, 0, 0, 0, 0, 0, 0, 0x80]);
        // There, all behind the offsets was zero.
        let mut before = [0; Header::BYTES];
        before[..28].fill(0xff);
        assert_eq!(Header::from_bytes(&before).features, 0);
    }

    #[test]
    fn any_bytes_are_a_part() {
        let bytes = [0xa5; Identity::BYTES];
        assert_eq!(Identity::from_bytes(&bytes).to_bytes(), bytes);
    }

    #[test]
    fn copies_survive_the_page() {
        let list = CopyList { seq: 7, count: 2, ..Default::default() };
        assert_eq!(CopyList::from_bytes(&list.to_bytes()), list);
        let platform = crate::pad_text("b").unwrap();
        let copy = ListedCopy { vm_id: [9; 16], index: 2, location: 1, platform, ..Default::default() };
        assert_eq!(ListedCopy::from_bytes(&copy.to_bytes()), copy);
        assert_eq!(&copy.to_bytes()[16..26], b"\x02\0\0\0\x01\0\0\0b\0");
    }

    #[test]
    fn a_list_of_as_many_copies_as_there_can_be_fits() {
        assert_eq!((PAGE.copies.offset, PAGE.copies.bytes), (768, 64 + 1024 * 64));
        assert_eq!((CopyList::at(0), CopyList::at(1)), (64, 128));
        assert_eq!((PAGE.generation.offset, REGION_BYTES), (17 * PAGE_BYTES, 18 * PAGE_BYTES));
    }
}
