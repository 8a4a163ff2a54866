//! The command line: types only.

use std::{fs, path::PathBuf};

use base::{error::chain, units};
use clap::{Args, Parser, Subcommand, ValueEnum, builder::TypedValueParser};
use node::zygote::CPU_PROFILE_VARIABLE;
use platform::{Keep, Limit};
use types::{ForkStep, Locality};
use uuid::Uuid;
use vmm::arch::profile::{Profile, Subset};

mod vms;

pub(crate) use vms::{Elsewhere, Fork, Logs, Platform, Stop};

/// Runs Linux guests on KVM that can fork themselves.
#[derive(Debug, Parser)]
#[command(name = "host-vmm", version, propagate_version = true)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a VM, and run it and its children until all have ended.
    #[command(after_help = EXIT_CODES)]
    Run(Box<Run>),
    /// Be a platform of a cluster, until a signal comes.
    Serve(Serve),
    /// List the VMs of a platform.
    Ps(Ps),
    /// Draw which VM of a platform comes from which.
    Tree(Tree),
    /// Fork a VM of a platform, though its guest has not asked for it.
    Fork(Fork),
    /// Stop VMs of a platform.
    Stop(Stop),
    /// Print what a VM has written to its console.
    Logs(Logs),
    /// List, look at, save, load or remove images that a platform keeps.
    Image(Image),
    /// Launch copies of an image that a platform keeps.
    Spawn(Spawn),
    /// Launch copies of an image, or of a VM that runs, on another platform.
    Clone(Clone),
    /// List the platforms that one knows.
    Platforms(Platforms),
    /// Tell where copies of a VM would go.
    Place(Place),
    /// Make the certificates by which the platforms of a cluster know each other.
    Cert(Cert),
    /// Find out whether guests can run here, and what to do where they can't.
    Check(Check),
    /// Print what guests can be shown of this host's CPU; or, of hosts whose profiles are in files, what they
    /// have in common: a profile for `host-vmm run --cpu-profile`.
    CpuProfile(CpuProfile),
    /// Start nodes (itself started by the platform, not by people).
    #[command(hide = true)]
    Zygote(Zygote),
}

const EXIT_CODES: &str = "\
Exit codes: how the booted VM ended. 0 it was powered off or stopped, or Ctrl-A x; 3 it was reset (a reboot, or a panic); 1 it or host-vmm \
failed; 2 wrong usage; 129, 130, 131, 143 host-vmm got SIGHUP, SIGINT, SIGQUIT, SIGTERM.

On a terminal, keys go to the booted VM; Ctrl-A x ends all VMs, Ctrl-A Ctrl-A is one Ctrl-A.";

/// Folder for certificates where none is named.
const CERTIFICATES: &str = "host-vmm.certs";

