//! What a VMM has beyond the first form of this interface: a word of 64 bits, a bit for each thing.
//!
//! It stands in the control page's [`Header`](crate::Header), and in CPUID's leaf
//! [`LEAF_FEATURES`](crate::cpuid::LEAF_FEATURES). Its rules:
//!
//! - **A new capability gets a bit, and no version.** [`ABI_VERSION`](crate::ABI_VERSION) changes only where
//!   guests of before would misread what they find.
//! - **A bit once given keeps its meaning.** It is never given to anything else, also where no VMM shows it
//!   any more.
//! - **A guest ignores bits that it does not know.**
//! - **A set bit is a promise, and a clear one denies nothing.** VMMs of before this word show zero in the
//!   header, and no such leaf. They may have some of these things all the same. Whether a part of the page is
//!   there, and where, the header's offsets go on to say.
//! - **The header is that of the VMM of now; CPUID is as it was when the guest booted.** A VM that has come
//!   from elsewhere, or from an image that another VMM has captured, keeps its CPUID, and finds a page of the
//!   VMM where it is. Whoever needs to know what that one has reads the header, each time. CPUID takes no
//!   privilege.
//!
//! What others announce has no bit: the VM generation ID, which ACPI does, and the hypercall, which is up to
//! the host's KVM and fails where that does not hand it on.

/// A request can say where its copies are to run: [`flags::LOCAL`](crate::flags::LOCAL) and
/// [`flags::REMOTE`](crate::flags::REMOTE).
pub const LOCATION: u64 = 1 << 0;

/// A parent's page lists its copies: [`CopyList`](crate::CopyList).
pub const COPIES: u64 = 1 << 1;

/// A page behind the control page holds the VM's [`Generation`](crate::Generation) alone.
pub const GENERATION_PAGE: u64 = 1 << 2;

/// A request whose `asker` is another VM than the one that rings is refused
/// ([`ErrorCode::Copied`](crate::ErrorCode::Copied)), and no fork is made for it.
pub const ASKER: u64 = 1 << 3;

/// The bits above and their names, lowest bit first.
const NAMED: [(u64, &str); 4] =
    [(LOCATION, "location"), (COPIES, "copies"), (GENERATION_PAGE, "generation-page"), (ASKER, "asker")];

/// Names of the bits of a word that have one, lowest bit first.
pub fn names(features: u64) -> impl Iterator<Item = &'static str> {
    NAMED.into_iter().filter(move |(bit, _)| features & bit != 0).map(|(_, name)| name)
}

/// Bits of a word that have no name: a later VMM shows them.
pub fn unknown(features: u64) -> u64 {
    NAMED.into_iter().fold(features, |rest, (bit, _)| rest & !bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bit_keeps_its_place() {
        // Guests of before go by these numbers.
        assert_eq!([LOCATION, COPIES, GENERATION_PAGE, ASKER], [1, 2, 4, 8]);
    }

    #[test]
    fn a_bit_has_one_name_or_is_unknown() {
        for bit in (0..u64::BITS).map(|number| 1 << number) {
            assert_eq!(names(bit).count(), usize::from(unknown(bit) == 0), "{bit:#x}");
        }
        assert!(names(COPIES | ASKER | 1 << 63).eq(["copies", "asker"]));
        assert_eq!(unknown(COPIES | ASKER | 1 << 63), 1 << 63);
        assert_eq!((names(0).count(), unknown(0)), (0, 0));
    }
}
