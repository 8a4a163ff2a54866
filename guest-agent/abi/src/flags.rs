//! What a request can say beside how many children it wants. A VMM refuses flags that it does not know.

/// All copies are to run on the parent's platform.
pub const LOCAL: u32 = 1 << 0;

/// All copies are to run on other platforms.
pub const REMOTE: u32 = 1 << 1;
