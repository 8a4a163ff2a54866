//! A connection to a platform.

use std::{
    fmt, io,
    net::SocketAddr,
    path::PathBuf,
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use base::{sync::lock, text::Reason};
use cluster::tls::{self, Credentials};
use http_body_util::{BodyExt, Limited};
use hyper::{
    HeaderMap, Method, Request, StatusCode,
    body::{Body, Bytes, Frame},
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    runtime::{self, Runtime},
};

use super::super::{
    Failure,
    steady::{LEAST_RATE, Limits, Slow, Steady},
};

/// Longest answer in bytes, whatever was asked.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Longest answer in bytes that says why there is no other one: a reason, with all of it escaped.
const MAX_REFUSAL_BYTES: usize = 32 << 10;

/// How long a platform has to take in what is long to send, and to take one more piece of it; and for the
/// whole of an answer that is long.
const LONG: Duration = Duration::from_secs(120);

/// How often it is looked whether anybody still waits for an answer.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// Says whether anybody still waits for an answer.
pub type GoesOn = Arc<dyn Fn() -> bool + Send + Sync>;

/// Why a platform was not asked, or does not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no runtime for it.
    #[error("can't get ready to ask a platform")]
    Runtime(#[source] io::Error),
    /// Nobody is there.
    #[error("the platform at {platform} can't be reached")]
    Connect {
        /// Where.
        platform: String,
        /// Why.
        source: io::Error,
    },
    /// It is not who it should be.
    #[error("the platform at {platform} can't be trusted")]
    Tls {
        /// Where.
        platform: String,
        /// Why.
        source: Box<tls::Error>,
    },
    /// The connection broke.
    #[error("the platform at {platform} does not answer")]
    Exchange {
        /// Where.
        platform: String,
        /// Why.
        source: hyper::Error,
    },
    /// It took too long.
    #[error("the platform at {platform} has not answered within {timeout:?}")]
    Silent {
        /// Where.
        platform: String,
        /// How long it had for that.
        timeout: Duration,
    },
    /// Nobody waits for its answer any more.
    #[error("the answer of the platform at {platform} is not needed any more")]
    GivenUp {
        /// Where.
        platform: String,
    },
    /// It says no.
    #[error("{why}")]
    Refused {
        /// HTTP's status.
        status: StatusCode,
        /// Its reason.
        why: Reason,
    },
    /// It says something else than it should.
    #[error("can't understand what the platform at {platform} says")]
    Answer {
        /// Where.
        platform: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The question can't be put into JSON.
    #[error("can't ask that")]
    Question(#[source] serde_json::Error),
}

impl Error {
    fn of_connection(platform: &str, error: tls::Error) -> Self {
        let platform = platform.to_owned();
        match error {
            tls::Error::Unreachable { source, .. } => Self::Connect { platform, source },
            error => Self::Tls { platform, source: Box::new(error) },
        }
    }

    /// What keeps an answer from coming as a whole: the connection, its length, or the time that it takes.
    fn of_body(platform: &str, error: Box<dyn std::error::Error + Send + Sync>) -> Self {
        let platform = platform.to_owned();
        match error.downcast().map(|slow: Box<Slow>| slow.0) {
            Ok(timeout) => Self::Silent { platform, timeout },
            Err(error) => match error.downcast() {
                Ok(source) => Self::Exchange { platform, source: *source },
                Err(source) => Self::Answer { platform, source },
            },
        }
    }

    /// Whether it may be different the next time: the platform has not said no.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Exchange { .. } | Self::Silent { .. } => true,
            Self::Tls { source, .. } => source.may_pass(),
            _ => false,
        }
    }
}

/// Where a platform is asked.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// At its socket on this host.
    Socket(PathBuf),
    /// Over a network.
    Network(tls::Endpoint),
}

impl Endpoint {
    /// The platform of this name at an address: over TLS where there are credentials.
    pub fn of_platform(name: &str, address: SocketAddr, credentials: Option<&Credentials>) -> Self {
        Self::Network(match credentials {
            Some(credentials) => {
                tls::Endpoint::Tls { address, platform: name.to_owned(), credentials: credentials.clone() }
            }
            None => tls::Endpoint::Plain(address),
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Network(endpoint) => endpoint.fmt(f),
        }
    }
}

/// What is sent with a question.
pub enum Content {
    /// Something short.
    Whole(Option<Bytes>),
    /// Something long, made piece by piece while it is sent.
    Pieces(Box<dyn Iterator<Item = io::Result<Bytes>> + Send>),
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Whole(_) => "something short",
            Self::Pieces(_) => "something long",
        })
    }
}

