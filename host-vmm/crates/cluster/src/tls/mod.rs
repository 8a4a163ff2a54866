//! Connections between platforms, and from operators to them: TLS 1.3, in which both sides show a certificate
//! of the cluster's CA.
//!
//! - [`Credentials`]: what one side shows, and whom it believes.
//! - [`Listener`]: where a platform is asked; `axum` serves on it, and a handler has the [`ConnectionPeer`]
//!   in `ConnectInfo`.
//! - [`connect`]: how it is asked.
//!
//! Without TLS there are connections within a host only, by a loopback address, where an operator has said
//! so.
//!
//! The side that connects is done with its handshake before the other side has looked at its certificate. If
//! that one is refused, the first read says so: with an error in whose chain there is a [`Fault`], as there
//! is in one of [`connect`].

use std::{io, net::SocketAddr, path::PathBuf, time::Duration};

use rustix::net::sockopt;
use rustls::{AlertDescription as Alert, CertificateError, Error as Tls, server::VerifierBuilderError};
use tokio::{io::BufReader, net::TcpStream};

use super::principal::{ConnectionPeer, Principal};

mod credentials;
mod listener;
mod stream;

pub use credentials::Credentials;
pub(super) use credentials::{read_certificates, read_key};
pub use listener::Listener;
pub use stream::{Endpoint, Stream, connect};

/// The protocol inside, by its registered name.
const HTTP: &[u8] = b"http/1.1";

/// How long a connection may take to be there, and again its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long something that was sent may stay without an acknowledgement, before the other side is taken for
/// gone.
const USER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long nothing is heard before the other side is asked whether it is there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// How long it has for each answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// How often it is asked, until it is taken for gone.
const KEEPALIVE_PROBES: u32 = 3;

/// Why something can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No platform has such a name.
    #[error(
        "{0:?} is no name of a platform: that has 1 to 32 characters of a-z, 0-9 and -, and does not start or end with -"
    )]
    Name(String),
    /// Whoever is on the way could read and change everything.
    #[error(
        "{0} is no loopback address: give a certificate, for without TLS there are connections within this host only"
    )]
    Plain(SocketAddr),
    /// An address can't be listened on.
    #[error("can't listen on {address}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Nobody takes connections there.
    #[error("can't reach {address}")]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Somebody is there, but not as it should be.
    #[error("no connection to {peer} at {address}")]
    Connection {
        /// Who should be there.
        peer: ConnectionPeer,
        /// The address.
        address: SocketAddr,
        /// What is wrong.
        source: Fault,
    },
    /// A file can't be read.
    #[error("can't read {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{} holds no {what} in PEM", .path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// A key is no secret.
    #[error("{} is a secret key that other users can read: `chmod 600` it", .path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// The own certificate is not one of a cluster.
    #[error(
        "the certificate names no platform and no operator of a cluster: `host-vmm cert issue` makes one that does"
    )]
    Nobody,
    /// The own certificate would be refused.
    #[error("the certificate of {principal} is of no use")]
    Useless {
        /// Whose it is.
        principal: Principal,
        /// What is wrong.
        source: Fault,
    },
    /// The own certificate can't be shown.
    #[error("can't use the certificate with this key")]
    Pair(#[source] Tls),
    /// The certificate of the CA can't be used.
    #[error("can't use the certificate of the CA")]
    Ca(#[source] Tls),
    /// There is no way to verify anybody's certificate.
    #[error("can't verify certificates")]
    Verifier(#[source] VerifierBuilderError),
    /// This side has no TLS 1.3.
    #[error("can't use TLS 1.3")]
    Setup(#[source] Tls),
}

impl Error {
    /// Whether it may be different the next time: nobody has said no.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Connection { source, .. } => {
                matches!(source, Fault::Slow(_) | Fault::Closed | Fault::Io(_))
            }
            _ => false,
        }
    }
}

