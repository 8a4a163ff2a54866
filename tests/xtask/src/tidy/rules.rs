//! The rules that `cargo xtask tidy` holds the repository to, as tables. A rule is changed here and nowhere
//! else; the modules beside this one only check.

/// One crate of the workspace, and what it may link.
#[derive(Debug)]
pub(super) struct Crate {
    /// The package's name.
    pub(super) name: &'static str,
    /// Crates of the workspace that it may depend on, as a normal or build dependency. Arrows point
    /// downwards: a crate stands below all that may depend on it, so that there can be no circle.
    pub(super) may_use: &'static [&'static str],
    /// Packages that its normal dependency tree must not have, at whatever depth.
    pub(super) links_none_of: &'static [&'static str],
}

/// Packages of the network. What runs in the process that holds a guest links none of them: a guest that has
/// broken out finds no protocol code, and a fork has fewer pages to touch.
const NETWORK: &[&str] = &["axum", "hyper", "rustls", "tokio", "tonic", "utoipa"];

/// All crates, lowest first. A crate that is not here fails; one that is not there yet is passed over.
pub(super) const CRATES: &[Crate] = &[
    links("vmfork-abi", &[]),
    links("vmfork", &["vmfork-abi"]),
    links("initramfs", &[]),
    // What host-vmm is split into.
    links("base", &[]),
    links("types", &["base", "vmfork-abi"]),
    without_network("vmm", &["base", "types", "vmfork-abi"]),
    links("cluster", &["base", "types", "vmfork-abi"]),
    without_network("capsule", &["base", "types", "vmfork-abi", "vmm"]),
    links("api", &["base", "types", "vmfork-abi", "cluster"]),
    without_network("node", &["base", "types", "vmfork-abi", "vmm", "capsule"]),
    links("platform", &["base", "types", "vmfork-abi", "vmm", "cluster", "capsule", "api", "node"]),
    links(
        "host-vmm",
        &["base", "types", "vmfork-abi", "vmm", "cluster", "capsule", "api", "node", "platform"],
    ),
    links(
        "vmfork-tests",
        &[
            "base",
            "types",
            "vmfork-abi",
            "vmfork",
            "vmm",
            "cluster",
            "capsule",
            "api",
            "node",
            "platform",
            "host-vmm",
        ],
    ),
    links("xtask", &["initramfs"]),
];

/// Modules of one crate that import each other in a circle.
#[derive(Debug)]
pub(super) struct Circle {
    /// The crate's name, as its package has it.
    pub(super) of: &'static str,
    /// Top-level modules in the circle, sorted.
    pub(super) modules: &'static [&'static str],
    /// Reason for which it is there.
    pub(super) why: &'static str,
}

/// Circles that are there today. Another one fails, and so does one of these that has changed or is gone:
/// this table can only get shorter.
pub(super) const CIRCLES: &[Circle] = &[
    Circle {
        of: "guest-kmod-rs",
        modules: &["device", "file", "fork", "fork_guard", "ioctl", "task"],
        why: "`Device` owns a part of each, and hands itself to all of them",
    },
    Circle {
        of: "platform",
        modules: &["clone", "fork", "images", "launcher", "node_server", "registry"],
        why: "they do their work on `Platform`, which has a part of each, until each is a service of its own",
    },
    Circle {
        of: "vmfork",
        modules: &["fork", "identity", "route"],
        why: "a fork chooses a route to the VMM, and each route returns a fork's outcome and identity",
    },
];

/// Directories with Rust that belongs to no package: name, and the file that is the crate's root.
pub(super) const ROOTS_WITHOUT_PACKAGE: &[(&str, &str)] =
    &[("guest-kmod-rs", "guest-kmod-rs/vmfork_main.rs")];

/// Most columns that a line of Rust, TOML or shell may have.
pub(super) const COLUMNS: usize = 110;

/// Directories with a limit of their own.
pub(super) const OTHER_COLUMNS: &[(&str, usize)] = &[
    // Some messages and macros, which rustfmt leaves as they are.
    ("host-vmm/", 300),
];

/// Most lines of a file of Rust.
pub(super) const FILE_LINES: usize = 600;

/// Most words and lines of the README.
pub(super) const README_WORDS: usize = 1000;
pub(super) const README_LINES: usize = 120;

/// Entries that there may be at the top level of the repository.
pub(super) const TOP_LEVEL: &[&str] = &[
    ".cargo",
    ".ci",
    ".clippy.toml",
    ".editorconfig",
    ".gitignore",
    ".rustfmt.toml",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "deny.toml",
    "docs",
    "guest-agent",
    "guest-kmod-rs",
    "host-vmm",
    "initramfs",
    "rust-toolchain.toml",
    "tests",
];

/// Packages that one file alone may use, so that they can be replaced there.
pub(super) const ONE_USER: &[&str] = &["bincode"];

/// Words that a doc comment does not begin with, since they leave out its subject.
pub(super) const HEADLESS: &[&str] = &[
    "Has", "How", "If", "In", "Is", "It", "Its", "Of", "Says", "That", "The same", "There", "They", "To",
    "What", "When", "Where", "Whether", "Which", "Who", "Whose", "Why", "With", "Without",
];

/// Dependencies that their package's sources don't name: package, dependency, and the reason.
pub(super) const USED_UNNAMED: &[(&str, &str, &str)] = &[];

const fn links(name: &'static str, may_use: &'static [&'static str]) -> Crate {
    Crate { name, may_use, links_none_of: &[] }
}

const fn without_network(name: &'static str, may_use: &'static [&'static str]) -> Crate {
    Crate { name, may_use, links_none_of: NETWORK }
}
