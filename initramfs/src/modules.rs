//! Kernel modules: what a module depends on, read from the modules themselves.
//!
//! Debian's packages carry no `modules.dep`; depmod writes it when a package is installed. Each module names
//! its dependencies in its section `.modinfo`, as `depends=a,b`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use crate::kernel::Kernel;

/// Why a module is of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory could not be read, or not be decompressed.
    #[error("can't read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A module file is no kernel module.
    #[error("{} is not a kernel module: it has no section .modinfo", path.display())]
    NoModule {
        /// The file.
        path: PathBuf,
    },
    /// The kernel has no such module.
    #[error("kernel {release} has no module {name}")]
    Missing {
        /// The kernel.
        release: String,
        /// The module.
        name: String,
    },
}

/// A kernel module, ready to be loaded.
#[derive(Debug, Clone)]
pub struct Module {
    /// Its path in an image below `/lib/modules/RELEASE`, without any suffix of a compression.
    pub path: String,
    /// Its bytes, decompressed.
    pub bytes: Vec<u8>,
    /// Names of the modules that it needs directly.
    pub depends: Vec<String>,
}

/// The modules `names` and all that they need, each after those that it needs. Built-in modules are left out.
///
/// # Errors
///
/// An [`Error`] where a module is missing or can't be read.
pub fn closure(kernel: &Kernel, names: &[&str]) -> Result<Vec<Module>, Error> {
    let mut files = BTreeMap::new();
    find_modules(&kernel.modules.join("kernel"), &mut files)?;
    let built_in = fs::read_to_string(kernel.modules.join("modules.builtin")).unwrap_or_default();
    let mut order = Vec::new();
    let mut collector =
        Collector { kernel, files, built_in: built_in.lines().map(module_name).collect(), seen: Vec::new() };
    for name in names {
        collector.add(&module_name(name), &mut order)?;
    }
    Ok(order)
}

/// Content of the file `modules.dep` for `modules`, which are in the order of [`closure`].
pub fn modules_dep(modules: &[Module]) -> String {
    let mut lines = String::new();
    for (index, module) in modules.iter().enumerate() {
        lines += &format!("{}:", module.path);
        let mut wanted: Vec<&String> = module.depends.iter().collect();
        // A module stands after those that it needs: going back, each is wanted before it is met.
        for needed in modules[..index].iter().rev() {
            if wanted.contains(&&module_name(&needed.path)) {
                wanted.extend(&needed.depends);
                lines += &format!(" {}", needed.path);
            }
        }
        lines.push('\n');
    }
    lines
}

struct Collector<'a> {
    kernel: &'a Kernel,
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
    seen: Vec<String>,
}

impl Collector<'_> {
    fn add(&mut self, name: &str, order: &mut Vec<Module>) -> Result<(), Error> {
        if self.built_in.iter().chain(&self.seen).any(|known| known == name) {
            return Ok(());
        }
        self.seen.push(name.to_owned());
        let missing = || Error::Missing { release: self.kernel.release.clone(), name: name.to_owned() };
        let path = self.files.get(name).ok_or_else(missing)?;
        let bytes = read_module(path)?;
        let depends = depends(&bytes).ok_or_else(|| Error::NoModule { path: path.clone() })?;
        let path = path.strip_prefix(&self.kernel.modules).unwrap_or(path).to_string_lossy();
        let path = path.trim_end_matches(".xz").to_owned();
        for needed in &depends {
            self.add(needed, order)?;
        }
        order.push(Module { path, bytes, depends });
        Ok(())
    }
}

/// Enters all module files below `dir` by the names of their modules.
fn find_modules(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), Error> {
    let failed = |source| Error::Read { path: dir.into(), source };
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            find_modules(&path, files)?;
        } else {
            files.insert(module_name(&path.to_string_lossy()), path);
        }
    }
    Ok(())
}

/// The kernel's name for the module in a file: `kernel/arch/x86/kvm/kvm-amd.ko.xz` holds `kvm_amd`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn read_module(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read { path: path.into(), source };
    let file = BufReader::new(File::open(path).map_err(failed)?);
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|extension| extension == "xz") {
        lzma_rust2::XzReader::new(file, false).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        let mut file = file;
        file.read_to_end(&mut bytes).map_err(failed)?;
    }
    Ok(bytes)
}

/// What a module says that it depends on; nothing if it isn't a module.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    let elf = object::File::parse(module).ok()?;
    let modinfo = elf.section_by_name(".modinfo")?.data().ok()?;
    Some(parse_depends(modinfo))
}

/// The value of `depends` in the NUL-terminated strings of a section `.modinfo`.
fn parse_depends(modinfo: &[u8]) -> Vec<String> {
    let mut fields = modinfo.split(|byte| *byte == 0);
    let value = fields.find_map(|field| field.strip_prefix(b"depends=")).unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_kernels() {
        assert_eq!(module_name("kernel/arch/x86/kvm/kvm-amd.ko.xz"), "kvm_amd");
        assert_eq!(module_name("kernel/virt/lib/irqbypass.ko"), "irqbypass");
        assert_eq!(module_name("kvm-amd"), "kvm_amd");
    }

    #[test]
    fn dependencies_are_read() {
        assert_eq!(
            parse_depends(b"license=GPL\0depends=kvm,irqbypass\0name=kvm_amd\0"),
            ["kvm", "irqbypass"]
        );
        assert!(parse_depends(b"license=GPL\0depends=\0").is_empty());
        assert!(parse_depends(b"license=GPL\0").is_empty());
    }

    #[test]
    fn dep_file_names_all_dependencies_the_nearest_first() {
        let module = |path: &str, depends: &[&str]| Module {
            path: path.into(),
            bytes: Vec::new(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
        };
        let modules = [
            module("kernel/irqbypass.ko", &[]),
            module("kernel/other.ko", &[]),
            module("kernel/kvm.ko", &["irqbypass", "built_in"]),
            module("kernel/kvm-amd.ko", &["kvm"]),
        ];
        let lines = "kernel/irqbypass.ko:\nkernel/other.ko:\nkernel/kvm.ko: kernel/irqbypass.ko\n\
            kernel/kvm-amd.ko: kernel/kvm.ko kernel/irqbypass.ko\n";
        assert_eq!(modules_dep(&modules), lines);
    }

    #[test]
    fn other_files_are_no_modules() {
        assert_eq!(depends(b"#!/bin/sh"), None);
    }
}