impl Content {
    /// Nothing.
    pub fn none() -> Self {
        Self::Whole(None)
    }

    /// A value as JSON.
    ///
    /// # Errors
    /// [`Error::Question`].
    pub fn json(value: &impl Serialize) -> Result<Self, Error> {
        Ok(Self::Whole(Some(serde_json::to_vec(value).map_err(Error::Question)?.into())))
    }

    fn media_type(&self) -> &'static str {
        match self {
            Self::Whole(_) => "application/json",
            Self::Pieces(_) => "application/octet-stream",
        }
    }
}

/// Content on its way.
struct Sent {
    content: Content,
    taken: Arc<Mutex<Taken>>,
}

/// What was taken of some content.
struct Taken {
    began: Instant,
    bytes: u64,
    /// When some of it was taken last.
    last: Instant,
}

impl Taken {
    fn nothing() -> Self {
        Self { began: Instant::now(), bytes: 0, last: Instant::now() }
    }

    /// Whether more of it is taken often enough, and fast enough on the whole.
    fn goes_on(&self, limit: Duration) -> bool {
        let whole = limit.saturating_add(Duration::from_secs(self.bytes / LEAST_RATE));
        self.last.elapsed() < limit && self.began.elapsed() < whole
    }
}

impl Body for Sent {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let frame = match &mut self.content {
            Content::Whole(bytes) => bytes.take().map(|bytes| Ok(Frame::data(bytes))),
            Content::Pieces(pieces) => pieces.next().map(|piece| piece.map(Frame::data)),
        };
        let mut taken = lock(&self.taken);
        taken.last = Instant::now();
        if let Some(Ok(frame)) = &frame {
            taken.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        drop(taken);
        Poll::Ready(frame)
    }
}

/// A connection by which a platform is asked, one question after another.
pub struct Connection {
    platform: String,
    sender: SendRequest<Sent>,
    runtime: Runtime,
    timeout: Option<Duration>,
    /// Whether anybody still waits for an answer; none where that is certain.
    goes_on: Option<GoesOn>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("platform", &self.platform).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to a platform.
    ///
    /// # Errors
    /// [`Error::Runtime`], [`Error::Connect`], [`Error::Tls`] or [`Error::Exchange`].
    pub fn open(endpoint: &Endpoint) -> Result<Self, Error> {
        Self::open_while(endpoint, None)
    }

