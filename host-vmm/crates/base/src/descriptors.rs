//! Room for file descriptors.
//!
//! Linux lets a process's table of descriptors grow as it is needed, and in a process of several threads
//! waits for an RCU grace period each time: 16 ms (measured). So whoever will need many has the table grow
//! before it starts a thread, or while nobody waits for it.

use std::{io, os::fd::AsFd};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::close,
};

/// Lets this process have as many files open as it is ever allowed to, and says how many that are.
pub fn raise_limit() -> io::Result<u64> {
    let limit = Resource::RLIMIT_NOFILE;
    let (_, hard) = getrlimit(limit)?;
    setrlimit(limit, hard, hard)?;
    Ok(hard)
}

/// Makes room for descriptors up to `count`. `any` is an open file.
pub fn make_room(any: &impl AsFd, count: u64) -> io::Result<()> {
    let last = i32::try_from(count.saturating_sub(1)).map_err(io::Error::other)?;
    close(fcntl(any, FcntlArg::F_DUPFD_CLOEXEC(last))?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn there_is_room_up_to_the_limit() {
        let limit = raise_limit().unwrap();
        let any = File::open("/dev/null").unwrap();
        make_room(&any, limit.min(4096)).unwrap();
        assert!(make_room(&any, limit + 1).is_err());
    }
}
