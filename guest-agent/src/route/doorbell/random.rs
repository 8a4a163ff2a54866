//! The kernel's random pool, which a copy shares with its parent until a seed of its own is mixed in.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

/// Where the pool's ioctls are served (random(4)).
pub(crate) const PATH: &str = "/dev/urandom";

/// `struct rand_pool_info` of linux/random.h, with room for one seed.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct PoolInput {
    entropy_bits: libc::c_int,
    buffer_bytes: libc::c_int,
    seed: [u8; 64],
}

nix::ioctl_write_ptr_bad! {
    /// RNDADDENTROPY, which linux/random.h numbers by the two counts alone.
    add_entropy, nix::request_code_write!(b'R', 0x03, size_of::<[libc::c_int; 2]>()), PoolInput
}
nix::ioctl_none! {
    /// RNDRESEEDCRNG.
    reseed, b'R', 0x07
}

/// The random device, opened.
#[derive(Debug)]
pub(crate) struct RandomPool {
    device: File,
}

impl RandomPool {
    /// Opens [`PATH`].
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { device: File::open(PATH)? })
    }

    /// Random bits, without waiting for the pool to be filled.
    pub(crate) fn bits(&self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        (&self.device).read_exact(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Mixes `seed` into the pool and credits all of its bits.
    ///
    /// # Errors
    ///
    /// EPERM without CAP_SYS_ADMIN.
    pub(crate) fn mix(&self, seed: &[u8; 64]) -> io::Result<()> {
        let input = PoolInput { entropy_bits: 512, buffer_bytes: 64, seed: *seed };
        // SAFETY: the kernel reads the two counts and `buffer_bytes` bytes behind them, which is the whole
        // struct.
        unsafe { add_entropy(self.device.as_raw_fd(), &raw const input)? };
        Ok(())
    }

    /// Makes the kernel's generator take a new key from the pool now: Linux 4.14 and later.
    ///
    /// # Errors
    ///
    /// EPERM without CAP_SYS_ADMIN.
    pub(crate) fn reseed(&self) -> io::Result<()> {
        // SAFETY: the request has no argument.
        unsafe { reseed(self.device.as_raw_fd())? };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_the_kernel_headers() {
        assert_eq!(nix::request_code_write!(b'R', 0x03, size_of::<[libc::c_int; 2]>()), 0x4008_5203);
        assert_eq!(nix::request_code_none!(b'R', 0x07), 0x5207);
        assert_eq!(size_of::<PoolInput>(), 8 + 64);
    }
}
