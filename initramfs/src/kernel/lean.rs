//! The lean guest kernel, with support for modules in Rust: built from Debian's sources with Debian's
//! compilers.
//!
//! A build takes minutes, so the cache keeps it, below `kernels/KEY`, where KEY stands for all that decides
//! what is built:
//!
//! - `kernel.json`: what it was built from. It is written last: without it, nothing else there counts.
//! - `vmlinuz`: the kernel.
//! - `tree/`: what is left of sources and objects, so that modules can be built.
//! - `modules/HASH/vmfork.ko`: the module, from sources with this hash.
//! - `build.log`: all that make has printed.
//!
//! Equal inputs give equal bytes, wherever the cache is.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::config::{self, Config};
use super::make::{self, Make};
use super::module::{self, NAME, Sources};
use super::tools::{self, Compiler, Tools};
use super::tree;
use crate::packages::{self, Deb, Packages};
use crate::{cache, hash};

/// Debian's package of the kernel's sources: the series is pinned here and nowhere else.
pub const SOURCE: &str = "linux-source-6.12";

/// Changes whenever this code builds something else from the same inputs.
const RECIPE: u32 = 1;

/// Tells what a directory of the cache was built from.
const DESCRIPTION: &str = "kernel.json";

/// Where the kernel's build leaves the kernel.
const BUILT: &str = "arch/x86/boot/bzImage";

/// Where it leaves what `uname -r` will say.
const RELEASE: &str = "include/config/kernel.release";

