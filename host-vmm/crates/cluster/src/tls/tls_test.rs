use std::{error::Error as StdError, iter, net::Ipv4Addr, ops::Range};

use axum::{
    Router,
    body::Bytes,
    extract::ConnectInfo,
    routing::{get, post},
    serve,
};
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use rcgen::CertificateParams;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer},
    version::TLS13,
};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener, UnixStream},
    runtime,
    time::{sleep, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    listener::{MAX_HANDSHAKES, handshake},
    *,
};
use crate::{certificates::Authority, principal::Role};

/// A loopback address with a port that is free.
const HERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Long enough for anything that should happen at once, and far shorter than [`HANDSHAKE_TIMEOUT`].
const SOON: Duration = Duration::from_secs(3);

type Failure = Box<dyn StdError + Send + Sync>;

struct Cluster {
    authority: Authority,
    trusted: Vec<CertificateDer<'static>>,
}

impl Cluster {
    fn new() -> Self {
        let authority = Authority::generate().unwrap();
        let ca = authority.certificate(&days(-1, 1)).unwrap();
        Self { authority, trusted: vec![ca.into()] }
    }

    fn credentials(&self, principal: &Principal, validity: &Range<OffsetDateTime>) -> Credentials {
        self.authority.issue(principal, validity).unwrap().credentials(&self.trusted).unwrap()
    }

    fn platform(&self, name: &str) -> Credentials {
        self.credentials(&platform(name), &days(-1, 1))
    }

    fn operator(&self, name: &str) -> Credentials {
        self.credentials(&Principal::new(name, Role::Operator).unwrap(), &days(-1, 1))
    }

    /// Somebody who believes in this cluster's CA, and shows what another one has signed.
    fn pretender(&self, name: &str) -> Credentials {
        let pair = Authority::generate().unwrap().issue(&platform(name), &days(-1, 1)).unwrap();
        pair.credentials(&self.trusted).unwrap()
    }

    /// A client that shows just any certificate, or none.
    fn stranger(&self, shown: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        self.trusted.iter().for_each(|certificate| roots.add(certificate.clone()).unwrap());
        let config = ClientConfig::builder_with_provider(ring::default_provider().into());
        let config = config.with_protocol_versions(&[&TLS13]).unwrap().with_root_certificates(roots);
        let config = match shown {
            Some((certificate, key)) => config.with_client_auth_cert(vec![certificate], key).unwrap(),
            None => config.with_no_client_auth(),
        };
        TlsConnector::from(std::sync::Arc::new(config))
    }
}

fn platform(name: &str) -> Principal {
    Principal::new(name, Role::Platform).unwrap()
}

fn days(from: i64, to: i64) -> Range<OffsetDateTime> {
    let now = OffsetDateTime::now_utc();
    now + time::Duration::days(from)..now + time::Duration::days(to)
}

fn beta(address: SocketAddr, credentials: Credentials) -> Endpoint {
    Endpoint::Tls { address, platform: "beta".into(), credentials }
}

/// A server that tells everybody who they are, and gives back what they send.
fn routes() -> Router {
    let who = |ConnectInfo(peer): ConnectInfo<ConnectionPeer>| async move { peer.to_string() };
    Router::new().route("/who", get(who)).route("/echo", post(|body: Bytes| async move { body }))
}

fn serve_on<L: serve::Listener<Addr: std::fmt::Debug>>(listener: L)
where
    ConnectionPeer: for<'a> axum::extract::connect_info::Connected<serve::IncomingStream<'a, L>>,
{
    let service = routes().into_make_service_with_connect_info::<ConnectionPeer>();
    tokio::spawn(async move { serve(listener, service).await });
}

async fn served(credentials: &Credentials) -> SocketAddr {
    let listener = Listener::bind(HERE, credentials).await.unwrap();
    let address = listener.address().unwrap();
    serve_on(listener);
    address
}

async fn exchange<S>(stream: S, path: &str, body: Bytes) -> Result<Bytes, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder().method(if body.is_empty() { "GET" } else { "POST" }).uri(path);
    let request = request.header(header::HOST, "localhost").body(Full::new(body))?;
    let answer = async {
        let response = sender.send_request(request).await?;
        drop(sender);
        Ok(response.into_body().collect().await?.to_bytes())
    };
    tokio::join!(answer, connection).0
}

async fn who_am_i(endpoint: &Endpoint) -> Result<String, Failure> {
    let answer = exchange(connect(endpoint).await?, "/who", Bytes::new()).await?;
    Ok(String::from_utf8(answer.to_vec())?)
}

