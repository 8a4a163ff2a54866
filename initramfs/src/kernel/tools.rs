//! What the lean kernel is built with: programs of Debian's packages, and bindgen from crates.io.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache;

/// Packages that are needed whatever release of Debian this is.
const PLAIN: [&str; 9] =
    ["gcc", "libc6-dev", "make", "bc", "flex", "bison", "libelf-dev", "xz-utils", "perl"];

/// Compiler and sources of Rust's core library, the better ones first. Debian 12 has a new enough compiler
/// for browsers only.
const RUST: [[&str; 2]; 2] = [["rustc-web", "rust-web-src"], ["rustc", "rust-src"]];

/// Versions of LLVM, whose library bindgen loads, the best tried one first.
const LLVM: [&str; 5] = ["19", "20", "21", "18", "17"];

/// Version of bindgen-cli: Debian 12 has none that the kernel takes.
const BINDGEN: &str = "0.72.1";

/// Where programs of Debian's packages are: a Rust of rustup's has no sources of the core library.
pub(super) const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The compiler of Debian's packages.
pub(super) const RUSTC: &str = "/usr/bin/rustc";

/// Why the tools can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Some packages are not installed.
    #[error("packages that a kernel is built with are not installed: {}", packages.join(" "))]
    Missing {
        /// Names of the packages.
        packages: Vec<String>,
    },
    /// A program could not be started.
    #[error("can't run {program}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program ended with an error.
    #[error("`{command}` failed: {output}")]
    Failed {
        /// The command line.
        command: String,
        /// Its last words.
        output: String,
    },
    /// bindgen could not be put into the cache.
    #[error("can't install bindgen in {}", dir.display())]
    Cache {
        /// Where it goes.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What compiles the parts that are in C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compiler {
    /// GCC and the linker of GNU's binutils, which every Debian has.
    Gcc,
    /// Clang and the other tools of LLVM.
    Clang,
}

impl Compiler {
    /// Packages that it needs beside [`PLAIN`] ones, which bindgen's own build needs with either.
    fn packages(self, llvm: &str) -> Vec<String> {
        match self {
            Self::Gcc => Vec::new(),
            Self::Clang => ["clang", "lld", "llvm"].map(|package| format!("{package}-{llvm}")).to_vec(),
        }
    }

    /// Its compiler and linker.
    fn programs(self, llvm: &str) -> [String; 2] {
        match self {
            Self::Gcc => ["gcc", "ld"].map(str::to_owned),
            Self::Clang => ["clang", "ld.lld"].map(|program| format!("{program}-{llvm}")),
        }
    }
}

/// Tools that are installed.
#[derive(Debug, Clone)]
pub struct Tools {
    /// What decides what they make, as they tell it: names and versions.
    pub(super) versions: BTreeMap<String, String>,
    compiler: Compiler,
    /// The version of LLVM whose packages are used.
    llvm: &'static str,
}

impl Tools {
    /// Finds those to build with `compiler` among the installed packages.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] where packages are not installed, another where they can't be asked for their
    /// versions.
    pub fn find(compiler: Compiler) -> Result<Self, Error> {
        let installed = installed()?;
        let Chosen { rust, llvm } = Chosen::new(|package| installed.contains_key(package), is_offered);
        let libclang = libclang(llvm);
        let needed = PLAIN.into_iter().chain(rust).chain([libclang.as_str()]).map(str::to_owned);
        let missing =
            needed.chain(compiler.packages(llvm)).filter(|package| !installed.contains_key(package));
        let packages: Vec<String> = missing.collect();
        if !packages.is_empty() {
            return Err(Error::Missing { packages });
        }
        let version = |package: &str| installed.get(package).cloned().unwrap_or_default();
        let mut versions: BTreeMap<_, _> = rust
            .into_iter()
            .chain([libclang.as_str()])
            .map(|name| (name.to_owned(), version(name)))
            .collect();
        // The package gcc only depends on the compiler.
        for program in compiler.programs(llvm).iter().map(String::as_str).chain([RUSTC]) {
            versions.insert(program.into(), first_line(Command::new(program).arg("--version"))?);
        }
        versions.insert("bindgen".into(), BINDGEN.into());
        Ok(Self { versions, compiler, llvm })
    }

    /// The directory of the library libclang.
    pub(super) fn libclang(&self) -> PathBuf {
        format!("/usr/lib/llvm-{}/lib", self.llvm).into()
    }

    /// The kernel's setting that makes LLVM's tools be used, where they are.
    pub(super) fn setting(&self) -> Option<String> {
        (self.compiler == Compiler::Clang).then(|| format!("LLVM=-{}", self.llvm))
    }
}