    /// The same, for as long as somebody waits for an answer, to this and to what is asked then.
    ///
    /// # Errors
    /// As [`Connection::open`], and [`Error::GivenUp`].
    pub(super) fn open_while(endpoint: &Endpoint, goes_on: Option<GoesOn>) -> Result<Self, Error> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
        let platform = endpoint.to_string();
        let sender = runtime.block_on(wanted(goes_on.as_ref(), &platform, async {
            match endpoint {
                Endpoint::Socket(path) => {
                    let stream = tokio::net::UnixStream::connect(path).await;
                    let refused = |source| Error::Connect { platform: platform.clone(), source };
                    begin(stream.map_err(refused)?, &platform).await
                }
                Endpoint::Network(endpoint) => {
                    let failed = |error| Error::of_connection(&platform, error);
                    begin(tls::connect(endpoint).await.map_err(failed)?, &platform).await
                }
            }
        }))?;
        Ok(Self { platform, sender, runtime, timeout: None, goes_on })
    }

    /// Has the platform begin each answer within this time, and give the whole of it as soon. For one that is
    /// [long](Self::ask_long) it has [`LONG`], and as long as that takes at the least rate. What is long to
    /// send may be long to take in: for that it has [`LONG`] since it has taken the last piece, and for all
    /// of it as long as it takes at the least rate.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self }
    }

    /// As [`Connection::with_timeout`], from here on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = Some(timeout);
    }

    /// Has each answer be waited for no longer than this says, from here on.
    pub(super) fn wanted_while(self, goes_on: Option<GoesOn>) -> Self {
        Self { goes_on, ..self }
    }

    /// Asks, and gives what is answered.
    ///
    /// # Errors
    /// [`Error`], but for those of [`Connection::open`].
    pub fn ask(&mut self, method: Method, path: &str, content: Content) -> Result<Bytes, Error> {
        Ok(self.exchange(method, path, content)?.1)
    }

    /// Asks, and gives what is answered, which may be long: so many bytes at most.
    ///
    /// # Errors
    /// As [`Connection::ask`], and [`Error::Answer`] where there are more of them.
    pub fn ask_long(
        &mut self,
        method: Method,
        path: &str,
        content: Content,
        most: u64,
    ) -> Result<Bytes, Error> {
        let limits = |between| Limits { between, whole: LONG.max(between), rate: Some(LEAST_RATE) };
        let most = usize::try_from(most).unwrap_or(usize::MAX).clamp(MAX_REFUSAL_BYTES, MAX_ANSWER_BYTES);
        Ok(self.exchange_within(self.timeout.map(limits), most, method, path, content)?.1)
    }

    /// Asks, and gives the head of the answer too.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn exchange(
        &mut self,
        method: Method,
        path: &str,
        content: Content,
    ) -> Result<(HeaderMap, Bytes), Error> {
        let limits = |timeout| Limits { between: timeout, whole: timeout, rate: None };
        self.exchange_within(self.timeout.map(limits), MAX_ANSWER_BYTES, method, path, content)
    }

    /// The same, where the answer, once it has begun, may come so slowly, and have so many bytes.
    fn exchange_within(
        &mut self,
        limits: Option<Limits>,
        most_bytes: usize,
        method: Method,
        path: &str,
        content: Content,
    ) -> Result<(HeaderMap, Bytes), Error> {
        let broken = |source| Error::Exchange { platform: self.platform.clone(), source };
        let most = |timeout| if matches!(content, Content::Whole(_)) { timeout } else { LONG.max(timeout) };
        let limit = self.timeout.map(most);
        let taken = Arc::new(Mutex::new(Taken::nothing()));
        let request = Request::builder().method(method).uri(path).header(header::HOST, "platform");
        let media_type = content.media_type();
        let content = Sent { content, taken: Arc::clone(&taken) };
        let request = request.header(header::CONTENT_TYPE, media_type).body(content);
        let request = request.map_err(|source| self.answer_error(source))?;
        let (sender, platform) = (&mut self.sender, &self.platform);
        let (head, answer) = self.runtime.block_on(wanted(self.goes_on.as_ref(), platform, async {
            let mut exchange = pin!(async {
                sender.ready().await.map_err(broken)?;
                sender.send_request(request).await.map_err(broken)
            });
            let response = loop {
                match within(limit, platform, &mut exchange).await {
                    Err(_) if limit.is_some_and(|limit| lock(&taken).goes_on(limit)) => {}
                    response => break response??,
                }
            };
            let (head, body) = response.into_parts();
            let mut body = Limited::new(Steady::new(body, limits), most_bytes);
            let mut answer = Vec::new();
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|source| Error::of_body(platform, source))?;
                answer.extend_from_slice(&frame.into_data().unwrap_or_default());
            }
            Ok((head, Bytes::from(answer)))
        }))?;
        let status = head.status;
        if status.is_success() {
            return Ok((head.headers, answer));
        }
        let failure = serde_json::from_slice(&answer);
        let why = failure.map_or_else(
            |_| Reason::of(format_args!("the platform refuses: {status}")),
            |Failure { error }| error,
        );
        Err(Error::Refused { status, why })
    }

    /// Asks, and gives what is answered as the value that it is.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn ask_for<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        content: Content,
    ) -> Result<T, Error> {
        let answer = self.ask(method, path, content)?;
        serde_json::from_slice(&answer).map_err(|source| self.answer_error(source))
    }

    /// What it has answered makes no sense.
    pub fn answer_error(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Answer { platform: self.platform.clone(), source: source.into() }
    }
}

async fn begin<S>(stream: S, platform: &str) -> Result<SendRequest<Sent>, Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let begun = http1::handshake(TokioIo::new(stream)).await;
    let (sender, connection) =
        begun.map_err(|source| Error::Exchange { platform: platform.to_owned(), source })?;
    // Its own end is told by the answer that does not come.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a platform broke");
        }
    });
    Ok(sender)
}

/// What comes of something, for as long as anybody waits for it.
async fn wanted<T>(
    goes_on: Option<&GoesOn>,
    platform: &str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let Some(goes_on) = goes_on else { return work.await };
    let mut work = pin!(work);
    loop {
        if let Ok(done) = tokio::time::timeout(LOOK_AROUND, &mut work).await {
            return done;
        }
        if !goes_on() {
            return Err(Error::GivenUp { platform: platform.to_owned() });
        }
    }
}

