//! How often something goes wrong in a test, and where: at random.

use std::env;

use fastrand::Rng;

use crate::assets;

/// How many rounds a test has: as many as `VMFORK_ROUNDS` says, or else so many here, and so many in the lab,
/// which is slow.
///
/// # Panics
/// Where the variable holds no number.
pub fn rounds(here: u64, in_lab: u64) -> u64 {
    number("VMFORK_ROUNDS").unwrap_or(if assets::in_lab() { in_lab } else { here })
}

/// Where things go wrong. A test that fails tells the seed, with which `VMFORK_SEED` has the same happen
/// again.
///
/// # Panics
/// Where the variable holds no number.
pub fn chance() -> Rng {
    let seed = number("VMFORK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("VMFORK_SEED={seed}");
    Rng::with_seed(seed)
}

fn number(variable: &str) -> Option<u64> {
    let value = env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable}={value} is no number")))
}
