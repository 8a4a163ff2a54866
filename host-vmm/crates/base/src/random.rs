//! Random bytes.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills a buffer from the kernel's generator (getrandom).
///
/// # Errors
/// Where the system has no random bytes to give.
pub fn fill(buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match getrandom(&mut buffer[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
