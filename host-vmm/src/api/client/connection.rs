//! A connection to a platform.

use std::{
    fmt, io,
    path::PathBuf,
    pin::{Pin, pin},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::{Duration, Instant},
};

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

use super::super::Failure;
use crate::{cluster::tls, sync::lock};

/// Longest answer in bytes.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// How long a platform has to take in what is long to send, and to take one more piece of it.
const LONG: Duration = Duration::from_secs(120);

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
    #[error("the platform at {platform} has not answered within {patience:?}")]
    Silent {
        /// Where.
        platform: String,
        /// How long it had for that.
        patience: Duration,
    },
    /// It says no.
    #[error("{why}")]
    Refused {
        /// HTTP's status.
        status: StatusCode,
        /// Its reason.
        why: String,
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

    /// What keeps an answer from coming as a whole: the connection, or its length.
    fn of_body(platform: &str, error: Box<dyn std::error::Error + Send + Sync>) -> Self {
        let platform = platform.to_owned();
        match error.downcast() {
            Ok(source) => Self::Exchange { platform, source: *source },
            Err(source) => Self::Answer { platform, source },
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
    /// When some of it was taken last.
    taken: Arc<Mutex<Instant>>,
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
        *lock(&self.taken) = Instant::now();
        Poll::Ready(frame)
    }
}

/// A connection by which a platform is asked, one question after another.
pub struct Connection {
    platform: String,
    sender: SendRequest<Sent>,
    runtime: Runtime,
    patience: Option<Duration>,
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
        let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
        let platform = endpoint.to_string();
        let sender = runtime.block_on(async {
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
        })?;
        Ok(Self { platform, sender, runtime, patience: None })
    }

    /// Has the platform begin each answer within this time, and go on with it as soon. What is long to send may be long to take in: for that it
    /// has [`LONG`] since it has taken the last piece.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience: Some(patience), ..self }
    }

    /// As [`Connection::with_patience`], from here on.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = Some(patience);
    }

    /// Asks, and gives what is answered.
    ///
    /// # Errors
    /// [`Error`], but for those of [`Connection::open`].
    pub fn ask(&mut self, method: Method, path: &str, content: Content) -> Result<Bytes, Error> {
        Ok(self.exchange(method, path, content)?.1)
    }

    /// Asks, and gives the head of the answer too.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn exchange(&mut self, method: Method, path: &str, content: Content) -> Result<(HeaderMap, Bytes), Error> {
        let broken = |source| Error::Exchange { platform: self.platform.clone(), source };
        let most = |patience| if matches!(content, Content::Whole(_)) { patience } else { LONG.max(patience) };
        let limit = self.patience.map(most);
        let taken = Arc::new(Mutex::new(Instant::now()));
        let request = Request::builder().method(method).uri(path).header(header::HOST, "platform");
        let media_type = content.media_type();
        let content = Sent { content, taken: Arc::clone(&taken) };
        let request = request.header(header::CONTENT_TYPE, media_type).body(content);
        let request = request.map_err(|source| self.answer_error(source))?;
        let (sender, platform) = (&mut self.sender, &self.platform);
        let between = self.patience;
        let (head, answer) = self.runtime.block_on(async {
            let mut exchange = pin!(async {
                sender.ready().await.map_err(broken)?;
                sender.send_request(request).await.map_err(broken)
            });
            let response = loop {
                match within(limit, platform, &mut exchange).await {
                    Err(_) if limit.is_some_and(|limit| lock(&taken).elapsed() < limit) => {}
                    response => break response??,
                }
            };
            let (head, body) = response.into_parts();
            let mut body = Limited::new(body, MAX_ANSWER_BYTES);
            let mut answer = Vec::new();
            while let Some(frame) = within(between, platform, body.frame()).await? {
                let frame = frame.map_err(|source| Error::of_body(platform, source))?;
                answer.extend_from_slice(&frame.into_data().unwrap_or_default());
            }
            Ok((head, Bytes::from(answer)))
        })?;
        let status = head.status;
        if status.is_success() {
            return Ok((head.headers, answer));
        }
        let failure = serde_json::from_slice(&answer);
        let why = failure.map_or_else(|_| format!("the platform refuses: {status}"), |Failure { error }| error);
        Err(Error::Refused { status, why })
    }

    /// Asks, and gives what is answered as the value that it is.
    ///
    /// # Errors
    /// As [`Connection::ask`].
    pub fn ask_for<T: DeserializeOwned>(&mut self, method: Method, path: &str, content: Content) -> Result<T, Error> {
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
    let (sender, connection) = begun.map_err(|source| Error::Exchange { platform: platform.to_owned(), source })?;
    // Its own end is told by the answer that does not come.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a platform broke");
        }
    });
    Ok(sender)
}

/// What comes of something, where there is no limit for it or it keeps that.
async fn within<T>(limit: Option<Duration>, platform: &str, work: impl Future<Output = T>) -> Result<T, Error> {
    let Some(patience) = limit else { return Ok(work.await) };
    tokio::time::timeout(patience, work).await.map_err(|_| Error::Silent { platform: platform.to_owned(), patience })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixListener,
        thread,
    };

    use super::*;

    #[test]
    fn nobody_is_waited_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut connection =
            Connection::open(&Endpoint::Socket(path)).unwrap().with_patience(Duration::from_millis(20));
        let asked = connection.ask(Method::GET, "/", Content::none());
        assert!(matches!(asked, Err(error @ Error::Silent { .. }) if error.may_pass()));
    }

    #[test]
    fn an_answer_that_breaks_off_may_come_the_next_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            assert!(stream.read(&mut [0; 1024]).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{").unwrap();
        });
        let mut connection = Connection::open(&Endpoint::Socket(path)).unwrap();
        let asked = connection.ask(Method::GET, "/", Content::none());
        assert!(matches!(asked, Err(error @ Error::Exchange { .. }) if error.may_pass()));
        server.join().unwrap();
    }
}