/// What a server thinks of a client.
async fn judged<F>(
    server: &Credentials,
    limit: Duration,
    client: impl FnOnce(TcpStream) -> F,
) -> Result<Stream, Fault>
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(HERE).await.unwrap();
    let tcp = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let client = tokio::spawn(client(tcp));
    let (tcp, address) = listener.accept().await.unwrap();
    let judged = handshake(&server.acceptor(), tcp, address, limit).await;
    client.abort();
    judged
}

/// A client that connects to the platform beta, and waits for what comes.
async fn connects(connector: TlsConnector, tcp: TcpStream) {
    if let Ok(mut tls) = connector.connect(platform("beta").server_name().unwrap(), tcp).await {
        drop(tls.read_to_end(&mut Vec::new()).await);
    }
}

async fn sends(bytes: Vec<u8>, mut tcp: TcpStream) {
    tcp.write_all(&bytes).await.unwrap();
    drop(tcp.shutdown().await);
    drop(tcp.read_to_end(&mut Vec::new()).await);
}

/// What lies behind an error.
fn cause<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    iter::successors(Some(error), |&error| error.source()).find_map(|error| error.downcast_ref())
}

macro_rules! assert_fault {
    ($result:expr, $fault:pat) => {{
        let error: Failure = $result.unwrap_err().into();
        assert!(matches!(cause(error.as_ref()), Some($fault)), "{error:?}");
    }};
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let cluster = Cluster::new();
    let address = served(&cluster.platform("beta")).await;
    let from_alpha = beta(address, cluster.platform("alpha"));
    assert_eq!(who_am_i(&from_alpha).await.unwrap(), "the platform alpha");
    assert_eq!(who_am_i(&beta(address, cluster.operator("alice"))).await.unwrap(), "the operator alice");
    let stream = connect(&from_alpha).await.unwrap();
    assert_eq!((stream.peer(), stream.address()), (&ConnectionPeer::Certified(platform("beta")), address));
}

#[tokio::test]
async fn much_arrives_as_it_was_sent() {
    let cluster = Cluster::new();
    let address = served(&cluster.platform("beta")).await;
    let sent: Bytes = (0..1_500_000_u32).map(|at| at.to_le_bytes()[usize::from(at % 3 == 0)]).collect();
    let stream = connect(&beta(address, cluster.platform("alpha"))).await.unwrap();
    assert!(exchange(stream, "/echo", sent.clone()).await.unwrap() == sent);
}

#[tokio::test]
async fn a_certificate_of_another_cluster_is_refused_on_both_sides() {
    let (cluster, other) = (Cluster::new(), Cluster::new());
    let server = cluster.platform("beta");
    let address = served(&server).await;
    assert_fault!(connect(&beta(address, other.platform("alpha"))).await, Fault::UnknownCa);
    let pretender = cluster.pretender("alpha");
    let connector = pretender.connector();
    assert_fault!(judged(&server, HANDSHAKE_TIMEOUT, |tcp| connects(connector, tcp)).await, Fault::UnknownCa);
    assert_fault!(who_am_i(&beta(address, pretender)).await, Fault::Refused(Alert::UnknownCA));
}

#[tokio::test]
async fn who_speaks_on_still_hears_why_it_is_refused() {
    let cluster = Cluster::new();
    let tcp = TcpStream::connect(served(&cluster.platform("beta")).await).await.unwrap();
    let connector = cluster.pretender("alpha").connector();
    let mut tls = connector.connect(platform("beta").server_name().unwrap(), tcp).await.unwrap();
    for _ in 0..5 {
        tls.write_all(&[0; 4096]).await.unwrap();
        tls.flush().await.unwrap();
        sleep(Duration::from_millis(10)).await;
    }
    let error = tls.read(&mut [0]).await.unwrap_err();
    assert_eq!(tls_error(&error), Some(&Tls::AlertReceived(Alert::UnknownCA)));
}