/// What comes of something, where there is no limit for it or it keeps that.
async fn within<T>(
    limit: Option<Duration>,
    platform: &str,
    work: impl Future<Output = T>,
) -> Result<T, Error> {
    let Some(timeout) = limit else { return Ok(work.await) };
    tokio::time::timeout(timeout, work)
        .await
        .map_err(|_| Error::Silent { platform: platform.to_owned(), timeout })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::{UnixListener, UnixStream},
        thread,
    };

    use super::*;

    #[test]
    fn nobody_is_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut connection =
            Connection::open(&Endpoint::Socket(path)).unwrap().with_timeout(Duration::from_millis(20));
        let asked = connection.ask(Method::GET, "/", Content::none());
        assert!(matches!(asked, Err(error @ Error::Silent { .. }) if error.may_pass()));
    }

    /// Result of a question to a platform that reads it, and then does this with the connection.
    fn asked_of_one_who(
        answers: impl FnOnce(UnixStream) + Send + 'static,
        ask: impl FnOnce(Connection) -> Result<Bytes, Error>,
    ) -> Result<Bytes, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            answers(stream);
        });
        let asked = ask(Connection::open(&Endpoint::Socket(path)).unwrap());
        server.join().unwrap();
        asked
    }

    /// Answers with a byte each 10 ms, without an end.
    fn drips(mut stream: UnixStream) {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n").unwrap();
        while stream.write_all(b" ").is_ok() {
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn an_answer_that_drips_has_an_end() {
        let timeout = Duration::from_millis(500);
        let asked = asked_of_one_who(drips, |connection| {
            connection.with_timeout(timeout).ask(Method::GET, "/", Content::none())
        });
        assert!(matches!(asked, Err(ref error @ Error::Silent { .. }) if error.may_pass()), "{asked:?}");
    }

    #[test]
    fn nobody_is_waited_for_who_is_not_needed_any_more() {
        let given_up_at = Instant::now() + Duration::from_millis(200);
        let asked = asked_of_one_who(drips, |connection| {
            let connection = connection.with_timeout(LONG);
            let mut connection =
                connection.wanted_while(Some(Arc::new(move || Instant::now() < given_up_at)));
            connection.ask_long(Method::GET, "/", Content::none(), u64::MAX)
        });
        assert!(matches!(asked, Err(Error::GivenUp { .. })), "{asked:?}");
    }

    #[test]
    fn an_answer_is_no_longer_than_what_was_asked_for_can_be() {
        const BYTES: usize = 100_000;
        let ask = |most: u64| {
            let answers = |mut stream: UnixStream| {
                stream
                    .write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {BYTES}\r\n\r\n").as_bytes())
                    .unwrap();
                // Who has read enough closes the connection.
                drop(stream.write_all(&[b' '; BYTES]));
            };
            asked_of_one_who(answers, |mut connection| {
                connection.ask_long(Method::GET, "/", Content::none(), most)
            })
        };
        assert_eq!(ask(BYTES as u64).unwrap().len(), BYTES);
        let asked = ask(BYTES as u64 - 1);
        assert!(matches!(asked, Err(ref error @ Error::Answer { .. }) if !error.may_pass()), "{asked:?}");
    }

    #[test]
    fn what_is_taken_too_slowly_has_an_end() {
        let now = Instant::now();
        let ago = |seconds| now.checked_sub(Duration::from_secs(seconds)).unwrap();
        let taken = |began, bytes, last| Taken { began: ago(began), bytes, last: ago(last) };
        assert!(taken(100, 0, 100).goes_on(LONG) && !taken(121, 0, 121).goes_on(LONG));
        // A byte a minute, and the least that may be.
        assert!(!taken(3600, 60, 0).goes_on(LONG) && taken(3600, 3600 * LEAST_RATE, 0).goes_on(LONG));
    }

    #[test]
    fn an_answer_that_breaks_off_may_come_the_next_time() {
        let breaks_off = |mut stream: UnixStream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{").unwrap();
        };
        let asked =
            asked_of_one_who(breaks_off, |mut connection| connection.ask(Method::GET, "/", Content::none()));
        assert!(matches!(asked, Err(error @ Error::Exchange { .. }) if error.may_pass()));
    }
}