/// What is wrong with the other side of a connection.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It sends something else.
    #[error("it does not speak TLS")]
    NotTls,
    /// It knows no version, or no algorithm, that this side takes.
    #[error("it does not speak TLS 1.3 in a way that this side does")]
    Incompatible,
    /// It has no certificate.
    #[error("it shows no certificate")]
    NoCertificate,
    /// It is of another cluster, or one of the two has the wrong `ca.pem`.
    #[error("its certificate is of another cluster: no CA that is known here has signed it")]
    UnknownCa,
    /// Its certificate is too old.
    #[error("its certificate has expired (or a clock is wrong): issue another one")]
    Expired,
    /// Its certificate is of the future.
    #[error("its certificate is not valid yet: a clock is wrong")]
    NotValidYet,
    /// It is not who it should be.
    #[error("its certificate is that of {0}")]
    SomebodyElse(String),
    /// It has a certificate that this program would not make.
    #[error("its certificate names no platform and no operator of a cluster")]
    Nobody,
    /// It does not take what this side shows.
    #[error("it refuses this side: {}", refusal(.0))]
    Refused(Alert),
    /// It is too slow.
    #[error("it has not finished the handshake within {0:?}")]
    Slow(Duration),
    /// It has gone away.
    #[error("it has closed the connection before the end of the handshake: perhaps it does not speak TLS")]
    Closed,
    /// The connection is broken.
    #[error("the connection is broken")]
    Io(#[source] io::Error),
    /// Something else is wrong with its certificate, or with how it speaks TLS.
    #[error("it breaks the rules of TLS")]
    Protocol(#[source] Box<Tls>),
}

fn refusal(alert: &Alert) -> String {
    match alert {
        // Where the two CAs have one name, the signature is what is wrong.
        Alert::UnknownCA | Alert::DecryptError => {
            "it does not know the CA that has signed this side's certificate".into()
        }
        Alert::CertificateExpired => "this side's certificate has expired, or is not valid yet".into(),
        Alert::CertificateRequired => "it wants a certificate".into(),
        Alert::BadCertificate => "this side's certificate is not that of whom it wants".into(),
        Alert::NoApplicationProtocol => "it does not speak HTTP/1.1".into(),
        other => format!("TLS alert {other:?}"),
    }
}

impl From<&Tls> for Fault {
    fn from(error: &Tls) -> Self {
        match error {
            Tls::InvalidMessage(_) | Tls::PeerSentOversizedRecord => Self::NotTls,
            Tls::PeerIncompatible(_)
            | Tls::AlertReceived(Alert::ProtocolVersion | Alert::HandshakeFailure) => Self::Incompatible,
            Tls::NoCertificatesPresented => Self::NoCertificate,
            Tls::AlertReceived(alert) => Self::Refused(*alert),
            Tls::InvalidCertificate(certificate) => match certificate {
                CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UnknownCa,
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    Self::NotValidYet
                }
                CertificateError::NotValidForNameContext { presented, .. } => {
                    Self::SomebodyElse(names(presented))
                }
                _ => Self::Protocol(Box::new(error.clone())),
            },
            _ => Self::Protocol(Box::new(error.clone())),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        match tls_error(&error) {
            Some(error) => Self::from(error),
            None if matches!(
                error.kind(),
                BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof
            ) =>
            {
                Self::Closed
            }
            None => Self::Io(error),
        }
    }
}

/// What TLS itself has to say of a connection's error.
fn tls_error(error: &io::Error) -> Option<&Tls> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// Who a certificate is of, by its names, which rustls has as `DnsName("alpha.platform.host-vmm.internal")`.
fn names(presented: &[String]) -> String {
    let plain = |name: &String| {
        let name = name.strip_prefix("DnsName(\"").and_then(|name| name.strip_suffix("\")")).unwrap_or(name);
        Principal::from_dns_name(name).map_or_else(|| format!("{name:?}"), |principal| principal.to_string())
    };
    let names: Vec<String> = presented.iter().map(plain).collect();
    if names.is_empty() { "nobody".to_owned() } else { names.join(", ") }
}

fn check_loopback(address: SocketAddr) -> Result<(), Error> {
    if address.ip().is_loopback() { Ok(()) } else { Err(Error::Plain(address)) }
}

/// What TLS reads from. It takes a few KiB at a time, and a call of the system for each of them costs more
/// than to decrypt them.
type Tcp = BufReader<TcpStream>;

/// Bytes that are read at once.
const READ_BYTES: usize = 128 << 10;

fn buffered(tcp: TcpStream) -> Tcp {
    BufReader::with_capacity(READ_BYTES, tcp)
}

/// Has small messages sent at once, and finds out when the other side's host is gone.
fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(tcp, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(tcp, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(tcp, u32::try_from(USER_TIMEOUT.as_millis()).unwrap_or(u32::MAX))?;
    Ok(())
}

#[cfg(test)]
#[path = "tls_test.rs"]
mod tests;