/// What is to be used, of what there is to choose from.
struct Chosen {
    rust: [&'static str; 2],
    llvm: &'static str,
}

impl Chosen {
    fn new(is_installed: impl Fn(&str) -> bool, is_offered: impl Fn(&str) -> bool) -> Self {
        let can_be_had = |package: &str| is_installed(package) || is_offered(package);
        let [best, fallback] = RUST;
        let installed = LLVM.into_iter().find(|llvm| is_installed(&libclang(llvm)));
        Self {
            rust: if best.into_iter().all(can_be_had) { best } else { fallback },
            llvm: installed
                .or_else(|| LLVM.into_iter().find(|llvm| can_be_had(&libclang(llvm))))
                .unwrap_or(LLVM[0]),
        }
    }
}

/// The package of the library that bindgen loads.
fn libclang(llvm: &str) -> String {
    format!("libclang1-{llvm}")
}

/// bindgen, which is built and installed in `cache` where it isn't there yet.
pub(super) fn bindgen(cache: &Path) -> Result<PathBuf, Error> {
    let dir = cache.join(format!("bindgen-{BINDGEN}"));
    let program = dir.join("bin/bindgen");
    if program.is_file() {
        return Ok(program);
    }
    let failed = |source| Error::Cache { dir: dir.clone(), source };
    let _lock = cache::lock(cache).map_err(failed)?;
    if program.is_file() {
        return Ok(program);
    }
    let new = tempfile::tempdir_in(cache).map_err(failed)?;
    let root = new.path().join("root");
    // The workspace's own settings make static programs, which can't load libclang. Cargo finds them from
    // directories below it.
    let elsewhere = tempfile::tempdir().map_err(failed)?;
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .args(["install", "bindgen-cli", "--version", BINDGEN, "--locked", "--no-default-features"])
        .args(["--features", "runtime", "--root"])
        .arg(&root)
        .arg("--target-dir")
        .arg(elsewhere.path())
        .current_dir(elsewhere.path())
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("CARGO_BUILD_TARGET")
        .env("RUSTFLAGS", "-Ctarget-feature=-crt-static")
        // It runs for a second in each build: it is built fast rather than to be fast.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "false");
    output(&mut cargo)?;
    fs::rename(&root, &dir).map_err(failed)?;
    Ok(program)
}

/// Versions of all packages that may be needed and are installed, by their names.
fn installed() -> Result<BTreeMap<String, String>, Error> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", "${db:Status-Abbrev}|${Package}|${Version}\\n"]);
    query.args(PLAIN).args(RUST.as_flattened());
    query.args(
        LLVM.into_iter().flat_map(|llvm| [vec![libclang(llvm)], Compiler::Clang.packages(llvm)].concat()),
    );
    // It ends with an error where one of them is not known, and tells of the others.
    let output = query.output().map_err(|source| Error::Start { program: "dpkg-query".into(), source })?;
    Ok(parse_installed(&String::from_utf8_lossy(&output.stdout)))
}

fn parse_installed(listing: &str) -> BTreeMap<String, String> {
    let fields = listing.lines().filter_map(|line| line.strip_prefix("ii |")?.split_once('|'));
    fields.map(|(package, version)| (package.to_owned(), version.to_owned())).collect()
}

/// Whether this machine's apt knows a package that it could install.
fn is_offered(package: &str) -> bool {
    let output = Command::new("apt-cache").args(["show", "--no-all-versions", package]).output();
    output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}

fn first_line(command: &mut Command) -> Result<String, Error> {
    let text = output(command.env("PATH", PATH).env("LC_ALL", "C"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Runs `command` and returns its standard output.
fn output(command: &mut Command) -> Result<String, Error> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| Error::Start { program: program.clone(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
    Err(Error::Failed {
        command: format!("{program} {}", arguments.join(" ")),
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(installed: &[&str], offered: &[&str]) -> ([&'static str; 2], &'static str) {
        let chosen =
            Chosen::new(|package| installed.contains(&package), |package| offered.contains(&package));
        (chosen.rust, chosen.llvm)
    }

    #[test]
    fn compiler_for_browsers_is_taken_where_there_is_one() {
        let debian_12 = ["rustc", "rust-src", "rustc-web", "rust-web-src", "libclang1-14", "libclang1-19"];
        assert_eq!(chosen(&["rustc", "rust-src"], &debian_12), (["rustc-web", "rust-web-src"], "19"));
        let debian_13 = ["rustc", "rust-src", "libclang1-17", "libclang1-19"];
        assert_eq!(chosen(&[], &debian_13), (["rustc", "rust-src"], "19"));
    }

    #[test]
    fn installed_libclang_is_taken_before_a_better_one() {
        assert_eq!(chosen(&["libclang1-20"], &["libclang1-19"]).1, "20");
        assert_eq!(chosen(&[], &["libclang1-18", "libclang1-21"]).1, "21");
        assert_eq!(chosen(&[], &[]).1, "19");
    }

    #[test]
    fn only_installed_packages_count() {
        let listing = "ii |gcc|4:12.2.0-3\nun |rustc|\nrc |bison|2:3.8\n";
        assert_eq!(parse_installed(listing), BTreeMap::from([("gcc".into(), "4:12.2.0-3".into())]));
    }
}
