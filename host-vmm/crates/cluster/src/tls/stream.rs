//! A connection, of either side.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsStream;

use super::{Credentials, Error, Fault, HANDSHAKE_TIMEOUT, Tcp, buffered, check_loopback, tls_error, tune};
use crate::principal::{ConnectionPeer, Principal, Role};

/// A platform, as one that connects to it has to know it.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// Over TLS.
    Tls {
        /// Where it is.
        address: SocketAddr,
        /// The name that its certificate must have.
        platform: String,
        /// What it is shown.
        credentials: Credentials,
    },
    /// On this host, without TLS.
    Plain(SocketAddr),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tls { address, platform, .. } => write!(f, "{address} ({platform})"),
            Self::Plain(address) => address.fmt(f),
        }
    }
}

/// Connects to a platform.
///
/// # Errors
/// [`Error::Name`] and [`Error::Plain`] where the endpoint can't be one; [`Error::Unreachable`] where nobody
/// takes the connection; [`Error::Connection`] where it is not the platform that does, with the [`Fault`]
/// that says why.
pub async fn connect(endpoint: &Endpoint) -> Result<Stream, Error> {
    match endpoint {
        Endpoint::Plain(address) => {
            check_loopback(*address)?;
            Ok(Stream::plain(dial(*address).await?, *address))
        }
        Endpoint::Tls { address, platform, credentials } => {
            let principal = Principal::new(platform, Role::Platform);
            let named = principal.and_then(|principal| Some((principal.server_name()?, principal)));
            let (name, principal) = named.ok_or_else(|| Error::Name(platform.clone()))?;
            let (tcp, peer) = (dial(*address).await?, ConnectionPeer::Certified(principal));
            let done = timeout(HANDSHAKE_TIMEOUT, credentials.connector().connect(name, buffered(tcp))).await;
            match done.map_err(|_| Fault::Slow(HANDSHAKE_TIMEOUT)).and_then(|done| done.map_err(Fault::from))
            {
                Ok(tls) => Ok(Stream::tls(tls.into(), peer, *address)),
                Err(source) => Err(Error::Connection { peer, address: *address, source }),
            }
        }
    }
}

async fn dial(address: SocketAddr) -> Result<TcpStream, Error> {
    let there = timeout(HANDSHAKE_TIMEOUT, TcpStream::connect(address)).await;
    let there = there.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let tuned = there.and_then(|tcp| tune(&tcp).map(|()| tcp));
    tuned.map_err(|source| Error::Unreachable { address, source })
}

/// A connection whose other side is known.
pub struct Stream {
    io: Io,
    peer: ConnectionPeer,
    address: SocketAddr,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<Tcp>>),
}

/// What can be read and written.
trait Duplex: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Duplex for T {}

impl Stream {
    pub(super) fn plain(tcp: TcpStream, address: SocketAddr) -> Self {
        Self { io: Io::Plain(tcp), peer: ConnectionPeer::Local, address }
    }

    pub(super) fn tls(tls: TlsStream<Tcp>, peer: ConnectionPeer, address: SocketAddr) -> Self {
        Self { io: Io::Tls(Box::new(tls)), peer, address }
    }

    /// Who is at its other end.
    pub fn peer(&self) -> &ConnectionPeer {
        &self.peer
    }

    /// The other end's address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn io(&mut self) -> Pin<&mut dyn Duplex> {
        match &mut self.io {
            Io::Plain(tcp) => Pin::new(tcp),
            Io::Tls(tls) => Pin::new(tls.as_mut()),
        }
    }

    /// Says of an error that is TLS's own what it means.
    fn explain(&self, error: io::Error) -> io::Error {
        let Some(fault) = tls_error(&error).map(Fault::from) else { return error };
        let source = Error::Connection { peer: self.peer.clone(), address: self.address, source: fault };
        io::Error::new(error.kind(), source)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { io: _, peer, address } = self;
        f.debug_struct("Stream").field("peer", peer).field("address", address).finish_non_exhaustive()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let polled = self.io().poll_read(cx, buf);
        polled.map_err(|error| self.explain(error))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = self.io().poll_write(cx, buf);
        polled.map_err(|error| self.explain(error))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = self.io().poll_write_vectored(cx, bufs);
        polled.map_err(|error| self.explain(error))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(tcp) => tcp.is_write_vectored(),
            Io::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = self.io().poll_flush(cx);
        polled.map_err(|error| self.explain(error))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = self.io().poll_shutdown(cx);
        polled.map_err(|error| self.explain(error))
    }
}
