//! Pooled client of a platform that is asked again and again: connections to it stay open between questions,
//! since it takes longer to make one than to ask.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use base::sync::lock;

use super::{Connection, Endpoint, Error, GoesOn};

/// How long a connection stays open that nobody uses.
const IDLE: Duration = Duration::from_secs(60);

/// Pool of connections that nobody uses, one for each platform.
#[derive(Debug, Clone, Default)]
pub struct Connections(Arc<Mutex<BTreeMap<String, Idle>>>);

#[derive(Debug)]
struct Idle {
    since: Instant,
    connection: Connection,
}

/// Client of one platform, which takes its connections from the pool.
#[derive(Debug, Clone)]
pub struct PooledClient {
    endpoint: Endpoint,
    timeout: Duration,
    connections: Connections,
}

impl Connections {
    /// Client of the platform at this endpoint, which has so much time for each answer.
    pub fn client(&self, endpoint: Endpoint, timeout: Duration) -> PooledClient {
        PooledClient { endpoint, timeout, connections: self.clone() }
    }

    fn take(&self, platform: &str) -> Option<Connection> {
        Some(lock(&self.0).remove(platform)?.connection)
    }

    fn keep(&self, platform: String, connection: Connection) {
        let since = Instant::now();
        let mut all = lock(&self.0);
        all.retain(|_, idle| since.duration_since(idle.since) < IDLE);
        all.insert(platform, Idle { since, connection });
    }
}

impl PooledClient {
    /// Makes idempotent requests, twice where need be: a connection that was open may turn out to be closed.
    ///
    /// # Errors
    /// As `ask`, and [`Error`] where there is no connection.
    pub fn ask<T>(&self, ask: impl FnMut(&mut Connection) -> Result<T, Error>) -> Result<T, Error> {
        self.ask_where(None, ask)
    }

    /// The same, for as long as somebody waits for the answer.
    ///
    /// # Errors
    /// As [`PooledClient::ask`], and [`Error::GivenUp`].
    pub fn ask_while<T>(
        &self,
        goes_on: &GoesOn,
        ask: impl FnMut(&mut Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.ask_where(Some(goes_on), ask)
    }

    fn ask_where<T>(
        &self,
        goes_on: Option<&GoesOn>,
        mut ask: impl FnMut(&mut Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let platform = self.endpoint.to_string();
        if let Some(connection) = self.connections.take(&platform) {
            let mut connection = connection.with_timeout(self.timeout).wanted_while(goes_on.cloned());
            match ask(&mut connection) {
                Err(Error::Exchange { .. }) => {}
                answer => return self.answered(platform, connection, answer),
            }
        }
        let connection = Connection::open_while(&self.endpoint, goes_on.cloned())?;
        let mut connection = connection.with_timeout(self.timeout);
        let answer = ask(&mut connection);
        self.answered(platform, connection, answer)
    }

    /// Makes requests that must not be made twice, and may take as long as `timeout`.
    ///
    /// # Errors
    /// As `ask`, and [`Error`] where there is no connection.
    pub fn ask_once<T>(
        &self,
        timeout: Duration,
        ask: impl FnOnce(&mut Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        ask(&mut Connection::open(&self.endpoint)?.with_timeout(timeout))
    }

    fn answered<T>(
        &self,
        platform: String,
        connection: Connection,
        answer: Result<T, Error>,
    ) -> Result<T, Error> {
        // One that has broken, or whose answer may still come, is of no use.
        let is_over = |error: &Error| error.may_pass() || matches!(error, Error::GivenUp { .. });
        if !answer.as_ref().is_err_and(is_over) {
            self.connections.keep(platform, connection.wanted_while(None));
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader, Write},
        os::unix::net::UnixListener,
        thread,
    };

    use hyper::Method;

    use super::*;
    use crate::client::Content;

    /// Answers so many questions on each of some connections, one after another, and then closes it.
    fn answer(listener: &UnixListener, questions: &[usize]) {
        for &count in questions {
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(&stream).lines();
            for _ in 0..count {
                while !lines.next().unwrap().unwrap().is_empty() {}
                (&stream).write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").unwrap();
            }
        }
    }

    #[test]
    fn a_connection_is_used_again_until_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || answer(&listener, &[3, 2]));
        let client = Connections::default().client(Endpoint::Socket(path), Duration::from_secs(10));
        for _ in 0..5 {
            let answer = client.ask(|connection| connection.ask(Method::GET, "/", Content::none())).unwrap();
            assert_eq!(answer, "{}");
        }
        server.join().unwrap();
        assert!(client.ask(|connection| connection.ask(Method::GET, "/", Content::none())).is_err());
        assert!(lock(&client.connections.0).is_empty());
    }
}
