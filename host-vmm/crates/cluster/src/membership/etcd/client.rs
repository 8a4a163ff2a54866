//! The calls to one server of an etcd.

use std::{
    fs, io,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use axum::http::uri::PathAndQuery;
use prost::Message;
use tokio::time::timeout;
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_prost::ProstCodec;

use super::{
    Error,
    messages::{
        self, AuthenticateRequest, AuthenticateResponse, Compare, KeyValue, LeaseGrantRequest,
        LeaseGrantResponse, LeaseKeepAliveResponse, LeaseRequest, LeaseRevokeResponse, PutRequest,
        RangeRequest, RangeResponse, RequestOp, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest,
        WatchResponse,
    },
};
use crate::settings::{Etcd, EtcdTls, Login};

/// How long etcd may take for an answer, at most.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// And which part of the lease time: there is to be time for another server.
const ANSWERS: u32 = 3;

/// Keys of one answer. etcd takes values of up to 1.5 MiB, so that it is no longer than [`MAX_ANSWER_BYTES`]
/// whatever is in there.
const PAGE_KEYS: i64 = 16;

/// Longest answer in bytes.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// Password of a user.
#[derive(Clone)]
struct Credentials {
    user: String,
    password: String,
}

/// A server, and how to get in.
pub(super) struct Server {
    address: SocketAddr,
    endpoint: Endpoint,
    credentials: Option<Credentials>,
    answer_time: Duration,
}

/// The servers of an etcd, for leases of some time. Reads the files that are named.
pub(super) fn servers(etcd: &Etcd, lease: Duration) -> Result<Vec<Server>, Error> {
    let answer_time = ANSWER_TIME.min(lease / ANSWERS);
    let tls = etcd.tls.as_ref().map(tls_config).transpose()?;
    let login = etcd.tls.as_ref().and_then(|tls| tls.login.as_ref());
    let credentials = login.map(credentials).transpose()?;
    let server = |address: &SocketAddr| {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}")).map_err(Error::Tls)?;
        let endpoint = match tls.clone() {
            Some(tls) => endpoint.tls_config(tls).map_err(Error::Tls)?,
            None => endpoint,
        };
        Ok(Server { address: *address, endpoint, credentials: credentials.clone(), answer_time })
    };
    etcd.servers.iter().map(server).collect()
}

fn credentials(login: &Login) -> Result<Credentials, Error> {
    let password = read(&login.password_file)?;
    let password = String::from_utf8(password).map_err(|_| Error::Password(login.password_file.clone()))?;
    let password = password.strip_suffix('\n').unwrap_or(&password).to_owned();
    Ok(Credentials { user: login.user.clone(), password })
}

fn tls_config(tls: &EtcdTls) -> Result<ClientTlsConfig, Error> {
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&tls.ca)?));
    Ok(match &tls.identity {
        Some((cert, key)) => config.identity(Identity::from_pem(read(cert)?, read(key)?)),
        None => config,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source: io::Error| Error::File { path: path.to_owned(), source })
}

/// A connection.
#[derive(Debug, Clone)]
pub(super) struct Client {
    address: SocketAddr,
    channel: Channel,
    token: Option<MetadataValue<Ascii>>,
    answer_time: Duration,
}

/// What became of a conditional write.
#[derive(Debug)]
pub(super) enum Put {
    /// It is written, with this revision.
    Done(i64),
    /// The condition does not hold; the key's present value, if there is one.
    Not(Option<KeyValue>),
}

impl Client {
    /// Connects, and logs in where that is asked for.
    pub(super) async fn connect(server: &Server) -> Result<Self, Error> {
        let Server { address, endpoint, credentials, answer_time } = server;
        let channel = timeout(*answer_time, endpoint.connect()).await;
        let channel = channel.map_err(|_| Error::Silent { address: *address, call: "Connect" })?;
        let channel = channel.map_err(|source| Error::Connect { address: *address, source })?;
        let client = Self { address: *address, channel, token: None, answer_time: *answer_time };
        let Some(Credentials { user, password }) = credentials else { return Ok(client) };
        let question = AuthenticateRequest { name: user.clone(), password: password.clone() };
        let answer = client.call::<_, AuthenticateResponse>(messages::AUTHENTICATE, question).await;
        let answer = answer.map_err(|error| error.into_login(user))?;
        let token: Result<MetadataValue<Ascii>, _> = answer.token.parse();
        let mut token = token.map_err(|source| Error::Token { user: user.clone(), source })?;
        token.set_sensitive(true);
        Ok(Self { token: Some(token), ..client })
    }

    /// Makes a lease of so many seconds, and gives back its ID.
    pub(super) async fn grant(&self, seconds: i64) -> Result<i64, Error> {
        let answer: LeaseGrantResponse =
            self.call(messages::LEASE_GRANT, LeaseGrantRequest { ttl: seconds }).await?;
        Ok(answer.id)
    }

    /// Keeps a lease alive, and says when it was last certain that it began anew; `None` where it is gone.
    pub(super) async fn keep_alive(&self, lease: i64) -> Result<Option<Instant>, Error> {
        // The lease may begin anew at any time from here on.
        let asked = Instant::now();
        let answer = self.within(messages::LEASE_KEEP_ALIVE, async {
            let answers = self
                .open::<_, LeaseKeepAliveResponse>(messages::LEASE_KEEP_ALIVE, LeaseRequest { id: lease });
            answers.await?.message().await
        });
        Ok(answer.await?.filter(|answer| answer.ttl > 0).map(|_| asked))
    }

