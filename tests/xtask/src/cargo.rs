//! Runs cargo, and finds what it has built.

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use cargo_metadata::{Metadata, MetadataCommand};
use serde::Deserialize;

/// Directories of the workspace, and of what cargo builds.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
}

/// Programs that were built.
#[derive(Debug)]
pub(crate) struct Executables(Vec<Executable>);

#[derive(Debug)]
struct Executable {
    name: String,
    path: PathBuf,
    /// True if it runs tests.
    is_test: bool,
}

/// One line of cargo's messages; only those about finished targets have these fields.
#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn find() -> Result<Self> {
        let metadata = metadata(&["--no-deps"])?;
        Ok(Self { root: metadata.workspace_root.into(), target: metadata.target_directory.into() })
    }
}

impl Executables {
    /// The programs of the workspace that run on a host or in a guest.
    pub(crate) fn programs() -> Result<Self> {
        let packages = ["--package=host-vmm", "--package=vmfork", "--package=vmfork-tests"];
        Self::build(&[&["build", "--release", "--bins"], packages.as_slice()].concat())
    }

    /// The test programs in `tests/tests`, such as `bare` and `guests`.
    pub(crate) fn tests() -> Result<Self> {
        Self::build(&["test", "--no-run", "--release", "--package=vmfork-tests", "--test=*"])
    }

    /// The test programs of all other packages.
    pub(crate) fn unit_tests() -> Result<Self> {
        Self::build(&["test", "--no-run", "--release", "--workspace", "--exclude=vmfork-tests", "--tests"])
    }

    /// One of the programs that run tests.
    pub(crate) fn first_test(&self) -> Option<&Path> {
        self.0.iter().find(|program| program.is_test).map(|program| program.path.as_path())
    }

    fn build(arguments: &[&str]) -> Result<Self> {
        Ok(Self::in_messages(&text(&[arguments, &["--message-format=json-render-diagnostics"]].concat())?))
    }

    fn in_messages(messages: &str) -> Self {
        let messages = messages.lines().filter_map(|line| serde_json::from_str::<Message>(line).ok());
        let executable = |message: Message| {
            let (name, is_test) = (message.target?.name, message.profile?.test);
            Some(Executable { name, path: message.executable?, is_test })
        };
        Self(messages.filter_map(executable).collect())
    }

    /// Path of the program `name`.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf> {
        let found = self.0.iter().find(|program| program.name == name);
        found
            .map(|program| program.path.clone())
            .with_context(|| format!("cargo has built no program {name}"))
    }
}

/// Runs cargo with its output shown.
pub(crate) fn run(arguments: &[&str]) -> Result<()> {
    run_with(arguments, &[])
}

/// Runs cargo with its output shown, and with more variables in its environment.
pub(crate) fn run_with(arguments: &[&str], variables: &[(&str, &OsStr)]) -> Result<()> {
    let status = command(arguments).envs(variables.iter().copied()).status().context("can't run cargo")?;
    if !status.success() {
        bail!("`cargo {}` failed: {status}", arguments.join(" "));
    }
    Ok(())
}

/// Description of the workspace, as `cargo metadata` prints it.
pub(crate) fn metadata(arguments: &[&str]) -> Result<Metadata> {
    let text = text(&[&["metadata", "--format-version=1"], arguments].concat())?;
    MetadataCommand::parse(text).context("can't read what `cargo metadata` printed")
}

/// Runs cargo with its messages shown, and returns what it prints.
pub(crate) fn text(arguments: &[&str]) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(arguments)?).into_owned())
}

/// Runs cargo with its messages shown, and returns its standard output.
fn output(arguments: &[&str]) -> Result<Vec<u8>> {
    let output = command(arguments).stderr(Stdio::inherit()).output().context("can't run cargo")?;
    if !output.status.success() {
        bail!("`cargo {}` failed: {}", arguments.join(" "), output.status);
    }
    Ok(output.stdout)
}

/// A cargo that knows nothing of this package.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    command.args(arguments);
    // What the cargo that runs this program says of this package. Build scripts of others watch the same
    // variables, and would be run again, and all that is above them, for each change between both cargos.
    for (name, _) in env::vars_os().filter(|(name, _)| is_of_package(name)) {
        command.env_remove(name);
    }
    command
}

fn is_of_package(name: &OsStr) -> bool {
    let prefixes = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_"];
    name.to_str().is_some_and(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cargo_that_is_run_knows_nothing_of_this_package() {
        assert!(env::var_os("CARGO_PKG_NAME").is_some());
        let command = command(&["build"]);
        let removed = command.get_envs().filter(|(_, value)| value.is_none());
        assert!(removed.map(|(name, _)| name).any(|name| name == "CARGO_PKG_NAME"));
        assert!(!is_of_package(OsStr::new("CARGO_TARGET_DIR")) && !is_of_package(OsStr::new("CARGO_HOME")));
    }

    #[test]
    fn executables_are_found_in_messages() {
        let messages = r#"
{"target":{"name":"vmfork","kind":["lib"]},"profile":{"test":false},"executable":null}
{"target":{"name":"vmfork","kind":["bin"]},"profile":{"test":false},"executable":"/target/release/vmfork"}
{"target":{"name":"bare","kind":["test"]},"profile":{"test":true},"executable":"/bare"}
{"reason":"build-finished","success":true}
not json
"#;
        let executables = Executables::in_messages(messages);
        assert_eq!(executables.path("vmfork").unwrap(), PathBuf::from("/target/release/vmfork"));
        assert!(executables.path("demo").is_err());
        assert_eq!(executables.first_test(), Some(Path::new("/bare")));
    }
}
