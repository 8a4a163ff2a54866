//! The API of a platform: HTTP/1.1 with JSON, on a UNIX socket that only its user can reach, and over mutual
//! TLS where it serves others.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /v1/version` | [`Version`] |
//! | `GET /v1/openapi.json` | all of this, for programs: also in `host-vmm/openapi.json` |
//! | `GET /v1/vms` | [`Vms`] |
//! | `GET /v1/vms/VM` | [`Vm`] |
//! | `DELETE /v1/vms/VM` | nothing, once it has ended |
//! | `GET /v1/vms/VM/log?from=OFFSET&wait_ms=TIME` | bytes of its console's log, with [`NEXT_OFFSET`] and [`LAST_PIECE`] as headers |
//! | `POST /v1/vms/VM/fork`, with a [`ForkWish`] | [`Forked`] |
//! | `POST /v1/vms/VM/clone`, with a [`CloneWish`] | [`Forked`] |
//! | `GET /v1/images` | an array of [`Image`] |
//! | `GET /v1/images/ID` | [`Image`] |
//! | `DELETE /v1/images/ID` | nothing |
//! | `POST /v1/images/ID/save`, with a [`Place`] | nothing |
//! | `POST /v1/images`, with a [`Place`] | [`Image`] |
//! | `POST /v1/images/ID/spawn`, with a [`Spawn`] | [`Spawned`] |
//! | `POST /v1/images/ID/clone`, with a [`CloneWish`] | [`Spawned`] |
//! | `GET /v1/transfers` | an array of [`Transfer`] |
//! | `GET /v1/platform` | a [`Member`] |
//! | `GET /v1/platforms` | [`Platforms`] |
//! | `POST /v1/place`, with a [`Wish`](cluster::placement::Wish) | an [`Explanation`](cluster::placement::Explanation) |
//! | `/v1/clones/ID`, `/v1/supplies/ID` | see `clone` in the crate `platform` |
//!
//! An ID may be cut short, for as long as it stands for one image only, or one VM; a VM may be called by its
//! name too. What fails is told as a [`Failure`].
//!
//! Over a network, nobody saves or loads images, for that names files of the platform's host; and only
//! operators stop and fork VMs and read their logs. They order clones too, and where its configuration says
//! so, other platforms of its cluster do.

#![forbid(unsafe_code)]

use std::{
    env, fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use base::text::{Name, Reason};
use cluster::member::Member;
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};
use types::Locality;
use utoipa::ToSchema;
use uuid::Uuid;

pub mod client;
#[cfg(test)]
mod json_test;
pub mod steady;

/// Version of the API, with which all paths begin.
pub const VERSION: u32 = 1;

/// The header of a piece of a log that tells where the next one begins, in bytes.
pub const NEXT_OFFSET: &str = "host-vmm-next-offset";

/// The header of a piece of a log that tells whether the VM has ended, and nothing comes after it: `true` or
/// `false`.
pub const LAST_PIECE: &str = "host-vmm-last-piece";

/// What a platform understands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Version of its `host-vmm`.
    pub vmm: String,
    /// Version of its API, with which all paths begin.
    pub api: u32,
    /// Versions of the format of capsules that it reads. It writes the newest.
    pub capsules: Versions,
    /// Versions of the state in a capsule that it can restore. It saves the newest.
    pub states: Versions,
}

/// Versions, from the oldest to the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Versions {
    /// The first.
    pub oldest: u32,
    /// The last.
    pub newest: u32,
}

/// The VMs of a platform.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Vms {
    /// Those that there are, parents before their children.
    pub vms: Vec<Vm>,
    /// VMs that have ended, and of which there are copies; and the latest ones that the platform has ended,
    /// for their image could be changed.
    pub ended: Vec<Ended>,
}

/// One VM.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its ID.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub vm_type: String,
    /// The VM that it is a copy of; null in a booted VM.
    pub parent: Option<Uuid>,
    /// How many forks lie between it and a booted VM.
    pub generation: u32,
    /// What it does.
    pub state: State,
    /// Process of its node.
    pub pid: u32,
    /// How long it has been there, in milliseconds.
    pub uptime_ms: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Size of its guest's memory in bytes.
    pub ram_bytes: u64,
    /// Whether the image that its memory is a view of is sealed: the kernel lets nobody write to it then.
    /// Null where there is none, for it was booted, and has never forked.
    pub sealed: Option<bool>,
    /// Whether its guest's kernel can know by a VM generation ID (ACPI) that it runs in a copy: not where
    /// it was booted by a program that had none. Null while the VM is being made.
    pub generation_id: Option<bool>,
    /// Bytes of its memory of which it is not known yet what is there; null where it has all of it.
    pub missing_bytes: Option<u64>,
    /// What its process has of the host's memory; null where it is ending.
    pub memory: Option<Memory>,
}

/// What a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is being made.
    Launching,
    /// It runs.
    Running,
    /// It runs, and depends on where it was cloned, for some of its memory has not come yet.
    Dependent,
}

/// Memory of a process, as `/proc/PID/smaps_rollup` has it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Memory {
    /// What no other process has: it would be free if this one ended.
    pub private_bytes: u64,
    /// What other processes have too: relatives, and the zygote.
    pub shared_bytes: u64,
    /// The private part, and of each shared page its share (PSS): these add up to what all take together.
    pub proportional_bytes: u64,
}