    /// Ends a lease: its keys are removed.
    pub(super) async fn revoke(&self, lease: i64) -> Result<(), Error> {
        self.call::<_, LeaseRevokeResponse>(messages::LEASE_REVOKE, LeaseRequest { id: lease })
            .await
            .map(drop)
    }

    /// The present value of a key, if there is one.
    pub(super) async fn get(&self, key: Vec<u8>) -> Result<Option<KeyValue>, Error> {
        let question = RangeRequest { key, ..RangeRequest::default() };
        let answer: RangeResponse = self.call(messages::RANGE, question).await?;
        Ok(answer.kvs.into_iter().next())
    }

    /// Writes something if a condition holds.
    pub(super) async fn put_if(&self, condition: Compare, put: PutRequest) -> Result<Put, Error> {
        let present = RangeRequest { key: put.key.clone(), ..RangeRequest::default() };
        let question = TxnRequest {
            compare: vec![condition],
            success: vec![RequestOp { put: Some(put), range: None }],
            failure: vec![RequestOp { range: Some(present), put: None }],
        };
        let answer: TxnResponse = self.call(messages::TXN, question).await?;
        if answer.succeeded {
            return Ok(Put::Done(answer.header.unwrap_or_default().revision));
        }
        let found =
            answer.responses.into_iter().filter_map(|response| response.range).flat_map(|range| range.kvs);
        Ok(Put::Not(found.into_iter().next()))
    }

    /// Goes through the keys that begin with `prefix`, at most so many, and gives back the revision at which
    /// they were so.
    pub(super) async fn list(
        &self,
        prefix: &str,
        most: usize,
        mut each: impl FnMut(KeyValue),
    ) -> Result<i64, Error> {
        let (mut key, mut revision, mut found) = (prefix.as_bytes().to_vec(), 0, 0);
        loop {
            let question = RangeRequest { key, range_end: end_of(prefix), limit: PAGE_KEYS, revision };
            let answer: RangeResponse = self.call(messages::RANGE, question).await?;
            // All pages are of the revision of the first one.
            if revision == 0 {
                revision = answer.header.unwrap_or_default().revision;
            }
            let last = answer.kvs.last().map(|kv| kv.key.clone());
            found += answer.kvs.len();
            answer.kvs.into_iter().for_each(&mut each);
            match last {
                Some(last) if answer.more && found < most => key = [last.as_slice(), &[0]].concat(),
                _ => return Ok(revision),
            }
        }
    }

    /// Watches the keys that begin with `prefix`, from a revision on.
    pub(super) async fn watch(&self, prefix: &str, revision: i64) -> Result<Streaming<WatchResponse>, Error> {
        let create = WatchCreateRequest {
            key: prefix.as_bytes().to_vec(),
            range_end: end_of(prefix),
            start_revision: revision,
            fragment: true,
        };
        let question = WatchRequest { create: Some(create) };
        self.within(messages::WATCH, self.open(messages::WATCH, question)).await
    }

    /// An error of a call that was answered later.
    pub(super) fn refused(&self, call: &'static str, status: Status) -> Error {
        Error::Refused { address: self.address, call, source: Box::new(status) }
    }

    /// Asks for one answer.
    pub(super) async fn call<Q, A>(&self, path: &'static str, question: Q) -> Result<A, Error>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        self.within(path, async {
            let mut grpc = self.grpc().await?;
            let question = self.request(question);
            let answer = grpc.unary(question, PathAndQuery::from_static(path), ProstCodec::default()).await?;
            Ok(answer.into_inner())
        })
        .await
    }

    /// Asks for any number of answers.
    async fn open<Q, A>(&self, path: &'static str, question: Q) -> Result<Streaming<A>, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.grpc().await?;
        let question = self.request(question);
        let answers =
            grpc.server_streaming(question, PathAndQuery::from_static(path), ProstCodec::default()).await?;
        Ok(answers.into_inner())
    }

    async fn grpc(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
        grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))?;
        Ok(grpc)
    }

    fn request<Q>(&self, question: Q) -> Request<Q> {
        let mut request = Request::new(question);
        // A server that has lost the others says so, instead of waiting for them. For a watch, that is the
        // only way to learn it.
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }

    async fn within<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Error> {
        let answer = timeout(self.answer_time, answer).await;
        let answer = answer.map_err(|_| Error::Silent { address: self.address, call })?;
        answer.map_err(|status| self.refused(call, status))
    }
}

/// The first key behind those that begin with `prefix`, which does not end with the largest byte.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last = last.saturating_add(1);
    }
    end
}

impl Error {
    /// Whether etcd takes no writes since it has come to its quota (NOSPACE). It goes on to answer all else,
    /// and to keep leases.
    pub(super) fn is_full(&self) -> bool {
        matches!(self, Self::Refused { source, .. } if source.code() == Code::ResourceExhausted)
    }

    /// The error of an attempt to log in: where etcd has said no, it will say so again.
    fn into_login(self, user: &str) -> Self {
        match self {
            Self::Refused { source, .. }
                if matches!(source.code(), Code::InvalidArgument | Code::FailedPrecondition) =>
            {
                Self::Login { user: user.to_owned(), source }
            }
            other => other,
        }
    }
}
