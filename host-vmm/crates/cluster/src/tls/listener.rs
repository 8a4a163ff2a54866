//! Where a platform is asked.

use std::{collections::VecDeque, fmt, io, net::SocketAddr, time::Duration};

use axum::{
    extract::connect_info::Connected,
    serve::{self, IncomingStream},
};
use base::error::chain;
use rustix::net::{Shutdown, shutdown};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{Credentials, Error, Fault, HANDSHAKE_TIMEOUT, Stream, buffered, check_loopback, tune};
use crate::principal::{ConnectionPeer, Principal};

/// Most handshakes at a time. One more, and the oldest is given up: whoever means well needs milliseconds for
/// it.
pub(super) const MAX_HANDSHAKES: usize = 64;

/// How long somebody who is refused has to read why.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Bytes that are read from somebody who is refused.
const MAX_UNREAD_BYTES: usize = 256 << 10;

/// How long to wait where the system has nothing left for another connection.
const PAUSE: Duration = Duration::from_secs(1);

/// An address at which a platform takes connections. It is for `axum::serve`, on a runtime that has I/O and
/// time.
///
/// Handshakes are tasks of their own, so that nobody waits for somebody else's: a connection is there for the
/// server once it is known who is at its other end.
pub struct Listener {
    tcp: TcpListener,
    /// None where connections are plain.
    acceptor: Option<TlsAcceptor>,
    handshakes: JoinSet<Option<Stream>>,
    /// Handshakes, the oldest first; some may be done.
    oldest: VecDeque<AbortHandle>,
}

impl Listener {
    /// Listens for connections over TLS.
    ///
    /// # Errors
    /// [`Error::Bind`].
    pub async fn bind(address: SocketAddr, credentials: &Credentials) -> Result<Self, Error> {
        Self::new(address, Some(credentials.acceptor())).await
    }

    /// Listens for plain connections, at a loopback address. Every user of this host can make them, and is a
    /// [`ConnectionPeer::Local`].
    ///
    /// # Errors
    /// [`Error::Plain`] for any other address; [`Error::Bind`].
    pub async fn bind_plain(address: SocketAddr) -> Result<Self, Error> {
        check_loopback(address)?;
        Self::new(address, None).await
    }

    async fn new(address: SocketAddr, acceptor: Option<TlsAcceptor>) -> Result<Self, Error> {
        let tcp = TcpListener::bind(address).await.map_err(|source| Error::Bind { address, source })?;
        Ok(Self { tcp, acceptor, handshakes: JoinSet::new(), oldest: VecDeque::new() })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Where the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// Takes a connection; gives it back where there is nothing more to find out about it.
    fn take(&mut self, tcp: TcpStream, address: SocketAddr) -> Option<Stream> {
        if let Err(error) = tune(&tcp) {
            refuse(address, &Fault::Io(error));
            return None;
        }
        let Some(acceptor) = self.acceptor.clone() else { return Some(Stream::plain(tcp, address)) };
        self.oldest.retain(|handshake| !handshake.is_finished());
        if self.oldest.len() >= MAX_HANDSHAKES
            && let Some(oldest) = self.oldest.pop_front()
        {
            oldest.abort();
        }
        let task = self.handshakes.spawn(async move {
            let done = handshake(&acceptor, tcp, address, HANDSHAKE_TIMEOUT).await;
            done.inspect_err(|fault| refuse(address, fault)).ok()
        });
        self.oldest.push_back(task);
        None
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tls = self.acceptor.is_some();
        f.debug_struct("Listener").field("tcp", &self.tcp).field("tls", &tls).finish_non_exhaustive()
    }
}

impl serve::Listener for Listener {
    type Io = Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Stream, SocketAddr) {
        loop {
            let stream = tokio::select! {
                // Those who are known come before those who are not.
                biased;
                Some(done) = self.handshakes.join_next() => done.ok().flatten(),
                accepted = self.tcp.accept() => match accepted {
                    Ok((tcp, address)) => self.take(tcp, address),
                    Err(error) => {
                        pause_after(&error).await;
                        None
                    }
                },
            };
            if let Some(stream) = stream {
                let address = stream.address();
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.address()
    }
}

impl Connected<IncomingStream<'_, Listener>> for ConnectionPeer {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        stream.io().peer().clone()
    }
}

impl Connected<IncomingStream<'_, UnixListener>> for ConnectionPeer {
    fn connect_info(_: IncomingStream<'_, UnixListener>) -> Self {
        Self::Local
    }
}

/// Finds out who is at the other end.
pub(super) async fn handshake(
    acceptor: &TlsAcceptor,
    tcp: TcpStream,
    address: SocketAddr,
    limit: Duration,
) -> Result<Stream, Fault> {
    match timeout(limit, acceptor.accept(buffered(tcp)).into_fallible()).await {
        Ok(Ok(tls)) => {
            let certificate = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let principal = certificate.and_then(Principal::of).ok_or(Fault::Nobody)?;
            Ok(Stream::tls(tls.into(), ConnectionPeer::Certified(principal), address))
        }
        Ok(Err((error, tcp))) => {
            see_off(tcp.get_ref()).await;
            Err(error.into())
        }
        Err(_) => Err(Fault::Slow(limit)),
    }
}

/// Reads what is still on its way from somebody who was told that there will be no connection. Closed with
/// something unread, the connection would be reset, and the other side might never see why.
async fn see_off(tcp: &TcpStream) {
    let drain = async {
        shutdown(tcp, Shutdown::Write)?;
        let (mut buffer, mut unread_bytes) = ([0; 4096], 0);
        while unread_bytes < MAX_UNREAD_BYTES {
            tcp.readable().await?;
            match tcp.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(bytes) => unread_bytes += bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        io::Result::Ok(())
    };
    if let Ok(Err(error)) = timeout(LAST_WORD, drain).await {
        tracing::debug!(%error, "somebody who is refused does not listen");
    }
}

/// That somebody is refused is nothing to worry about: whoever can reach the address can have that said.
fn refuse(address: SocketAddr, fault: &Fault) {
    tracing::info!(%address, error = chain(fault), "a connection is refused");
}

/// Waits until connections can be taken again, where it is not the connection itself that has failed.
async fn pause_after(error: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        tracing::error!(%error, "no connections can be taken for a moment");
        sleep(PAUSE).await;
    }
}
