//! Structs that are bytes too: fixed offsets, little-endian, no padding.

/// A fixed-size field and its little-endian bytes.
pub(crate) trait Field: Sized {
    /// Writes the bytes to `out`, which has as many.
    fn put(&self, out: &mut [u8]);
    /// Reads the bytes.
    fn get(bytes: &[u8]) -> Self;
}

/// Copies as many bytes as both have. Unlike `copy_from_slice` it can't panic, for which the kernel module
/// has no use.
fn copy(from: &[u8], to: &mut [u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}

macro_rules! integer_field {
    ($($integer:ty),+) => {$(
        impl Field for $integer {
            fn put(&self, out: &mut [u8]) {
                copy(&self.to_le_bytes(), out);
            }
            fn get(bytes: &[u8]) -> Self {
                let mut raw = [0; core::mem::size_of::<Self>()];
                copy(bytes, &mut raw);
                Self::from_le_bytes(raw)
            }
        }
    )+};
}
integer_field!(u32, u64);

impl<const N: usize> Field for [u8; N] {
    fn put(&self, out: &mut [u8]) {
        copy(self, out);
    }
    fn get(bytes: &[u8]) -> Self {
        let mut raw = [0; N];
        copy(bytes, &mut raw);
        raw
    }
}

/// Declares a part: the struct, its offsets checked at compile time, and its way to bytes and back.
macro_rules! part {
    (
        $(#[$about:meta])* $name:ident ($bytes:literal) {
            $($(#[$doc:meta])* $at:literal $field:ident: $kind:ty,)+
        }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(C)]
        pub struct $name { $($(#[$doc])* pub $field: $kind,)+ }

        const _: () = {
            assert!(core::mem::size_of::<$name>() == $bytes);
            assert!(0 $(+ core::mem::size_of::<$kind>())+ == $bytes, "padding");
            $(assert!(core::mem::offset_of!($name, $field) == $at);)+
        };

        impl $name {
            /// Size in bytes.
            pub const BYTES: usize = $bytes;

            /// The part as it stands in the page.
            pub fn to_bytes(&self) -> [u8; $bytes] {
                let mut bytes = [0; $bytes];
                $($crate::part::Field::put(
                    &self.$field,
                    &mut bytes[$at..$at + core::mem::size_of::<$kind>()],
                );)+
                bytes
            }

            /// The part that these bytes of the page hold. Every bit pattern is one: the fields are not
            /// checked.
            pub fn from_bytes(bytes: &[u8; $bytes]) -> Self {
                Self {
                    $($field: $crate::part::Field::get(&bytes[$at..$at + core::mem::size_of::<$kind>()]),)+
                }
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::from_bytes(&[0; $bytes])
            }
        }
    };
}

pub(crate) use part;
