//! Membership of a cluster that is kept by an etcd.
//!
//! ```text
//! /host-vmm/v1/CLUSTER/platforms/NAME    what the platform says of itself, as JSON, and which instance it is; under its lease
//! ```
//!
//! A platform writes its entry only where there is none, or its own. So two platforms can't have one name;
//! and one whose entry is gone, or another's, learns it when it writes the next time, or earlier by its
//! watch. A [session] with a server goes on until something is wrong; then there is another one, with the
//! next server.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use base::{sync::lock, text::Reason};
use serde::{Deserialize, Serialize};
use tokio::{runtime, sync::oneshot};
use tonic::{Status, metadata::errors::InvalidMetadataValue, transport};
use types::new_id;
use uuid::Uuid;

use super::{SelfReport, Shared, check};
use crate::{member::Member, settings};

mod client;
mod messages;
mod session;

/// How long the end of a membership may take: etcd writes to its disk for that, which may be busy.
const LAST_CALLS: Duration = Duration::from_secs(3);

/// Why a platform is not a member.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read.
    #[error("can't read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A password is no text.
    #[error("the password in {0} is not in UTF-8")]
    Password(PathBuf),
    /// The certificates are not in order.
    #[error("the certificates or the key for etcd can't be used")]
    Tls(#[source] transport::Error),
    /// No connection.
    #[error("can't connect to etcd at {address}")]
    Connect {
        /// The server.
        address: SocketAddr,
        /// Why.
        source: transport::Error,
    },
    /// The user is not known, or the password is wrong, or there are no users.
    #[error("etcd does not let the user {user} in")]
    Login {
        /// The user.
        user: String,
        /// Its reason.
        source: Box<Status>,
    },
    /// What etcd has given for the password can't be given back.
    #[error("etcd has answered the user {user} something that is not understood")]
    Token {
        /// The user.
        user: String,
        /// Why.
        source: InvalidMetadataValue,
    },
    /// etcd says no.
    #[error("etcd at {address} refuses {call}")]
    Refused {
        /// The server.
        address: SocketAddr,
        /// What was asked for.
        call: &'static str,
        /// Its reason.
        source: Box<Status>,
    },
    /// etcd says nothing.
    #[error("etcd at {address} does not answer {call}")]
    Silent {
        /// The server.
        address: SocketAddr,
        /// What was asked for.
        call: &'static str,
    },
    /// There is such a platform.
    #[error("another platform of the cluster has the name {name}{}: give each a name of its own", at(.holder))]
    NameTaken {
        /// The name.
        name: String,
        /// Where the other one is, if its entry says so.
        holder: Option<SocketAddr>,
        /// When its entry was written: etcd's count of all changes.
        revision: i64,
    },
    /// The entry is gone, or another one.
    #[error("the platform's entry in etcd was removed or replaced")]
    EntryLost,
    /// The lease ended before it was renewed.
    #[error("the platform's lease in etcd has ended")]
    LeaseLost,
    /// Changes are not told any more.
    #[error("etcd ends the watch of other platforms: {0:?}")]
    WatchEnded(Reason),
    /// What the platform says of itself would not be taken.
    #[error("other platforms would not take what this one says of itself")]
    Own(#[source] check::Error),
    /// It can't be written down.
    #[error("can't write down what this platform says of itself")]
    Json(#[source] serde_json::Error),
    /// The system has no room for a thread, or no random bytes.
    #[error("can't start a thread for etcd")]
    Thread(#[source] io::Error),
}

fn at(holder: &Option<SocketAddr>) -> String {
    holder.map_or_else(String::new, |address| format!(" (it is at {address})"))
}

/// The value of a key.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// Which one of the processes that may have had this name.
    instance: Uuid,
    /// What it says of itself.
    #[serde(flatten)]
    member: Member,
}

/// A membership. Dropping it ends it.
#[derive(Debug)]
#[must_use]
pub(super) struct Handle {
    /// Dropped to make an end.
    stop: Option<oneshot::Sender<()>>,
    /// Disconnected when there is an end.
    ended: Mutex<mpsc::Receiver<()>>,
}

/// Joins the cluster of `member`, on a thread of its own, and waits until that is done, or no server can be
/// reached, or there is an error that will not go away.
pub(super) fn start(
    etcd: &settings::Etcd,
    own: Arc<SelfReport>,
    member: &Member,
    lease: Duration,
    shared: Arc<Shared>,
) -> Result<Handle, Error> {
    let ((stop, stopped), (end, ended)) = (oneshot::channel::<()>(), mpsc::channel());
    let (answer, answered) = mpsc::channel();
    let registrar = session::Registrar::new(session::Settings {
        servers: client::servers(etcd, lease)?,
        own,
        instance: new_id().map_err(Error::Thread)?,
        name: member.name.clone(),
        cluster: member.cluster.clone(),
        lease,
        shared,
        answer,
    });
    let runtime = runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
    let work = move || {
        let _end: mpsc::Sender<()> = end;
        runtime.block_on(registrar.run(stopped));
    };
    thread::Builder::new().name("membership".into()).spawn(work).map_err(Error::Thread)?;
    let handle = Handle { stop: Some(stop), ended: Mutex::new(ended) };
    let died = |_| Err(Error::Thread(io::Error::other("it has died")));
    answered.recv().unwrap_or_else(died)?;
    Ok(handle)
}

impl Drop for Handle {
    fn drop(&mut self) {
        drop(self.stop.take());
        if lock(&self.ended).recv_timeout(2 * LAST_CALLS) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::warn!("the membership of the cluster does not come to its end");
        }
    }
}

#[cfg(test)]
#[path = "etcd_test.rs"]
mod tests;
