//! Platforms that are listed: each is asked by a thread of its own, so that one that does not answer hides no
//! other.

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use base::{error::chain, text::Name, threads};

use super::{Ask, Error, Shared, check};
use crate::{member::Member, settings::Peer};

/// How long after an answer the next question is asked.
const INTERVAL: Duration = Duration::from_secs(1);

/// Asks until it is dropped. A thread whose question is under way then ends when that is answered.
#[derive(Debug)]
#[must_use]
pub(super) struct Handle {
    _ends: Vec<mpsc::Sender<()>>,
}

/// Starts to ask.
pub(super) fn start(peers: Vec<Peer>, ask: &Arc<Ask>, shared: &Arc<Shared>) -> Result<Handle, Error> {
    let start = |peer: Peer| -> Result<_, Error> {
        let (end, ended) = mpsc::channel();
        let (name, ask, shared) = (peer.name.clone(), Arc::clone(ask), Arc::clone(shared));
        let thread = threads::background("peer", move || question(&peer, &*ask, &shared, &ended));
        thread.map_err(|source| Error::Thread { peer: name, source })?;
        Ok(end)
    };
    Ok(Handle { _ends: peers.into_iter().map(start).collect::<Result<_, _>>()? })
}

fn question(peer: &Peer, ask: &Ask, shared: &Shared, ended: &mpsc::Receiver<()>) {
    // What was wrong the last time; at first nothing is known.
    let mut last = None;
    loop {
        let answer = ask(peer).map_err(|error| chain(&*error));
        let answer = answer.and_then(|member| accept(peer, member).map_err(|error| chain(&error)));
        let wrong = answer.map(|member| shared.change(|known| known.answer(member, Instant::now()))).err();
        if last.as_ref() != Some(&wrong) {
            report(peer, wrong.as_deref());
            last = Some(wrong);
        }
        if ended.recv_timeout(INTERVAL) != Err(mpsc::RecvTimeoutError::Timeout) {
            return;
        }
    }
}

fn report(peer: &Peer, wrong: Option<&str>) {
    let Peer { name, cluster, address } = peer;
    match wrong {
        None => tracing::info!(name, cluster, %address, "a platform answers"),
        Some(why) => {
            tracing::warn!(name, cluster, %address, why, "a platform does not answer, or not as it should")
        }
    }
}

/// Takes what a platform says of itself, if it is the one that was asked. It is reached where the list has
/// it, whatever it says itself.
fn accept(peer: &Peer, mut member: Member) -> Result<Member, check::Error> {
    member.address = peer.address;
    check::check(&member)?;
    if (&member.name, &member.cluster) == (&peer.name, &peer.cluster) {
        return Ok(member);
    }
    Err(check::Error::Stranger { found: Name::of(format_args!("{} of {}", member.name, member.cluster)) })
}

#[cfg(test)]
#[path = "peers_test.rs"]
mod tests;
