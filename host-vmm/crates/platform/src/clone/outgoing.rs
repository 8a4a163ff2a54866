//! Clones that are sent to other platforms, and those of kept images, which an operator sends.

use std::sync::{Arc, Mutex};

use api::{Copied, Transfer};
use base::sync::lock;
use capsule::ImageMetadata;
use cluster::{
    member::{Load, MAX_SHAPES, Ready},
    membership::check,
    placement::{Explanation, Wish},
};
use types::{VmIdentity, VmShape, new_id};
use uuid::Uuid;

use crate::{
    Error, Platform,
    clone::{
        Order,
        page_server::PageServer,
        source::{self, CurrentRetryPolicy, Progress, RetryPolicy},
    },
    launcher::{ordered, slots},
};

/// Clones that are being sent.
#[derive(Debug, Default)]
pub(crate) struct Transfers(Mutex<Vec<Entry>>);

#[derive(Debug)]
struct Entry {
    id: Uuid,
    image: Uuid,
    original: Uuid,
    original_name: String,
    to: String,
    progress: Arc<Progress>,
}

/// One of them. Dropping it takes it off the list.
pub(crate) struct Listed<'t> {
    transfers: &'t Transfers,
    id: Uuid,
    /// What is told of it.
    pub(crate) progress: Arc<Progress>,
}

impl Transfers {
    /// Enters the clone with this ID, of copies of an image.
    pub(crate) fn list(&self, id: Uuid, metadata: &ImageMetadata, to: &str) -> Listed<'_> {
        let progress = Arc::default();
        let VmIdentity { id: original, name: original_name, .. } = metadata.original.clone();
        let entry = Entry { id, image: metadata.id, original, original_name, to: to.to_owned(), progress };
        let listed = Listed { transfers: self, id, progress: Arc::clone(&entry.progress) };
        lock(&self.0).push(entry);
        listed
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        lock(&self.transfers.0).retain(|entry| entry.id != self.id);
    }
}

/// A platform's name, without its cluster's.
pub(crate) fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

impl Platform {
    /// Has copies of a kept image launched on another platform: once all of their memory is there, or,
    /// `lazy`, before that.
    ///
    /// # Errors
    /// [`Error`]: there is none of them then; but for [`source::Error::Unknown`], in which case nobody can
    /// tell.
    pub fn clone_image(&self, image: &str, to: &str, count: u32, lazy: bool) -> Result<Vec<Copied>, Error> {
        let image = self.sealed_image(image)?;
        let cluster = self.cluster.get().ok_or(Error::Alone)?;
        let client = cluster.find(to).map_err(Error::Cluster)?;
        let (id, (capsule, history)) = (new_id().map_err(Error::Id)?, image.parts());
        let listed = self.transfers.list(id, &capsule.metadata, to);
        let order = Order { source: self.name().to_owned(), slots: slots(count)?, total: count, lazy };
        let failed = |error| Error::Send { platform: to.to_owned(), source: Box::new(error) };
        let retry_policy: CurrentRetryPolicy = Arc::new(|| RetryPolicy::Retry);
        let prepared = if lazy {
            let page_server = Arc::new(
                PageServer::of(capsule, short(to), cluster.sending.bandwidth).map_err(Error::Capsule)?,
            );
            self.page_servers.add(id, &page_server);
            source::send_lazily(
                client,
                id,
                &order,
                &page_server,
                history.of_next_fork().as_ref(),
                retry_policy,
            )
        } else {
            let chunk_source = image.chunk_source(&self.digests).map_err(Error::Capsule)?;
            source::send(client, id, &order, &chunk_source, &cluster.sending, &listed.progress, retry_policy)
        };
        let all = |named| match ordered(&order.slots, named) {
            vms if vms.len() == order.slots.len() => Ok(vms),
            // Of those that it does not name, the target has said nothing.
            _ => Err(source::Error::Unknown(None)),
        };
        let sent = prepared.and_then(source::Prepared::commit).and_then(all);
        // Copies of which nobody can tell whether they run may need their memory.
        let are_gone = |error: &source::Error| !matches!(error, source::Error::Unknown(_));
        let sent = sent.inspect_err(|error| {
            if are_gone(error) {
                self.page_servers.remove(id)
            }
        });
        sent.map_err(failed)
    }

    /// Clones that are being sent.
    pub fn transfers(&self) -> Vec<Transfer> {
        let entries = lock(&self.transfers.0);
        let transfer = |entry: &Entry| {
            let [wanted_bytes, sent_bytes, spared_bytes] = entry.progress.bytes();
            Transfer {
                id: entry.id,
                image: entry.image,
                original: entry.original,
                original_name: entry.original_name.clone(),
                to: entry.to.clone(),
                wanted_bytes,
                sent_bytes,
                spared_bytes,
            }
        };
        entries.iter().map(transfer).collect()
    }

    /// Tells where copies would go, and why.
    ///
    /// # Errors
    /// [`Error::Alone`].
    pub fn explain(&self, wish: &Wish) -> Result<Explanation, Error> {
        Ok(self.cluster.get().ok_or(Error::Alone)?.explain(wish))
    }

    /// What this platform has to do, and what it has left, beside what its host tells.
    pub fn fill_in(&self, load: Load) -> Load {
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (vms, is_stopping) = self.registry.count();
        // Others believe nobody who names impossible shapes, or too many; and clones bring their own.
        let is_told = |(config, shells): &(VmShape, usize)| *shells > 0 && check::is_shape(*config);
        let ready = self.pool.ready_counts().into_iter().filter(is_told).take(MAX_SHAPES);
        Load {
            vms: number(vms),
            max_vms: number(self.max_vms),
            draining: is_stopping,
            ready: ready.map(|(config, shells)| Ready { config, shells: number(shells) }).collect(),
            images: self.images.ids(),
            ..load
        }
    }
}
