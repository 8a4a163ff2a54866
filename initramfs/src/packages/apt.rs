//! apt with private state: it needs no root, and neither reads nor changes what is installed on the host.
//!
//! The host's package sources, keyrings and download settings (`Acquire::*`: proxies and the like) are used
//! as they are. Everything else of the host's configuration is left out, above all its hooks.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How old package lists may be before they are fetched again.
const LISTS_AGE: Duration = Duration::from_secs(12 * 3600);

/// Packages that apt is told are installed: others depend on them, but no guest has a use for them.
const ASSUMED_INSTALLED: [&str; 15] = [
    "awk",
    "debconf",
    "dpkg",
    "install-info",
    "libdb5.3",
    "libdb5.3t64",
    "libnsl2",
    "libssl3",
    "libssl3t64",
    "libtirpc3",
    "libtirpc3t64",
    "media-types",
    "netbase",
    "readline-common",
    "tzdata",
];

/// Why apt did not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// A program of apt could not be started.
    #[error(
        "can't run {program}: packages come by way of apt, so this needs Debian or one of its derivatives"
    )]
    Start {
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program of apt ended with an error.
    #[error("`{command}` failed: {output}")]
    Failed {
        /// The command line.
        command: String,
        /// Its last words.
        output: String,
    },
    /// A file of apt's private state could not be written.
    #[error("can't write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// One version of a package, as the package lists describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// Name of the package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// Its architecture: `amd64` or `all`.
    pub architecture: String,
    /// What it depends on, in the syntax of Debian's control files.
    pub depends: String,
    /// Hash of the package file, vouched for by the archive's signature.
    pub sha256: String,
}

impl Record {
    /// Name of the package file, as apt writes it.
    pub(crate) fn file_name(&self) -> String {
        format!("{}_{}_{}.deb", self.package, self.version.replace(':', "%3a"), self.architecture)
    }
}

/// An apt with its own state directory.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
    debs: PathBuf,
}

impl Apt {
    /// Keeps state in `dir`, and package files in `debs`. Touches neither yet.
    pub(crate) fn new(dir: PathBuf, debs: PathBuf) -> Self {
        Self { dir, debs }
    }

    /// Resolves `packages` with all that they depend on, and downloads them. Returns names and versions.
    pub(crate) fn install(&self, packages: &[&str]) -> Result<Vec<(String, String)>, AptError> {
        self.with_lists(|apt| {
            let install = |option| ["install", "--yes", option].into_iter().chain(packages.iter().copied());
            let plan = apt.run("apt-get", install("--simulate"))?;
            apt.run("apt-get", install("--download-only"))?;
            Ok(parse_plan(&plan))
        })
    }

    /// Downloads one version of one package, without what it depends on.
    pub(crate) fn download(&self, package: &str, version: &str) -> Result<(), AptError> {
        self.with_lists(|apt| apt.run("apt-get", ["download", &format!("{package}={version}")]).map(drop))
    }

