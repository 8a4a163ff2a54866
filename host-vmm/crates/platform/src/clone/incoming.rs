//! What a platform does for clones that come to it: it keeps room for them, and launches them.

use std::{sync::Arc, thread, time::Duration};

use base::{error::chain, threads};
use capsule::{
    self, Assembly, Capsule, ChunkIndex, ChunkSource, Description, ImageMetadata, Incompatible,
    compat::{HostCapabilities, Requirements},
};
use hyper::body::Bytes;
use types::CopySpec;
use uuid::Uuid;
use vmm::{arch::profile::Profile, kvm::Host, memory::Budget};

use crate::{
    Error, Platform,
    clone::{
        Clones,
        page_server::{PageClient, PageServer, PageServers},
        postcopy::{self, PostcopyMemory},
        source::CurrentRetryPolicy,
    },
    fork::Fork,
    launcher::{Copies, Launch},
    registry::Reservation,
};

/// How often it is looked for clones whose source is gone.
const TEND: Duration = Duration::from_secs(1);

impl Platform {
    /// The memories of clones that run elsewhere, and have not got all of it yet.
    pub(crate) fn page_servers(&self) -> &PageServers {
        &self.page_servers
    }

    /// What all of a memory is that is still being sent.
    pub(crate) fn manifest(&self, page_server: &PageServer) -> Result<Bytes, capsule::Error> {
        page_server.manifest(&self.digests)
    }

    /// The clones that come to this platform.
    pub(crate) fn clones(&self) -> &Clones {
        &self.clones
    }

    /// The memory that images from elsewhere may take, and what describes them.
    pub(crate) fn image_memory(&self) -> &Budget {
        &self.image_memory
    }

    /// Looks after them in the background, for as long as the platform is there.
    pub(crate) fn tend_clones(self: &Arc<Self>) -> Result<(), Error> {
        let platform = Arc::downgrade(self);
        let sweep = move || {
            while let Some(platform) = platform.upgrade() {
                platform.clones.sweep();
                platform.page_servers.sweep();
                platform.tend_images();
                drop(platform);
                thread::sleep(TEND);
            }
        };
        threads::background("clones", sweep).map(drop).map_err(Error::Start)
    }

    /// Keeps room for so many VMs.
    ///
    /// # Errors
    /// [`Error::Full`] or [`Error::Stopping`].
    pub(crate) fn reserve(&self, count: usize) -> Result<Reservation, Error> {
        self.registry.reserve(count, self.max_vms)
    }

    /// Checks whether this platform can run a VM that needs this.
    ///
    /// # Errors
    /// [`Incompatible`] with all that is different, or [`Error::Host`] where KVM can't be asked.
    pub(crate) fn check_compatible(
        &self,
        requirements: &Requirements,
    ) -> Result<Result<(), Incompatible>, Error> {
        Ok(capsule::compat::check(requirements, self.host_capabilities()?))
    }

    /// What this platform has. It is found out once.
    fn host_capabilities(&self) -> Result<&HostCapabilities, Error> {
        if let Some(host_capabilities) = self.host_capabilities.get() {
            return Ok(host_capabilities);
        }
        let mut model = Host::open().map_err(Error::Host)?.model;
        // It has fitted this host when the platform was started.
        if let Some(own) =
            self.cpu_profile.parse().ok().and_then(|profile: Profile| profile.apply(&model.cpuid).ok())
        {
            model.shown = own;
        }
        Ok(self.host_capabilities.get_or_init(|| HostCapabilities::of(&model)))
    }

    /// Whether a VM was shown another CPU than this platform's guests are: it takes other warm VMs then.
    /// Where that can't be found out, it is taken for one.
    pub(crate) fn has_foreign_cpu(&self, description: &Description) -> bool {
        let vcpus = description.metadata.config.vcpus;
        self.host_capabilities().map_or(true, |host_capabilities| {
            host_capabilities.has_foreign_cpu(&description.requirements, vcpus)
        })
    }

