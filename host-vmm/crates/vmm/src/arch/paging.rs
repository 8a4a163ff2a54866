//! How a vCPU finds what a linear address means (Intel SDM volume 3A, 4.5; 64-bit mode and 4 or 5 levels of
//! tables).

/// CR0: paging is on.
const CR0_PG: u64 = 1 << 31;

/// CR4: entries are of 8 bytes also outside of 64-bit mode.
const CR4_PAE: u64 = 1 << 5;

/// CR4: there are 5 levels.
const CR4_LA57: u64 = 1 << 12;

/// EFER: 64-bit mode is active.
const EFER_LMA: u64 = 1 << 10;

/// An entry is valid.
const PRESENT: u64 = 1 << 0;

/// An entry is that of a large page; in the second and third level from below.
const LARGE: u64 = 1 << 7;

/// Where an entry has its address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a linear address that one level of tables translates, and those within a page.
const LEVEL_BITS: u32 = 9;
const PAGE_BITS: u32 = 12;

/// The registers that say where the tables are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

impl Paging {
    /// Whether the processor goes by four page-directory pointers that it loads with CR3, and does not look
    /// up again: PAE paging, of 32-bit kernels.
    pub fn has_directory_pointers(&self) -> bool {
        self.cr0 & CR0_PG != 0 && self.cr4 & CR4_PAE != 0 && self.efer & EFER_LMA == 0
    }

    /// The guest-physical addresses that a vCPU reads to find a linear one, and where that is, as far as
    /// `read` knows what the tables hold. Tables of 32-bit modes are not followed.
    pub fn walk(&self, linear: u64, read: impl Fn(u64) -> Option<u64>) -> Vec<u64> {
        if self.cr0 & CR0_PG == 0 {
            return vec![linear];
        }
        if self.efer & EFER_LMA == 0 {
            return Vec::new();
        }
        let mut addresses = Vec::new();
        let mut table = self.cr3 & ADDRESS;
        for level in (0..if self.cr4 & CR4_LA57 == 0 { 4 } else { 5 }).rev() {
            let shift = PAGE_BITS + level * LEVEL_BITS;
            let index = linear >> shift & ((1 << LEVEL_BITS) - 1);
            let at = table + index * 8;
            addresses.push(at);
            let Some(entry) = read(at).filter(|entry| entry & PRESENT != 0) else { return addresses };
            let within = (1 << shift) - 1;
            if level == 0 || (level <= 2 && entry & LARGE != 0) {
                addresses.push(entry & ADDRESS & !within | linear & within);
                return addresses;
            }
            table = entry & ADDRESS;
        }
        addresses
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const LONG_MODE: Paging = Paging { cr0: CR0_PG | 1, cr3: 0x1018, cr4: 0x20, efer: EFER_LMA | 0x100 };

    #[test]
    fn tables_are_followed() {
        let memory = BTreeMap::from([
            (0x1000 + 8 * 0x1ff, 0x2003),
            (0x2000 + 8 * 0x1fe, 0x3003),
            (0x3000, 0x4003),
            (0x4000 + 8, 0x8000_0000_0056_7003),
            (0x3000 + 8, 0x4020_0083),
            (0x2000 + 8 * 0x1ff, 0x8000_0083),
            (0x2000 + 8, 0),
        ]);
        let read = |at: u64| memory.get(&at).copied();
        let walk = |linear| LONG_MODE.walk(linear, read);
        assert_eq!(walk(0xffff_ffff_8000_1234), [0x1ff8, 0x2ff0, 0x3000, 0x4008, 0x56_7234]);
        assert_eq!(walk(0xffff_ffff_8020_1234), [0x1ff8, 0x2ff0, 0x3008, 0x4020_1234]);
        assert_eq!(walk(0xffff_ffff_c020_1234), [0x1ff8, 0x2ff8, 0x8020_1234]);
        assert_eq!(walk(0xffff_ff80_4000_0000), [0x1ff8, 0x2008], "it is not present");
        assert_eq!(walk(0), [0x1000], "nobody knows");
        assert_eq!(Paging { cr4: CR4_LA57, ..LONG_MODE }.walk(1 << 48, read), [0x1008]);
        assert_eq!(Paging { cr0: 1, ..LONG_MODE }.walk(0x1234, read), [0x1234]);
        assert_eq!(Paging { efer: 0, ..LONG_MODE }.walk(0x1234, read), [] as [u64; 0]);
    }

    proptest! {
        #[test]
        fn no_tables_do_harm(cr0: u64, cr3: u64, cr4: u64, efer: u64, linear: u64, entry: u64) {
            let addresses = Paging { cr0, cr3, cr4, efer }.walk(linear, |_| Some(entry));
            prop_assert!(addresses.len() <= 6);
        }
    }
}