    /// All versions of `package` that the package lists hold, the best first; none if they don't know it.
    pub(crate) fn records(&self, package: &str) -> Result<Vec<Record>, AptError> {
        self.ensure_lists()?;
        match self.run("apt-cache", ["show", "--all-versions", package]) {
            Ok(output) => Ok(parse_records(&output)),
            Err(AptError::Failed { output, .. }) if output.contains("No packages found") => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Runs `task`, and once more with new package lists if it fails with old ones: the mirror may have moved
    /// on.
    fn with_lists<T>(&self, task: impl Fn(&Self) -> Result<T, AptError>) -> Result<T, AptError> {
        let new = self.ensure_lists()?;
        match task(self) {
            Err(AptError::Failed { .. }) if !new => {
                self.update()?;
                task(self)
            }
            result => result,
        }
    }

    /// Fetches package lists if there are none or they are old; says whether it did.
    fn ensure_lists(&self) -> Result<bool, AptError> {
        let age = fs::metadata(self.stamp())
            .and_then(|metadata| metadata.modified())
            .ok()
            .map(|time| time.elapsed());
        match age {
            Some(Ok(age)) if age < LISTS_AGE => Ok(false),
            // Old lists are better than none: what they name may still be there.
            Some(_) => Ok(self.update().is_ok()),
            None => self.update().map(|()| true),
        }
    }

    fn update(&self) -> Result<(), AptError> {
        self.configure()?;
        self.run("apt-get", ["update"])?;
        write(&self.stamp(), "")
    }

    /// Tells when the package lists were fetched.
    fn stamp(&self) -> PathBuf {
        self.dir.join("updated")
    }

    fn configuration(&self) -> PathBuf {
        self.dir.join("apt.conf")
    }

    /// Writes apt's configuration, and the list of packages that it takes for installed.
    fn configure(&self) -> Result<(), AptError> {
        let lists = self.dir.join("state/lists/partial");
        for dir in [&lists, &self.dir.join("cache"), &self.debs.join("partial")] {
            fs::create_dir_all(dir).map_err(|source| AptError::Write { path: dir.clone(), source })?;
        }
        let status = self.dir.join("status");
        write(&status, &assumed_status())?;
        let host = output(Command::new("apt-config").arg("dump"), "apt-config")?;
        let settings = [
            ("Dir::Etc::main", Path::new("/dev/null")),
            ("Dir::Etc::parts", Path::new("/dev/null")),
            ("Dir::State", &self.dir.join("state")),
            ("Dir::State::status", &status),
            ("Dir::Cache", &self.dir.join("cache")),
            ("Dir::Cache::archives", &self.debs),
            ("APT::Architecture", Path::new("amd64")),
            ("APT::Architectures", Path::new("amd64")),
            ("APT::Install-Recommends", Path::new("false")),
            ("APT::Sandbox::User", Path::new("")),
            ("Acquire::Languages", Path::new("none")),
            ("Debug::NoLocking", Path::new("true")),
        ];
        let own = settings.map(|(name, value)| format!("{name} \"{}\";\n", value.display())).concat();
        write(&self.configuration(), &(own + &download_settings(&host)))
    }

    fn run<A: AsRef<OsStr>>(
        &self,
        program: &'static str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<String, AptError> {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(&self.debs).env("APT_CONFIG", self.configuration());
        output(&mut command, program)
    }
}

fn write(path: &Path, content: &str) -> Result<(), AptError> {
    fs::write(path, content).map_err(|source| AptError::Write { path: path.into(), source })
}

/// Runs `command` and returns its standard output.
fn output(command: &mut Command, program: &'static str) -> Result<String, AptError> {
    let output = command.env("LC_ALL", "C").output().map_err(|source| AptError::Start { program, source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let arguments: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
    Err(AptError::Failed {
        command: format!("{program} {}", arguments.join(" ")),
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

/// The lines of `apt-config dump` that say how to download, less those about what to download.
fn download_settings(dump: &str) -> String {
    let other = ["Acquire::IndexTargets", "Acquire::Languages", "Acquire::Changelogs"];
    dump.lines()
        .filter(|line| line.starts_with("Acquire::") && !other.iter().any(|prefix| line.starts_with(prefix)))
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// A status file of dpkg in which [`ASSUMED_INSTALLED`] are installed, each newer than anything that others
/// ask for.
fn assumed_status() -> String {
    ASSUMED_INSTALLED
        .map(|package| {
            format!(
                "Package: {package}\nStatus: install ok installed\nArchitecture: amd64\n\
                 Multi-Arch: foreign\nVersion: 999:1\n\n"
            )
        })
        .concat()
}

/// Names and versions in the output of `apt-get install --simulate`.
fn parse_plan(output: &str) -> Vec<(String, String)> {
    output
        .lines()
        .filter_map(|line| {
            let (package, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
            Some((package.to_owned(), rest.split_whitespace().next()?.to_owned()))
        })
        .collect()
}

/// The records in the output of `apt-cache show`.
fn parse_records(output: &str) -> Vec<Record> {
    output
        .split("\n\n")
        .filter(|paragraph| !paragraph.trim().is_empty())
        .map(|paragraph| {
            let field = |name: &str| {
                let value = paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
                value.unwrap_or_default().to_owned()
            };
            Record {
                package: field("Package"),
                version: field("Version"),
                architecture: field("Architecture"),
                depends: field("Depends"),
                sha256: field("SHA256"),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_is_read() {
        let plan = "Reading package lists...\n\
            Inst libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64]) []\n\
            Inst zlib1g (1:1.2.13.dfsg-1 Debian:12.15/oldstable [amd64])\n\
            Conf libc6 (2.36-9+deb12u14 Debian:12.15/oldstable [amd64])\n";
        let expected = [("libc6", "2.36-9+deb12u14"), ("zlib1g", "1:1.2.13.dfsg-1")];
        assert_eq!(
            parse_plan(plan),
            expected.map(|(package, version)| (package.to_owned(), version.to_owned()))
        );
    }

    #[test]
    fn records_are_read() {
        let output = "Package: zlib1g\nArchitecture: amd64\nVersion: 1:1.2.13.dfsg-1\n\
            Depends: libc6 (>= 2.14)\n\
            Description: compression library\n runtime\nSHA256: d7dd\n\n\
            Package: zlib1g\nArchitecture: amd64\nVersion: 1:1.2.11\nSHA256: 00ff\n\n";
        let records = parse_records(output);
        assert_eq!(records.len(), 2);
        assert_eq!(records[0].depends, "libc6 (>= 2.14)");
        assert_eq!(records[0].sha256, "d7dd");
        assert_eq!(records[0].file_name(), "zlib1g_1%3a1.2.13.dfsg-1_amd64.deb");
        assert_eq!(
            records[1],
            Record {
                package: "zlib1g".into(),
                version: "1:1.2.11".into(),
                architecture: "amd64".into(),
                depends: String::new(),
                sha256: "00ff".into(),
            }
        );
    }

    #[test]
    fn only_download_settings_are_kept() {
        let dump = "APT::Update::Post-Invoke:: \"rm\";\nAcquire::http::Proxy \"http://proxy:3128\";\n\
            Acquire::IndexTargets::deb::DEP-11 \"\";\nAcquire::Languages \"en\";\n";
        assert_eq!(download_settings(dump), "Acquire::http::Proxy \"http://proxy:3128\";\n");
    }
}
