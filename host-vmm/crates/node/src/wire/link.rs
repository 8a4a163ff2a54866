//! The connection between the platform and one node: whole messages with file descriptors, over a UNIX socket
//! (SOCK_SEQPACKET).

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    marker::PhantomData,
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use base::text::Reason;
use capsule::codec;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
        SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType, recv,
        recvmsg, sendmsg, shutdown, socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use vmm::memory::MAX_LAYERS;

/// Longest message in bytes.
const MAX_BYTES: usize = 64 * 1024;

/// Most file descriptors that Linux lets one message carry (SCM_MAX_FD): with room for all of them none can
/// get lost. A capsule needs fewer.
const MAX_FILES: usize = 253;
const _: () =
    assert!(MAX_LAYERS + 2 <= MAX_FILES, "a warm VM that stands by gets a wake event and a rendezvous too");

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
    /// A message can't be sent, since nobody would take it: the connection is as it was.
    #[error(
        "a message of {bytes} bytes with {files} files can't be sent: {MAX_BYTES} bytes and {MAX_FILES} files are the most"
    )]
    TooLong {
        /// How long it is.
        bytes: usize,
        /// How many files come with it.
        files: usize,
    },
    /// A message, or the number of its files, was cut off.
    #[error("a message came that is too long")]
    Truncated,
    /// A message that is out of order.
    #[error("an unexpected message came: {0}")]
    Unexpected(Reason),
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
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
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
    /// [`Error::Closed`], [`Error::Io`] or [`Error::TooLong`].
    pub fn send(&self, message: &S, files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send_with(message, files, SendFlags::empty())
    }

    /// Sends a message to somebody who may not read his messages.
    ///
    /// # Errors
    /// As [`Link::send`]; [`Error::Io`] also where there is no room for it.
    pub fn try_send(&self, message: &S, files: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send_with(message, files, SendFlags::DONTWAIT)
    }

    /// Sends a message to somebody who reads his messages, though perhaps not at once.
    ///
    /// # Errors
    /// As [`Link::try_send`], where there is no room for it within the limit.
    pub fn send_within(&self, message: &S, files: &[BorrowedFd<'_>], limit: Duration) -> Result<(), Error> {
        let until = Instant::now() + limit;
        loop {
            match self.try_send(message, files) {
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {}
                sent => return sent,
            }
            self.await_event(PollFlags::POLLOUT, until, "send")?;
        }
    }

    fn send_with(&self, message: &S, files: &[BorrowedFd<'_>], flags: SendFlags) -> Result<(), Error> {
        let bytes = codec::encode(message).map_err(Error::Malformed)?;
        let too_long = Error::TooLong { bytes: bytes.len(), files: files.len() };
        if bytes.len() > MAX_BYTES || files.len() > MAX_FILES {
            return Err(too_long);
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(too_long);
        }
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, flags | SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::Closed),
                Err(errno) => return Err(Error::Io { operation: "send", source: errno.into() }),
            }
        }
    }

    /// Waits for a message, and the files that came with it.
    ///
    /// # Errors
    /// [`Error`]. Files that came with a message that is not taken are closed.
    pub fn receive(&self) -> Result<(R, Vec<File>), Error> {
        let length = self.wait_length()?;
        let mut bytes = vec![0; length];
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        // It is there: this does not wait.
        let message =
            recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
        let message = message.map_err(receive_failed)?;
        let rights = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let files = rights.flatten().map(File::from).collect();
        if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) || message.bytes != length {
            return Err(Error::Truncated);
        }
        Ok((codec::decode(&bytes).map_err(Error::Malformed)?, files))
    }

    /// Waits until there is a message to receive, or the other side is gone.
    ///
    /// # Errors
    /// [`Error::Io`] where neither is so in time.
    pub fn await_message(&self, until: Instant) -> Result<(), Error> {
        self.await_event(PollFlags::POLLIN, until, "receive in time")
    }

    fn await_event(&self, event: PollFlags, until: Instant, operation: &'static str) -> Result<(), Error> {
        let mut fds = [PollFd::new(self.socket.as_fd(), event)];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // Not woken up before the time is over, but in the millisecond after.
            let left = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, left) {
                Ok(0) if Instant::now() >= until => {
                    return Err(Error::Io { operation, source: io::ErrorKind::TimedOut.into() });
                }
                Ok(0) | Err(nix::Error::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Error::Io { operation, source: errno.into() }),
            }
        }
    }

    /// Waits for a message, leaves it where it is, and says how long it is: most are short, and a buffer for
    /// the longest costs tens of microseconds to clear.
    fn wait_length(&self) -> Result<usize, Error> {
        loop {
            return match recv(&self.socket, &mut [0; 0], RecvFlags::PEEK | RecvFlags::TRUNC) {
                Ok((_, 0)) => Err(Error::Closed),
                Ok((_, length)) if length > MAX_BYTES => Err(Error::Truncated),
                Ok((_, length)) => Ok(length),
                Err(Errno::INTR) => continue,
                Err(errno) => Err(receive_failed(errno)),
            };
        }
    }

    /// Breaks the connection: whoever waits on either side learns that it is closed.
    pub fn shut_down(&self) {
        // The only failure is that the other side is gone already.
        if let Err(errno) = shutdown(&self.socket, Shutdown::Both) {
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

fn receive_failed(errno: Errno) -> Error {
    match errno {
        Errno::CONNRESET => Error::Closed,
        errno => Error::Io { operation: "receive", source: errno.into() },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use vmm::memory;

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
    fn files_that_are_not_taken_are_closed() {
        let (ours, theirs) = Link::<u32, String>::pair().unwrap();
        let theirs = Link::<u32, u32>::new(theirs);
        let (reader, writer) = std::io::pipe().unwrap();
        theirs.send(&u32::MAX, &[writer.as_fd()]).unwrap();
        drop(writer);
        assert!(matches!(ours.receive(), Err(Error::Malformed(_))));
        // Nobody has the other end any more.
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
        let (reader, writer) = std::io::pipe().unwrap();
        theirs.send(&0, &vec![writer.as_fd(); MAX_FILES]).unwrap();
        let too_many = theirs.send(&0, &vec![writer.as_fd(); MAX_FILES + 1]);
        assert!(matches!(too_many, Err(Error::TooLong { files, .. }) if files == MAX_FILES + 1));
        drop(writer);
        drop(ours.receive());
        assert_eq!(std::io::read_to_string(reader).unwrap(), "");
    }

    #[test]
    fn nobody_waits_for_one_who_reads_nothing_or_says_nothing() {
        let (ours, _theirs) = Link::<String, u32>::pair().unwrap();
        let (message, short) = ("x".repeat(1000), Duration::from_millis(20));
        while ours.try_send(&message, &[]).is_ok() {}
        let timed_out = |result| matches!(result, Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::TimedOut);
        assert!(timed_out(ours.send_within(&message, &[], short)));
        assert!(timed_out(ours.await_message(Instant::now() + short)));
        ours.shut_down();
        assert!(matches!(ours.send_within(&message, &[], short), Err(Error::Closed)));
        ours.await_message(Instant::now() + short).unwrap();
    }

    #[test]
    fn what_is_too_long_is_the_senders_mistake_and_the_connection_stays() {
        let (ours, theirs) = Link::<Vec<u8>, u32>::pair().unwrap();
        let theirs = Link::<u32, Vec<u8>>::new(theirs);
        // Its length is in front of it.
        let longest = vec![7; MAX_BYTES - size_of::<u64>()];
        let too_long = ours.send(&[&longest[..], &[7]].concat(), &[]);
        assert!(matches!(too_long, Err(Error::TooLong { bytes, files: 0 }) if bytes == MAX_BYTES + 1));
        assert!(!theirs.is_readable());
        ours.send(&longest, &[]).unwrap();
        assert_eq!(theirs.receive().unwrap().0, longest);
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