#[tokio::test]
async fn a_certificate_has_its_time() {
    let cluster = Cluster::new();
    let server = cluster.platform("beta");
    let address = served(&server).await;
    let alpha = |from, to| cluster.credentials(&platform("alpha"), &days(from, to));
    let expired = beta(address, alpha(-2, -1));
    assert_fault!(who_am_i(&expired).await, Fault::Refused(Alert::CertificateExpired));
    let (expired, early) = (alpha(-2, -1).connector(), alpha(1, 2).connector());
    assert_fault!(judged(&server, HANDSHAKE_TIMEOUT, |tcp| connects(expired, tcp)).await, Fault::Expired);
    assert_fault!(judged(&server, HANDSHAKE_TIMEOUT, |tcp| connects(early, tcp)).await, Fault::NotValidYet);

    let late = served(&cluster.credentials(&platform("beta"), &days(-2, -1))).await;
    assert_fault!(connect(&beta(late, cluster.platform("alpha"))).await, Fault::Expired);
}

#[test]
fn credentials_that_nobody_would_take_are_found_before() {
    let cluster = Cluster::new();
    let useless =
        |credentials: Credentials| credentials.checked().map(|credentials| credentials.principal().clone());
    assert_eq!(useless(cluster.platform("alpha")).unwrap(), platform("alpha"));
    assert_fault!(useless(cluster.credentials(&platform("alpha"), &days(-2, -1))), Fault::Expired);
    assert_fault!(useless(cluster.pretender("alpha")), Fault::UnknownCa);
}

#[test]
fn a_key_belongs_to_its_certificate() {
    let cluster = Cluster::new();
    let [mut one, other] =
        ["alpha", "beta"].map(|name| cluster.authority.issue(&platform(name), &days(-1, 1)).unwrap());
    one.key = other.key;
    assert!(matches!(one.credentials(&cluster.trusted), Err(Error::Pair(_))));
}

#[tokio::test]
async fn somebody_else_is_named() {
    let cluster = Cluster::new();
    for (server, name) in [(cluster.platform("gamma"), "gamma"), (cluster.operator("beta"), "beta")] {
        let address = served(&server).await;
        let error = connect(&beta(address, cluster.platform("alpha"))).await.unwrap_err();
        let Some(Fault::SomebodyElse(found)) = cause(&error) else { panic!("{error:?}") };
        assert_eq!(*found, server.principal().to_string());
        assert!(found.ends_with(name) && error.to_string().contains("the platform beta"), "{error}");
    }
    let endpoint =
        Endpoint::Tls { address: HERE, platform: "*".into(), credentials: cluster.platform("alpha") };
    assert!(matches!(connect(&endpoint).await, Err(Error::Name(_))));
}

#[test]
fn names_that_are_none_of_ours_are_told_as_they_are() {
    let presented =
        ["DnsName(\"alpha.platform.host-vmm.internal\")", "DnsName(\"a\u{1b}.example\")", "IpAddress(::1)"];
    let told = names(&presented.map(str::to_owned));
    assert_eq!(told, "the platform alpha, \"a\\u{1b}.example\", \"IpAddress(::1)\"");
    assert_eq!(names(&[]), "nobody");
}

#[tokio::test]
async fn nobody_gets_in_without_a_certificate() {
    let cluster = Cluster::new();
    let server = cluster.platform("beta");
    let none = cluster.stranger(None);
    assert_fault!(judged(&server, HANDSHAKE_TIMEOUT, |tcp| connects(none, tcp)).await, Fault::NoCertificate);

    let tcp = TcpStream::connect(served(&server).await).await.unwrap();
    let none = cluster.stranger(None).connect(platform("beta").server_name().unwrap(), tcp).await.unwrap();
    let error = exchange(none, "/who", Bytes::new()).await.unwrap_err();
    let told = cause(error.as_ref()).and_then(tls_error);
    assert_eq!(told, Some(&Tls::AlertReceived(Alert::CertificateRequired)));
}

#[tokio::test]
async fn a_certificate_that_names_nobody_is_refused() {
    let cluster = Cluster::new();
    let params = CertificateParams::new(vec!["alpha.example".into()]).unwrap();
    let pair = cluster.authority.sign(&params).unwrap();
    assert!(matches!(pair.credentials(&cluster.trusted), Err(Error::Nobody)));
    let key = PrivateKeyDer::try_from(pair.key.serialize_der()).unwrap();
    let stranger = cluster.stranger(Some((pair.certificate.into(), key)));
    let judged = judged(&cluster.platform("beta"), HANDSHAKE_TIMEOUT, |tcp| connects(stranger, tcp)).await;
    assert_fault!(judged, Fault::Nobody);
}

