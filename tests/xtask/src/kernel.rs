//! `cargo xtask kernel`: the lean guest kernel, and the kernel module for it.

use std::path::PathBuf;

use anyhow::Result;
use initramfs::kernel::lean::{Lean, Recipe, Source, Variant};
use initramfs::kernel::module::Sources;
use initramfs::packages::Packages;

use crate::cargo::Workspace;
use crate::cli::{self, Which};
use crate::setup;
use crate::steps::Steps;

/// A lean kernel and what belongs to it.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) lean: Lean,
    /// The module; none where its sources are missing.
    pub(crate) module: Option<PathBuf>,
}

/// Builds kernel and module, and prints where they are.
pub(crate) fn command(steps: &mut Steps, arguments: &cli::Kernel) -> Result<u8> {
    let workspace = Workspace::find()?;
    let variant = if arguments.debug { Variant::Debug } else { Variant::Lean };
    let builder = Builder::new(steps, &workspace, variant)?;
    let kernel = builder.build(steps)?;
    if arguments.verify {
        let module = kernel.module.as_deref().zip(builder.sources.as_ref());
        steps.quiet("second build", || Ok(builder.recipe.verify(&kernel.lean, module)?))?;
    }
    println!("{}", kernel.lean.vmlinuz.display());
    match &kernel.module {
        Some(module) => println!("{}", module.display()),
        None => eprintln!(
            "xtask: there is no module to build: no {}",
            module_dir(&workspace).join("Kbuild").display()
        ),
    }
    Ok(0)
}

/// The lean kernel and its module, from the cache or new, where they are asked for.
pub(crate) fn wanted(steps: &mut Steps, workspace: &Workspace, which: Which) -> Result<Option<Kernel>> {
    let variant = match which {
        Which::Debian => return Ok(None),
        Which::Lean => Variant::Lean,
        Which::Debug => Variant::Debug,
    };
    Builder::new(steps, workspace, variant)?.build(steps).map(Some)
}

/// [Kernel and module](wanted) for tests, which count as skipped where this machine lacks what it takes, and
/// it can't be installed.
pub(crate) fn for_tests(steps: &mut Steps, workspace: &Workspace, debug: bool) -> Option<Kernel> {
    let variant = if debug { Variant::Debug } else { Variant::Lean };
    let name = "tests of the kernel module";
    let new = |steps: &mut Steps| Builder::new(steps, workspace, variant);
    // What can be built here must be.
    let is_root = steps.parts(name, |_| setup::is_root())?;
    let builder = if is_root { steps.parts(name, new)? } else { steps.parts_if_possible(name, new)? };
    steps.parts(name, |steps| builder.build(steps))
}

/// Everything that a build takes.
struct Builder {
    recipe: Recipe,
    sources: Option<Sources>,
}

impl Builder {
    fn new(steps: &mut Steps, workspace: &Workspace, variant: Variant) -> Result<Self> {
        let cache = workspace.target.join("vmfork-cache");
        let tools = steps.quiet("setup of the kernel's tools", || setup::kernel_tools(variant.compiler()))?;
        let source = steps.quiet("kernel sources", || Ok(Source::fetch(&Packages::open(&cache)?)?))?;
        let recipe = Recipe::new(&cache, source, tools, variant)?;
        let sources = Sources::read(&module_dir(workspace), &workspace.root.join("guest-agent/abi/src"))?;
        Ok(Self { recipe, sources })
    }

    fn build(&self, steps: &mut Steps) -> Result<Kernel> {
        let lean = steps.quiet("kernel", || Ok(self.recipe.kernel()?))?;
        let build = |sources| steps.quiet("kernel module", || Ok(self.recipe.module(&lean, sources)?));
        let module = self.sources.as_ref().map(build).transpose()?;
        Ok(Kernel { lean, module })
    }
}

fn module_dir(workspace: &Workspace) -> PathBuf {
    workspace.root.join("guest-kmod-rs")
}