/// Options of `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Kernel: a bzImage (vmlinuz), or an ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// Guest memory: bytes, or with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory_size)]
    pub(crate) mem: u64,
    /// Take all of the guest's memory from the host before the guest starts, instead of page by page when it
    /// is used.
    #[arg(long)]
    pub(crate) prealloc: bool,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) cpus: u8,
    /// Added to the kernel's command line, which starts with "console=ttyS0 panic=-1 pci=off".
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) cmdline: String,
    /// Name of the booted VM.
    #[arg(long, value_name = "NAME", default_value = "vm", value_parser = vm_name)]
    pub(crate) name: String,
    /// Folder for the consoles' logs, one file for each VM.
    #[arg(long, value_name = "DIR", default_value = "host-vmm.logs")]
    pub(crate) log_dir: PathBuf,
    /// Write what happens to FILE, as JSON lines.
    #[arg(long, value_name = "FILE")]
    pub(crate) events: Option<PathBuf>,
    /// Write the timeline of each fork, of parent and children, to FILE, which ui.perfetto.dev opens.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Be a platform of a cluster too, which is set up by this file. It says what other options say
    /// otherwise.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["log_dir", "events", "trace", "max_vms", "max_pause", "limits", "keep", "image_memory", "ready", "no_prefetch", "cpu_profile"])]
    pub(crate) config: Option<PathBuf>,
    /// Answer `host-vmm ps` and others on this socket, instead of one in the folder for this user's sockets.
    #[arg(long, value_name = "SOCKET")]
    pub(crate) api: Option<PathBuf>,
    /// Most VMs at a time; a fork that would need more fails.
    #[arg(long, value_name = "N", default_value_t = 1100)]
    pub(crate) max_vms: usize,
    /// Longest pause of a VM for a fork. Where its copies, here and on other platforms, are not ready to run
    /// within that time, the fork fails with an error code of its own, the VM goes on, and nothing is left of
    /// the copies.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) max_pause: u64,
    /// Limit what VMs of a type may do; * stands for all types. Names: fork-children (children of one fork),
    /// children (that one VM has at a time), rate (forks of one VM within a second), generations, memory (of
    /// all VMs of the type, with K, M or G). A fork beyond a limit fails with an error code. May be given
    /// again.
    #[arg(long = "limit", value_name = "TYPE:NAME=VALUE,...")]
    pub(crate) limits: Vec<Limit>,
    /// Keep the image of the latest fork into children of a type, or of the latest NUMBER forks; * stands for
    /// all types. Copies of a kept image can be launched at any time (`host-vmm spawn`), and this command
    /// goes on for as long as it is kept. May be given again.
    #[arg(long, value_name = "TYPE[:NUMBER]")]
    pub(crate) keep: Vec<Keep>,
    /// Most memory that images from elsewhere take, which clones and `host-vmm image load` bring: bytes, or
    /// with K, M or G; what does not fit is refused. Half of the host's memory where this is not given; a
    /// sixteenth of that stays available in any case.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) image_memory: Option<u64>,
    /// Ready machines to keep for the children of the next fork; up to as many more stand by, each for one VM
    /// that forks. Children beyond that number take longer.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) ready: usize,
    /// CPU that guests are shown: all of this host's (host), what a level of x86-64 has (x86-64-v2,
    /// x86-64-v3, x86-64-v4), or what a file says that `host-vmm cpu-profile` has printed. A guest can go on
    /// on each host that has what it was shown.
    #[arg(long, value_name = "NAME|FILE", default_value = "host", value_parser = cpu_profile)]
    pub(crate) cpu_profile: Profile,
    /// Make no pages ready for a child beforehand that the first child of its parent has written to before
    /// its first output.
    #[arg(long)]
    pub(crate) no_prefetch: bool,
    /// For tests: let the booted VM's forks fail, one for each step that is named, in order. A fork with
    /// `first-run` does not fail: in its copies, the other vCPUs have 50 ms of processor time before the
    /// first one runs.
    #[arg(long, value_name = "STEP", value_delimiter = ',', hide = true)]
    pub(crate) inject_fault: Vec<ForkStep>,
}

/// Options of `serve`.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// How the platform is set up, in TOML.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
}

/// Options of `ps`.
#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// The platform.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `tree`.
#[derive(Debug, Args)]
pub(crate) struct Tree {
    /// The platform.
    #[command(flatten)]
    pub(crate) platform: Platform,
}