/// A VM that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ended {
    /// Its ID.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// The VM that it was a copy of; null in a booted VM.
    pub parent: Option<Uuid>,
    /// Reason why the platform has ended it, where its image could be changed; null else.
    #[schema(value_type = Option<String>)]
    pub why: Option<Reason>,
}

/// An image that is kept.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its ID.
    pub id: Uuid,
    /// Type of its copies.
    #[serde(rename = "type")]
    pub vm_type: String,
    /// The VM that it was made of.
    pub original: Uuid,
    /// The name of that VM.
    pub original_name: String,
    /// Generation of its copies.
    pub generation: u32,
    /// Number of vCPUs of its copies.
    pub vcpus: u8,
    /// Size of their guests' memory in bytes.
    pub ram_bytes: u64,
    /// When it was made, in milliseconds since 1970 (UTC).
    pub created_ms: u64,
    /// Files that its memory consists of.
    pub layers: usize,
    /// Whether they are sealed: the kernel lets nobody write to them then. Before, whoever uses the image
    /// waits for that.
    #[serde(default)]
    pub sealed: bool,
    /// Size of its state in bytes.
    pub state_bytes: u64,
    /// Memory of the layers that no other kept image has, in bytes.
    pub private_bytes: u64,
    /// Memory of those that other kept images have too.
    pub shared_bytes: u64,
}

/// Where an image is saved, or loaded from.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Place {
    /// A file of the platform's host, from the root on.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// Whether the file is to be small.
    #[serde(default)]
    pub compress: bool,
}

/// A wish for copies.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Spawn {
    /// How many.
    pub count: u32,
}

/// Copies that run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Spawned {
    /// The copies.
    pub vms: Vec<Copied>,
}

/// One copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Copied {
    /// Its ID.
    pub id: Uuid,
    /// Its name.
    #[schema(value_type = String)]
    pub name: Name,
}

/// A wish for copies on another platform.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CloneWish {
    /// Name of the platform that has what is copied, or CLUSTER/NAME: the order is passed on to it. Null: the
    /// one that is asked.
    #[serde(default)]
    pub from: Option<String>,
    /// Name of the platform, or CLUSTER/NAME.
    pub to: String,
    /// How many.
    pub count: u32,
    /// Whether they are to run before all of their memory has come.
    #[serde(default)]
    pub lazy: bool,
}

/// A wish for copies of a VM that runs.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ForkWish {
    /// How many.
    pub count: u32,
    /// Where they are to run.
    #[serde(default)]
    pub location: Locality,
}

/// Copies that a fork has made.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Forked {
    /// All of them, lowest index first.
    pub vms: Vec<ForkedVm>,
}

/// One copy that a fork has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkedVm {
    /// Its ID.
    pub id: Uuid,
    /// Its name on its platform.
    #[schema(value_type = String)]
    pub name: Name,
    /// Which of the fork's copies it is, from 1.
    pub index: u32,
    /// Name of the platform where it runs; empty where there is one platform alone.
    #[schema(value_type = String)]
    pub platform: Name,
    /// Whether that is its parent's.
    pub placement: Placement,
}

/// Where a copy runs, as seen from its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// On the parent's platform.
    Local,
    /// On another one.
    Remote,
}

/// A clone that is being sent.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Transfer {
    /// Its ID.
    pub id: Uuid,
    /// ID of the image.
    pub image: Uuid,
    /// The VM that it was made of.
    pub original: Uuid,
    /// The name of that VM.
    pub original_name: String,
    /// Where it is sent.
    pub to: String,
    /// Bytes of memory that are to be sent; 0 before that is known.
    pub wanted_bytes: u64,
    /// Bytes of memory that were sent.
    pub sent_bytes: u64,
    /// Bytes of memory that need not be sent, since the target has them.
    pub spared_bytes: u64,
}

/// A platform as another one knows it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Platform {
    /// What it says of itself.
    #[serde(flatten)]
    pub member: Member,
    /// How long ago that was, in milliseconds; 0 for the one that is asked.
    pub age_ms: u64,
}

/// The platforms that one knows.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Platforms {
    /// The one that is asked comes first.
    pub platforms: Vec<Platform>,
    /// Whether others take it for gone: it gets no VMs from them then.
    pub partitioned: bool,
}

/// Why something was not done.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// In words: at most 4096 bytes, in which control characters are escaped.
    #[schema(value_type = String)]
    pub error: Reason,
}

/// The folder in which a platform's socket stands where nobody names another: this user's alone.
///
/// # Errors
/// Where there is no such folder, or others can reach into it.
pub fn folder() -> io::Result<PathBuf> {
    let folder = match env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) => PathBuf::from(runtime).join("host-vmm"),
        None if geteuid().is_root() => PathBuf::from("/run/host-vmm"),
        None => PathBuf::from(format!("/tmp/host-vmm-{}", geteuid())),
    };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    check_private(&folder)?;
    Ok(folder)
}

fn check_private(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let metadata = fs::symlink_metadata(folder)?;
    let is_ours = metadata.is_dir() && metadata.uid() == geteuid().as_raw();
    if is_ours && metadata.permissions().mode() & 0o077 == 0 {
        Ok(())
    } else {
        Err(io::Error::other(format!("{} is not a folder that only this user can reach", folder.display())))
    }
}

/// The socket of this process's platform, where nobody names another.
///
/// # Errors
/// As [`folder`].
pub fn default_socket() -> io::Result<PathBuf> {
    Ok(folder()?.join(format!("{}.sock", std::process::id())))
}