/// Why there is no lean kernel, or no module for it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sources could not be had.
    #[error("can't get the kernel's sources")]
    Packages(#[from] packages::Error),
    /// The package is not built as Debian's packages of kernel sources are.
    #[error("{SOURCE} {version} has no {}", tarball.display())]
    Layout {
        /// Version of the package.
        version: String,
        /// What should be in it.
        tarball: PathBuf,
    },
    /// bindgen could not be had.
    #[error("can't get the tools to build a kernel with")]
    Tools(#[from] tools::Error),
    /// The kernel's sources could not be unpacked, or not be cut down.
    #[error("can't make the kernel's tree")]
    Tree(#[from] tree::Error),
    /// The kernel can't be configured as it was asked for.
    #[error("can't configure the kernel")]
    Config(#[from] config::Error),
    /// The kernel or the module could not be built.
    #[error("can't build the kernel or its module")]
    Make(#[from] make::Error),
    /// The module's sources could not be had.
    #[error("can't prepare the module")]
    Sources(#[from] module::Error),
    /// The cache could not be read or written.
    #[error("can't use {} as cache of kernels", path.display())]
    Cache {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A second build made something else.
    #[error("not reproducible: {} and {} differ", first.display(), second.display())]
    Differs {
        /// What was built first.
        first: PathBuf,
        /// What was built then, and is kept until the next build.
        second: PathBuf,
    },
}

/// Which kernel is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// As small and fast as guests allow.
    Lean,
    /// The same with checks of locks, memory and the like, and with VMGENID as a module.
    Debug,
}

impl Variant {
    /// What it is built with.
    pub fn compiler(self) -> Compiler {
        match self {
            Self::Lean => Compiler::Gcc,
            // 6.12 has either KASAN or Rust with GCC ("RUST depends on !KASAN || CC_IS_CLANG").
            Self::Debug => Compiler::Clang,
        }
    }

    fn config(self) -> Result<Config, config::Error> {
        let lean = Config::parse(include_str!("lean.config"))?;
        Ok(match self {
            Self::Lean => lean,
            Self::Debug => lean.with(Config::parse(include_str!("debug.config"))?),
        })
    }
}

/// A package of kernel sources.
#[derive(Debug, Clone)]
pub struct Source {
    deb: Deb,
    tarball: PathBuf,
}

impl Source {
    /// Downloads the newest of the pinned series.
    ///
    /// # Errors
    ///
    /// [`Error::Packages`] or [`Error::Layout`].
    pub fn fetch(packages: &Packages) -> Result<Self, Error> {
        let deb = packages.alone(SOURCE)?;
        let tarball = packages.unpack(&deb)?.join(format!("usr/src/{SOURCE}.tar.xz"));
        if !tarball.is_file() {
            return Err(Error::Layout { version: deb.version, tarball });
        }
        Ok(Self { deb, tarball })
    }
}

/// A kernel that was built.
#[derive(Debug, Clone)]
pub struct Lean {
    /// The package of its sources.
    pub source: Deb,
    /// The kernel's own name for its version, as `uname -r` gives it.
    pub release: String,
    /// The bootable image.
    pub vmlinuz: PathBuf,
    /// Its directory in the cache.
    dir: PathBuf,
}

/// Content of [`DESCRIPTION`].
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    release: String,
    vmlinuz_sha256: String,
    inputs: Inputs,
}

/// All that decides what is built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Inputs {
    recipe: u32,
    source: Deb,
    tools: BTreeMap<String, String>,
    /// Options that are not as `allnoconfig` has them.
    configuration: String,
}

/// How kernels of one variant are built.
#[derive(Debug)]
pub struct Recipe {
    cache: PathBuf,
    tarball: PathBuf,
    tools: Tools,
    config: Config,
    inputs: Inputs,
}

impl Recipe {
    /// To build from `source` with `tools`, in the directory `cache`.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] or [`Error::Cache`].
    pub fn new(cache: &Path, source: Source, tools: Tools, variant: Variant) -> Result<Self, Error> {
        let in_cache = |source| Error::Cache { path: cache.into(), source };
        fs::create_dir_all(cache).map_err(in_cache)?;
        // Paths are mapped away by what they begin with.
        let cache = fs::canonicalize(cache).map_err(in_cache)?;
        let config = variant.config()?;
        let inputs = Inputs {
            recipe: RECIPE,
            source: source.deb,
            tools: tools.versions.clone(),
            configuration: config.to_string(),
        };
        Ok(Self { cache, tarball: source.tarball, tools, config, inputs })
    }

    /// The kernel from the cache, where it is built if it isn't there.
    ///
    /// # Errors
    ///
    /// An [`Error`] where it can't be built.
    pub fn kernel(&self) -> Result<Lean, Error> {
        let kernels = self.kernels();
        let dir = kernels.join(&hash::of_bytes(format!("{:?}", self.inputs).as_bytes())[..16]);
        if let Some(known) = self.known(&dir) {
            return Ok(known);
        }
        let _lock = cache::lock(&kernels).map_err(in_cache(&kernels))?;
        if let Some(known) = self.known(&dir) {
            return Ok(known);
        }
        remove_unfinished(&kernels).map_err(in_cache(&kernels))?;
        // Complete, but described as another version of this code did.
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(in_cache(&dir))?;
        }
        let kernel = self.build(&dir)?;
        tree::prune(&tree_in(&dir))?;
        let description = Description {
            release: kernel.release.clone(),
            vmlinuz_sha256: hash::of_file(&kernel.vmlinuz).map_err(in_cache(&kernel.vmlinuz))?,
            inputs: self.inputs.clone(),
        };
        cache::write_json(&dir, DESCRIPTION, &description).map_err(in_cache(&dir))?;
        Ok(kernel)
    }

    /// The module from these sources for `kernel`, from the cache, where it is built if it isn't there.
    ///
    /// # Errors
    ///
    /// An [`Error`] where it can't be built.
    pub fn module(&self, kernel: &Lean, sources: &Sources) -> Result<PathBuf, Error> {
        let dir = kernel.dir.join("modules").join(&sources.hash()[..16]);
        let module = dir.join(format!("{NAME}.ko"));
        if module.is_file() {
            return Ok(module);
        }
        let _lock = cache::lock(&dir).map_err(in_cache(&dir))?;
        if !module.is_file() {
            let new = tempfile::tempdir_in(&dir).map_err(in_cache(&dir))?;
            let built = self.build_module(&kernel.dir, new.path(), sources)?;
            fs::rename(built, &module).map_err(in_cache(&module))?;
        }
        Ok(module)
    }

    /// Builds `kernel` and `module` again, elsewhere, and compares them byte by byte.
    ///
    /// # Errors
    ///
    /// [`Error::Differs`] where they are not the same, another where they can't be built.
    pub fn verify(&self, kernel: &Lean, module: Option<(&Path, &Sources)>) -> Result<(), Error> {
        let kernels = self.kernels();
        let _lock = cache::lock(&kernels).map_err(in_cache(&kernels))?;
        let second =
            tempfile::Builder::new().prefix("again-").tempdir_in(&kernels).map_err(in_cache(&kernels))?;
        let mut pairs = vec![(kernel.vmlinuz.clone(), self.build(second.path())?.vmlinuz)];
        if let Some((module, sources)) = module {
            tree::prune(&tree_in(second.path()))?;
            let dir = second.path().join("module");
            pairs.push((module.into(), self.build_module(second.path(), &dir, sources)?));
        }
        for (first, again) in pairs {
            let read = |path: &Path| fs::read(path).map_err(in_cache(path));
            if read(&first)? != read(&again)? {
                // Its path stays valid.
                drop(second.keep());
                return Err(Error::Differs { first, second: again });
            }
        }
        Ok(())
    }

    fn kernels(&self) -> PathBuf {
        self.cache.join("kernels")
    }

    /// What stands complete in `dir`.
    fn known(&self, dir: &Path) -> Option<Lean> {
        let known: Description = cache::read_json(&dir.join(DESCRIPTION))?;
        (known.inputs == self.inputs).then(|| self.lean(dir, known.release))
    }

    fn lean(&self, dir: &Path, release: String) -> Lean {
        Lean { source: self.inputs.source.clone(), release, vmlinuz: dir.join("vmlinuz"), dir: dir.into() }
    }

    /// Builds the kernel in `dir`.
    fn build(&self, dir: &Path) -> Result<Lean, Error> {
        let tree = tree_in(dir);
        fs::create_dir_all(&tree).map_err(in_cache(&tree))?;
        tree::unpack(&self.tarball, &tree)?;
        let bindgen = tools::bindgen(&self.cache)?;
        let make = Make { tree: &tree, log: &dir.join("build.log"), tools: &self.tools, bindgen: &bindgen };
        // It says why, where this can't be; a configuration only leaves support for Rust out then.
        make.run(&["rustavailable"], None)?;
        let fragment = dir.join("fragment.config");
        fs::write(&fragment, self.config.to_string()).map_err(in_cache(&fragment))?;
        make.run(&[&format!("KCONFIG_ALLCONFIG={}", fragment.display()), "allnoconfig"], None)?;
        let read = |path: PathBuf| fs::read_to_string(&path).map_err(in_cache(&path));
        self.config.check(&Config::parse(&read(tree.join(".config"))?)?)?;
        make.run(&["bzImage", "modules"], None)?;
        let kernel = self.lean(dir, read(tree.join(RELEASE))?.trim().to_owned());
        fs::rename(tree.join(BUILT), &kernel.vmlinuz).map_err(in_cache(&kernel.vmlinuz))?;
        Ok(kernel)
    }

    /// Builds the module for the kernel in `kernel`, in the directory `dir`.
    fn build_module(&self, kernel: &Path, dir: &Path, sources: &Sources) -> Result<PathBuf, Error> {
        sources.write(dir)?;
        let bindgen = tools::bindgen(&self.cache)?;
        let make = Make {
            tree: &tree_in(kernel),
            log: &dir.join("build.log"),
            tools: &self.tools,
            bindgen: &bindgen,
        };
        make.run(&[&format!("M={}", dir.display()), "modules"], Some(dir))?;
        Ok(dir.join(format!("{NAME}.ko")))
    }
}

/// Removes what builds have left in `kernels` that did not come to their end. Who calls it holds the lock, so
/// that none is under way.
fn remove_unfinished(kernels: &Path) -> io::Result<()> {
    for entry in fs::read_dir(kernels)? {
        let path = entry?.path();
        if path.is_dir() && !path.join(DESCRIPTION).is_file() {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

fn tree_in(dir: &Path) -> PathBuf {
    dir.join("tree")
}

fn in_cache(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Cache { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unfinished_builds_are_removed() {
        let kernels = tempfile::tempdir().unwrap();
        for dir in ["complete", "unfinished/tree"] {
            fs::create_dir_all(kernels.path().join(dir)).unwrap();
        }
        fs::write(kernels.path().join("complete").join(DESCRIPTION), "{}").unwrap();
        fs::write(kernels.path().join("lock"), "").unwrap();
        remove_unfinished(kernels.path()).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(kernels.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["complete", "lock"]);
    }

    #[test]
    fn debug_kernel_checks_more_and_has_vmgenid_as_a_module() {
        let [lean, debug] =
            [Variant::Lean, Variant::Debug].map(|variant| variant.config().unwrap().to_string());
        for option in ["CONFIG_RUST=y", "CONFIG_STRICT_DEVMEM=y", "# CONFIG_MODVERSIONS is not set"] {
            assert!(
                lean.lines().any(|line| line == option) && debug.lines().any(|line| line == option),
                "{option}"
            );
        }
        assert!(lean.contains("CONFIG_VMGENID=y\n") && debug.contains("CONFIG_VMGENID=m\n"));
        assert!(!lean.contains("CONFIG_PROVE_LOCKING") && debug.contains("CONFIG_PROVE_LOCKING=y\n"));
    }
}