#[tokio::test]
async fn who_speaks_no_tls_is_told_from_who_is_not_there() {
    let cluster = Cluster::new();
    let plain = Listener::bind_plain(HERE).await.unwrap();
    let address = plain.address().unwrap();
    serve_on(plain);
    assert_fault!(connect(&beta(address, cluster.platform("alpha"))).await, Fault::NotTls);

    let closing = TcpListener::bind(HERE).await.unwrap();
    let address = closing.local_addr().unwrap();
    let endpoint = beta(address, cluster.platform("alpha"));
    let (connected, ()) = tokio::join!(connect(&endpoint), async { drop(closing.accept().await.unwrap()) });
    assert_fault!(connected, Fault::Closed);

    drop(closing);
    let connected = connect(&endpoint).await;
    assert!(matches!(connected, Err(Error::Unreachable { .. })), "{connected:?}");
}

#[tokio::test]
async fn plain_bytes_do_no_harm_to_others() {
    let cluster = Cluster::new();
    let server = cluster.platform("beta");
    let request = b"GET /who HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec();
    assert_fault!(judged(&server, HANDSHAKE_TIMEOUT, |tcp| sends(request, tcp)).await, Fault::NotTls);
    let address = served(&server).await;
    assert!(who_am_i(&Endpoint::Plain(address)).await.is_err());
    assert_eq!(who_am_i(&beta(address, cluster.platform("alpha"))).await.unwrap(), "the platform alpha");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_is_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..600), like_tls: bool) {
        if like_tls && bytes.len() > 5 {
            bytes[..5].copy_from_slice(&[22, 3, 1, 0, 200]);
        }
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let server = Cluster::new().platform("beta");
        let judged = runtime.block_on(judged(&server, HANDSHAKE_TIMEOUT, |tcp| sends(bytes, tcp)));
        prop_assert!(judged.is_err());
    }
}

#[tokio::test]
async fn older_tls_is_refused() {
    // A ClientHello of TLS 1.2 (RFC 5246, 7.4.1.2) with one cipher suite, and the signature algorithms that
    // it can check.
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, 8, 0, 13, 0, 4, 0, 2, 4, 3]);
    let length = u8::try_from(hello.len()).unwrap();
    let record = [[22, 3, 1, 0, length + 4, 1, 0, 0, length].as_slice(), &hello].concat();

    let server = Cluster::new().platform("beta");
    let sent = record.clone();
    assert_fault!(judged(&server, HANDSHAKE_TIMEOUT, |tcp| sends(sent, tcp)).await, Fault::Incompatible);
    let mut tcp = TcpStream::connect(served(&server).await).await.unwrap();
    tcp.write_all(&record).await.unwrap();
    let mut answer = Vec::new();
    tcp.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70], "a fatal alert: protocol_version");
}

#[tokio::test]
async fn a_handshake_comes_to_an_end() {
    let server = Cluster::new().platform("beta");
    let silent = |tcp: TcpStream| async move {
        sleep(HANDSHAKE_TIMEOUT).await;
        drop(tcp);
    };
    assert_fault!(judged(&server, Duration::from_millis(50), silent).await, Fault::Slow(_));
}

#[tokio::test]
async fn nobody_waits_for_those_who_say_nothing() {
    let cluster = Cluster::new();
    let address = served(&cluster.platform("beta")).await;
    let mut silent = Vec::new();
    for _ in 0..2 * MAX_HANDSHAKES {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let endpoint = beta(address, cluster.platform("alpha"));
    let answer = timeout(SOON, who_am_i(&endpoint)).await.expect("somebody has to wait");
    assert_eq!(answer.unwrap(), "the platform alpha");
    // The oldest of them has made room.
    let ended = timeout(SOON, silent[0].read(&mut [0])).await.expect("there is no bound");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

#[tokio::test]
async fn plain_connections_stay_within_a_host() {
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    assert!(matches!(Listener::bind_plain(everywhere).await, Err(Error::Plain(_))));
    let elsewhere = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 80));
    assert!(matches!(connect(&Endpoint::Plain(elsewhere)).await, Err(Error::Plain(_))));
}

#[tokio::test]
async fn without_a_certificate_one_is_somebody_on_this_host() {
    let plain = Listener::bind_plain(HERE).await.unwrap();
    let address = plain.address().unwrap();
    serve_on(plain);
    assert_eq!(who_am_i(&Endpoint::Plain(address)).await.unwrap(), "somebody on this host");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    serve_on(UnixListener::bind(&path).unwrap());
    let answer = exchange(UnixStream::connect(&path).await.unwrap(), "/who", Bytes::new()).await.unwrap();
    assert_eq!(answer, ConnectionPeer::Local.to_string());
}