/// Options of `image`.
#[derive(Debug, Args)]
pub(crate) struct Image {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

/// What can be done with images.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// List them.
    Ls {
        /// The platform.
        #[command(flatten)]
        platform: Platform,
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Show one, as a JSON object.
    Show {
        /// The platform.
        #[command(flatten)]
        platform: Platform,
        /// Its ID, or how that begins.
        id: String,
    },
    /// Write one to a file.
    Save {
        /// The platform.
        #[command(flatten)]
        platform: Platform,
        /// Its ID, or how that begins.
        id: String,
        /// The file; one that is there is replaced.
        file: PathBuf,
        /// Make the file smaller (zstd), which takes longer.
        #[arg(long)]
        compress: bool,
    },
    /// Show what a file says of the image that it holds, as a JSON object. No platform is needed.
    Inspect {
        /// The file.
        file: PathBuf,
    },
    /// Read all of a file, and say whether it is as it was written. No platform is needed.
    Verify {
        /// The file.
        file: PathBuf,
    },
    /// Keep the one that a file holds, and print its ID.
    Load {
        /// The platform.
        #[command(flatten)]
        platform: Platform,
        /// The file.
        file: PathBuf,
    },
    /// Let go of some. VMs that run from them go on.
    Rm {
        /// The platform.
        #[command(flatten)]
        platform: Platform,
        /// Their IDs, or how these begin.
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// Options of `spawn`.
#[derive(Debug, Args)]
pub(crate) struct Spawn {
    /// The platform.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// The image's ID, or how that begins.
    #[arg(long, value_name = "ID")]
    pub(crate) image: String,
    /// How many copies.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = copies())]
    pub(crate) count: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `clone`.
#[derive(Debug, Args)]
pub(crate) struct Clone {
    /// The platform that is asked.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Name of the platform that has what is copied, where that is another one than is asked: the order is
    /// passed on to it. CLUSTER/NAME where several clusters have one of that name.
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) from: Option<String>,
    /// What is copied.
    #[command(flatten)]
    pub(crate) original: Original,
    /// Name of the platform where the copies are to run; CLUSTER/NAME where several clusters have one of that
    /// name.
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) to: String,
    /// Let the copies run before all of their memory has come. They depend on this platform until it has.
    #[arg(long)]
    pub(crate) lazy: bool,
    /// How many copies.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = copies())]
    pub(crate) count: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What `clone` copies: one of these.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Original {
    /// The image's ID, or how that begins.
    #[arg(long, value_name = "ID")]
    pub(crate) image: Option<String>,
    /// The VM's name, or its ID, or how that begins. It is forked, though its guest has not asked for it, and
    /// goes on.
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<String>,
}

/// Options of `platforms`.
#[derive(Debug, Args)]
pub(crate) struct Platforms {
    /// The platform that is asked.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where copies are to run.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Where {
    /// Wherever the operator's rules say.
    Any,
    /// On its own platform.
    Local,
    /// On others.
    Remote,
}

impl From<Where> for Locality {
    fn from(place: Where) -> Self {
        match place {
            Where::Any => Self::Any,
            Where::Local => Self::Local,
            Where::Remote => Self::Remote,
        }
    }
}

/// Options of `place`.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// The platform from which the copies would come.
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Their type.
    #[arg(long = "type", value_name = "TYPE", default_value = "worker", value_parser = vm_name)]
    pub(crate) vm_type: String,
    /// How many.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = copies())]
    pub(crate) count: u32,
    /// Memory of each: bytes, or with K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory_size)]
    pub(crate) mem: u64,
    /// vCPUs of each.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub(crate) cpus: u8,
    /// Where the guest wants them.
    #[arg(long = "where", value_name = "PLACE", default_value = "any", value_enum)]
    pub(crate) location: Where,
    /// ID of their image: platforms that have it already are better suited.
    #[arg(long, value_name = "ID")]
    pub(crate) image: Option<Uuid>,
    /// Print what speaks for each platform, and what against it.
    #[arg(long)]
    pub(crate) explain: bool,
    /// Print that as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `cert`.
#[derive(Debug, Args)]
pub(crate) struct Cert {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: CertCommand,
}

/// What can be done with certificates.
#[derive(Debug, Subcommand)]
pub(crate) enum CertCommand {
    /// Make the cluster's own CA: ca.pem, its certificate, and ca.key, by which certificates are issued.
    Init {
        /// Folder for the cluster's files.
        #[arg(long, value_name = "DIR", default_value = CERTIFICATES)]
        dir: PathBuf,
        /// Replace a CA that is there. What it has issued is of no use then.
        #[arg(long)]
        force: bool,
    },
    /// Issue a certificate, and a key for it: NAME.pem and NAME.key.
    Issue {
        /// The platform's name, or the operator's.
        #[arg(value_parser = vm_name)]
        name: String,
        /// Folder with the CA's files.
        #[arg(long, value_name = "DIR", default_value = CERTIFICATES)]
        dir: PathBuf,
        /// It is for an operator, who asks platforms, and is not asked.
        #[arg(long)]
        operator: bool,
        /// For how many days.
        #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
        days: u32,
        /// Replace a certificate and key that are there.
        #[arg(long)]
        force: bool,
    },
}

/// Options of `check`.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `cpu-profile`.
#[derive(Debug, Args)]
pub(crate) struct CpuProfile {
    /// Profiles that this command has printed on other hosts.
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Parses how many copies are wanted.
fn copies() -> impl TypedValueParser<Value = u32> {
    clap::value_parser!(u32).range(1..=i64::from(vmfork_abi::MAX_CHILDREN))
}

/// Options of `zygote`.
#[derive(Debug, Args)]
pub(crate) struct Zygote {
    /// CPU that guests are shown: a name, or the text of a file. The platform has it in the environment,
    /// where it can be long.
    #[arg(long, env = CPU_PROFILE_VARIABLE, default_value = "host")]
    pub(crate) cpu_profile: Profile,
}

/// Takes a CPU profile by its name, or out of a file.
fn cpu_profile(text: &str) -> Result<Profile, String> {
    if let Some(profile) = Profile::named(text) {
        return Ok(profile);
    }
    let names = || Profile::names().collect::<Vec<_>>().join(", ");
    let file =
        fs::read_to_string(text).map_err(|error| format!("neither {} nor a file: {error}", names()))?;
    Subset::from_json(&file).map(Profile::Common).map_err(|error| chain(&error))
}

/// Parses a size such as `8G`.
fn size(text: &str) -> Result<u64, String> {
    units::size(text).ok_or_else(|| "not a size: give bytes, or a number with K, M or G".to_owned())
}

/// Parses a memory size such as `512M`.
fn memory_size(text: &str) -> Result<u64, String> {
    use types::{MAX_RAM_BYTES, MIN_RAM_BYTES, PAGE_BYTES};
    let bytes = size(text)?;
    let bytes = Some(bytes).filter(|bytes| (MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(bytes));
    let bytes =
        bytes.ok_or_else(|| format!("must be from {}M to {}G", MIN_RAM_BYTES >> 20, MAX_RAM_BYTES >> 30))?;
    if bytes % PAGE_BYTES == 0 { Ok(bytes) } else { Err("must be a multiple of 4096 bytes".to_owned()) }
}

/// Parses a name, which is a VM type too.
fn vm_name(text: &str) -> Result<String, String> {
    if vmfork_abi::is_vm_type(text) {
        Ok(text.to_owned())
    } else {
        Err("must be 1 to 32 characters of a-z, 0-9 and -, and not start or end with -".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_cpu_profile_has_a_name_or_a_file() {
        assert_eq!(cpu_profile("host"), Ok(Profile::Host));
        let text = Subset::of_host(&[]).to_json().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        assert_eq!(cpu_profile(file.path().to_str().unwrap()), Ok(Profile::Common(Subset::of_host(&[]))));
        fs::write(file.path(), "{}").unwrap();
        assert!(
            cpu_profile(file.path().to_str().unwrap()).unwrap_err().starts_with("this is no CPU profile: ")
        );
        assert!(cpu_profile("x86-64-v9").unwrap_err().starts_with("neither host, x86-64-v2"));
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(memory_size("512M"), Ok(512 << 20));
        assert_eq!(memory_size("1g"), Ok(1 << 30));
        assert_eq!(memory_size("33554432"), Ok(32 << 20));
        for bad in ["", "M", "1T", "-1M", "1M", "4097K", "18446744073709551615G"] {
            assert!(memory_size(bad).is_err(), "{bad}");
        }
    }
}