    /// Has warm VMs made ready for copies of a clone while its memory comes, where there may be so many.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub(crate) fn expect(&self, description: &Description, count: usize) -> Result<(), Error> {
        let ImageMetadata { vm_type, config, .. } = &description.metadata;
        self.check_memory(vm_type, *config, count)?;
        // Others are made when it is launched.
        if !self.has_foreign_cpu(description) {
            self.pool.expect(*config);
        }
        Ok(())
    }

    /// An image's memory that is about to come in. What other images here have of it is there already.
    ///
    /// # Errors
    /// [`capsule::Error`].
    pub(crate) fn assemble(&self, description: Description) -> Result<Assembly, capsule::Error> {
        self.make_room(description.memory.data_bytes());
        let chunk_sources = self.images.chunk_sources();
        let _looked_up = self.image_memory.reserve(ChunkIndex::cost(&chunk_sources))?;
        let chunk_index = ChunkIndex::of(chunk_sources);
        let assembly = Assembly::new(description, &self.image_memory, |layer| chunk_index.layer(layer))?;
        for range in assembly.missing() {
            for number in range {
                let number = usize::try_from(number).unwrap_or(usize::MAX);
                let known =
                    assembly.chunks().get(number).and_then(|(_, chunk)| chunk_index.chunk(&chunk.digest));
                // What does not fit, whatever is wrong with it, comes like all else.
                if let Some(Err(error)) = known.map(|data| assembly.put(number, &data)) {
                    tracing::debug!(error = chain(&error), "a chunk that is here already can't be used");
                }
            }
        }
        Ok(assembly)
    }

    /// A memory that is about to be filled while copies run in it.
    ///
    /// # Errors
    /// [`postcopy::Error`].
    pub(crate) fn begin_postcopy(&self, description: Description) -> Result<PostcopyMemory, postcopy::Error> {
        self.make_room(description.memory.file_bytes());
        PostcopyMemory::new(description, &self.image_memory)
    }

    /// Launches copies of an image that has come in, which wait until they may run. The image stays for a
    /// while: the next one may have much in common with it.
    ///
    /// # Errors
    /// [`Error`]: none of them is there then.
    pub(crate) fn launch_capsule(
        self: &Arc<Self>,
        capsule: Capsule,
        description: Description,
        slots: &[CopySpec],
        total: u32,
        room: Reservation,
    ) -> Result<Copies, Error> {
        self.check_memory(&capsule.metadata.vm_type, capsule.metadata.config, slots.len())?;
        let chunk_source = ChunkSource::new(description, capsule.files.clone()).map_err(Error::Capsule)?;
        let image = self.receive(capsule, chunk_source);
        let (capsule, history) = image.parts();
        let launch = Launch {
            has_foreign_cpu: image.has_foreign_cpu(),
            ..Launch::of_image(&capsule.metadata, history, slots, total)
        };
        Fork::of_image(self, launch, &capsule.state, &capsule.files, room)
    }

    /// Launches copies of an image whose memory is still being filled, which wait until they may run.
    ///
    /// # Errors
    /// [`Error`]: none of them is there then.
    pub(crate) fn launch_lazily(
        self: &Arc<Self>,
        postcopy: &Arc<PostcopyMemory>,
        slots: &[CopySpec],
        total: u32,
        room: Reservation,
    ) -> Result<Copies, Error> {
        let capsule = postcopy.capsule().map_err(Error::Postcopy)?;
        self.check_memory(&capsule.metadata.vm_type, capsule.metadata.config, slots.len())?;
        let history = Arc::default();
        let launch = Launch {
            has_foreign_cpu: self.has_foreign_cpu(postcopy.description()),
            postcopy: Some(postcopy),
            ..Launch::of_image(&capsule.metadata, &history, slots, total)
        };
        Fork::of_image(self, launch, &capsule.state, &capsule.files, room)
    }

    /// The way to the source of a clone, for as long as some of its memory is missing.
    ///
    /// # Errors
    /// [`Error`]: this platform knows no way there.
    pub(crate) fn page_client(
        &self,
        postcopy: &Arc<PostcopyMemory>,
        source: &str,
        clone: Uuid,
    ) -> Result<PageClient, Error> {
        let cluster = self.cluster.get().ok_or(Error::Alone)?;
        let client = cluster.find(source).map_err(Error::Cluster)?;
        let postcopy = Arc::downgrade(postcopy);
        let retry_policy: CurrentRetryPolicy =
            Arc::new(move || postcopy.upgrade().is_some_and(|postcopy| !postcopy.is_over()).into());
        Ok(PageClient::new(client, clone, retry_policy))
    }

    /// Has the rest of a clone's memory come from its source, in the background. It is an image like others
    /// then.
    pub(crate) fn fill(self: &Arc<Self>, postcopy: &Arc<PostcopyMemory>, source: PageClient) {
        let platform = Arc::downgrade(self);
        postcopy.receive_in_background(source, move |capsule, description| {
            let Some(platform) = platform.upgrade() else { return };
            match ChunkSource::new(description, capsule.files.clone()) {
                Ok(chunk_source) => drop(platform.receive(capsule, chunk_source)),
                Err(error) => tracing::warn!(error = chain(&error), "an image that has come is not kept"),
            }
        });
    }
}
