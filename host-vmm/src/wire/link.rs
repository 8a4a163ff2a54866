//! The connection between the platform and one node: whole messages with file descriptors, over a UNIX socket (SOCK_SEQPACKET).

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    cmsg_space,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType, recv, recvmsg,
        sendmsg, shutdown, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{capsule::codec, memory::MAX_LAYERS};

/// Longest message in bytes.
const MAX_BYTES: usize = 64 * 1024;

/// Most file descriptors that Linux lets one message carry (SCM_MAX_FD): with room for all of them none can get lost. A capsule
/// needs fewer.
const MAX_FILES: usize = 253;
const _: () = assert!(MAX_LAYERS < MAX_FILES);

/// Why a message did not get through.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The other side is gone.
    #[error("the other side has closed the connection")]
    Closed,
    /// The socket failed.
    #[error("can't {operation} on the connection")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A message is malformed.
    #[error("a malformed message came")]
    Malformed(#[source] codec::Error),
    /// A message, or the number of its files, was cut off.
    #[error("a message came that is too long")]
    Truncated,
    /// A message that is out of order.
    #[error("an unexpected message came: {0}")]
    Unexpected(String),
}

/// One side: it sends `S` and receives `R`.
#[derive(Debug)]
pub struct Link<S, R> {
    socket: OwnedFd,
    kinds: PhantomData<fn(S) -> R>,
}

impl<S: Serialize, R: DeserializeOwned> Link<S, R> {
    /// A connection: this side, and the other side's socket.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn pair() -> Result<(Self, OwnedFd), Error> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| Error::Io { operation: "make a socket pair", source: errno.into() })?;
        Ok((Self::new(ours), theirs))
    }

    /// The side that has this socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, kinds: PhantomData }
    }

    /// Sends a message with files, and waits for room if there is none.
    ///
    /// # Errors
    /// [`Error::Closed`] or [`Error::Io`].
    pub fn send(&self, message: &S, files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send_with(message, files, MsgFlags::empty())
    }

    /// Sends a message to somebody who may not read his messages.
    ///
    /// # Errors
    /// [`Error::Closed`], or [`Error::Io`], also where there is no room for it.
    pub fn try_send(&self, message: &S, files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send_with(message, files, MsgFlags::MSG_DONTWAIT)
    }

    fn send_with(&self, message: &S, files: &[BorrowedFd<'_>], flags: MsgFlags) -> Result<(), Error> {
        let bytes = codec::encode(message).map_err(Error::Malformed)?;
        let files: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&files)];
        let control = if files.is_empty() { &[] } else { &rights[..] };
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => return Err(Error::Closed),
                Err(errno) => return Err(Error::Io { operation: "send", source: errno.into() }),
            }
        }
    }

    /// Waits for a message, and the files that came with it.
    ///
    /// # Errors
    /// [`Error`].
    pub fn receive(&self) -> Result<(R, Vec<File>), Error> {
        let length = self.wait_length()?;
        let mut bytes = vec![0; length];
        let mut control = cmsg_space!([RawFd; MAX_FILES]);
        let mut buffers = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        // It is there: this does not wait.
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut buffers, Some(&mut control), flags);
        let message = message.map_err(receive_failed)?;
        let truncated = message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
        let files = take_files(message.cmsgs().map_err(|_| Error::Truncated)?);
        if truncated || message.bytes != length {
            return Err(Error::Truncated);
        }
        Ok((codec::decode(&bytes).map_err(Error::Malformed)?, files))
    }

    /// Waits for a message, leaves it where it is, and says how long it is: most are short, and a buffer for the longest costs tens of
    /// microseconds to clear.
    fn wait_length(&self) -> Result<usize, Error> {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
        loop {
            return match recv(self.socket.as_raw_fd(), &mut [], flags) {
                Ok(0) => Err(Error::Closed),
                Ok(length) if length > MAX_BYTES => Err(Error::Truncated),
                Ok(length) => Ok(length),
                Err(nix::Error::EINTR) => continue,
                Err(errno) => Err(receive_failed(errno)),
            };
        }
    }

    /// Breaks the connection: whoever waits on either side learns that it is closed.
    pub fn shut_down(&self) {
        // The only failure is that the other side is gone already.
        if let Err(errno) = shutdown(self.socket.as_raw_fd(), Shutdown::Both) {
            tracing::debug!(%errno, "a connection was broken before it was shut down");
        }
    }

    /// Whether the other side is gone.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        // POLLHUP and POLLERR are told unasked. A call that fails tells nothing.
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether a message waits to be received, or the other side is gone.
    pub fn is_readable(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }
}

impl<S, R> AsFd for Link<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn receive_failed(errno: nix::Error) -> Error {
    match errno {
        nix::Error::ECONNRESET => Error::Closed,
        errno => Error::Io { operation: "receive", source: errno.into() },
    }
}

fn take_files(messages: impl Iterator<Item = ControlMessageOwned>) -> Vec<File> {
    let rights = messages.filter_map(|message| match message {
        ControlMessageOwned::ScmRights(files) => Some(files),
        _ => None,
    });
    // SAFETY: the kernel has just made these descriptors for this process, and nobody else knows them.
    rights.flatten().map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) })).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::memory;

    #[test]
    fn messages_carry_files() {
        let (ours, theirs) = Link::<String, u32>::pair().unwrap();
        let theirs = Link::<u32, String>::new(theirs);
        let file = memory::sealed("test", b"inside").unwrap();
        ours.send(&"hello".to_owned(), &[file.as_fd(), file.as_fd()]).unwrap();
        let (message, files) = theirs.receive().unwrap();
        assert_eq!((message.as_str(), files.len()), ("hello", 2));
        let mut content = [0; 6];
        files[1].read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"inside");
        theirs.send(&7, &[]).unwrap();
        assert_eq!(ours.receive().unwrap().0, 7);
    }

    #[test]
    fn garbage_and_an_end_are_errors() {
        let (ours, theirs) = Link::<u32, String>::pair().unwrap();
        assert!(!ours.is_readable());
        let theirs = Link::<u32, u32>::new(theirs);
        theirs.send(&u32::MAX, &[]).unwrap();
        assert!(matches!(ours.receive(), Err(Error::Malformed(_))));
        drop(theirs);
        assert!(matches!(ours.receive(), Err(Error::Closed)));
        assert!(matches!(ours.send(&1, &[]), Err(Error::Closed)));
    }
}
