//! The C interface, declared in include/vmfork.h.

mod code;

use std::ffi::{CStr, c_char, c_int};
use std::sync::OnceLock;
use std::time::Duration;

use vmfork_abi::{NAME_BYTES, PLATFORM_BYTES, VM_TYPE_BYTES};

use self::code::{EINVAL, EPROTOCOL, OK, detect_code, fork_code, generation_code, open_code, text};
use crate::{Fork, ForkCopy, ForkRequest, GenerationPage, Vmm};

/// `struct vmfork_fork_t`; texts end with a NUL.
#[repr(C)]
struct CFork {
    role: u32,
    index: u32,
    count: u32,
    generation: u32,
    vm_id: [u8; 16],
    parent_id: [u8; 16],
    name: [u8; NAME_BYTES + 1],
    vm_type: [u8; VM_TYPE_BYTES + 1],
}

/// `struct vmfork_copy_t`; texts end with a NUL.
#[repr(C)]
struct CCopy {
    vm_id: [u8; 16],
    index: u32,
    placement: u32,
    platform: [u8; PLATFORM_BYTES + 1],
}

/// `vmfork_detect` of the header.
#[unsafe(no_mangle)]
extern "C" fn vmfork_detect() -> c_int {
    match Vmm::detect() {
        Ok(_) => OK,
        Err(error) => detect_code(error),
    }
}

/// `vmfork_fork` of the header.
///
/// # Safety
///
/// `vm_type` is NULL or a NUL-terminated string, and `out` is NULL or points to memory for one
/// `vmfork_fork_t`.
#[unsafe(no_mangle)]
unsafe extern "C" fn vmfork_fork(vm_type: *const c_char, count: u32, out: *mut CFork) -> c_int {
    // SAFETY: the caller promises the same.
    unsafe { fork(vm_type, count, None, out) }
}

/// `vmfork_fork_within` of the header.
///
/// # Safety
///
/// As for [`vmfork_fork`].
#[unsafe(no_mangle)]
unsafe extern "C" fn vmfork_fork_within(
    vm_type: *const c_char,
    count: u32,
    timeout_ms: u64,
    out: *mut CFork,
) -> c_int {
    // SAFETY: the caller promises the same.
    unsafe { fork(vm_type, count, Some(Duration::from_millis(timeout_ms)), out) }
}

/// Forks, with a timeout or without.
///
/// # Safety
///
/// As for [`vmfork_fork`].
unsafe fn fork(vm_type: *const c_char, count: u32, timeout: Option<Duration>, out: *mut CFork) -> c_int {
    if vm_type.is_null() || out.is_null() {
        return EINVAL;
    }
    // SAFETY: it is not NULL, so by the caller's promise it is a NUL-terminated string, which outlives this
    // call.
    let vm_type = unsafe { CStr::from_ptr(vm_type) };
    let Some(request) = vm_type.to_str().ok().and_then(|vm_type| ForkRequest::new(vm_type, count).ok())
    else {
        return EINVAL;
    };
    match crate::fork(&timeout.map_or(request, |timeout| request.with_timeout(timeout))) {
        Ok(fork) => {
            // SAFETY: it is not NULL, so by the caller's promise it points to memory for one.
            unsafe { out.write(CFork::from(&fork)) };
            OK
        }
        Err(error) => fork_code(&error),
    }
}

/// `vmfork_copies` of the header.
///
/// # Safety
///
/// `out` points to memory for `capacity` `vmfork_copy_t`s; it may be NULL where that is 0.
#[unsafe(no_mangle)]
unsafe extern "C" fn vmfork_copies(out: *mut CCopy, capacity: u32) -> c_int {
    if out.is_null() && capacity > 0 {
        return EINVAL;
    }
    let status = match Vmm::open() {
        Ok(vmm) => vmm.status(),
        Err(error) => return open_code(&error),
    };
    let Ok(Fork { copies, .. }) = status else { return EPROTOCOL };
    for (number, copy) in copies.iter().take(capacity as usize).enumerate() {
        // SAFETY: it is one of the first `capacity`, and by the caller's promise there is memory for these.
        unsafe { out.wrapping_add(number).write(CCopy::from(copy)) };
    }
    c_int::try_from(copies.len()).unwrap_or(c_int::MAX)
}

/// `vmfork_generation_map` of the header.
///
/// # Safety
///
/// `out` is NULL or points to memory for one pointer.
#[unsafe(no_mangle)]
unsafe extern "C" fn vmfork_generation_map(out: *mut *const u64) -> c_int {
    /// Mapped by the first caller, and never unmapped.
    static PAGE: OnceLock<GenerationPage> = OnceLock::new();
    if out.is_null() {
        return EINVAL;
    }
    // Of several first callers, all but one drop theirs again.
    let page = PAGE.get().map_or_else(|| GenerationPage::map().map(|page| PAGE.get_or_init(|| page)), Ok);
    match page {
        Ok(page) => {
            // SAFETY: it is not NULL, so by the caller's promise it points to memory for one.
            unsafe { out.write(page.address()) };
            OK
        }
        Err(error) => generation_code(&error),
    }
}

/// `vmfork_strerror` of the header.
#[unsafe(no_mangle)]
extern "C" fn vmfork_strerror(code: c_int) -> *const c_char {
    text(code).as_ptr()
}

impl From<&Fork> for CFork {
    fn from(fork: &Fork) -> Self {
        Self {
            role: fork.role.number(),
            index: fork.index,
            count: fork.count,
            generation: fork.generation,
            vm_id: fork.vm_id.into_bytes(),
            parent_id: fork.parent_id.unwrap_or_default().into_bytes(),
            name: terminated(&fork.name),
            vm_type: terminated(&fork.vm_type),
        }
    }
}

impl From<&ForkCopy> for CCopy {
    fn from(copy: &ForkCopy) -> Self {
        Self {
            vm_id: copy.vm_id.into_bytes(),
            index: copy.index,
            placement: copy.placement.number(),
            platform: terminated(&copy.platform),
        }
    }
}

/// `text` in a field of `N` bytes with at least one NUL behind it; a longer one, which the page can't hold,
/// is cut off.
fn terminated<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    for (to, from) in field.iter_mut().take(N.saturating_sub(1)).zip(text.bytes()) {
        *to = from;
    }
    field
}

#[cfg(test)]
mod tests {
    use std::fmt::{Display, Write as _};
    use std::io::Write as _;
    use std::mem::offset_of;
    use std::process::{Command, Stdio};

    use super::code::{
        EACCESS, ECHILD, ECOPIED, EDEADLINE, EINTERRUPTED, ENOANSWER, ENOVMM, EPARENT, EVERSION,
    };
    use super::*;
    use crate::outcome::tests::{child, copies, of, with_copies};
    use crate::{ErrorCode, ForkError, Location, Role};

    /// A C program whose compilation checks the header against this module.
    fn assertions() -> String {
        let mut source = String::from("#include \"vmfork.h\"\n#include <stddef.h>\n");
        let mut equal = |c: &str, rust: &dyn Display| {
            writeln!(source, "_Static_assert({c} == {rust}, \"{c}\");").unwrap()
        };
        equal("sizeof(struct vmfork_fork_t)", &size_of::<CFork>());
        for (field, offset) in [
            ("role", offset_of!(CFork, role)),
            ("index", offset_of!(CFork, index)),
            ("count", offset_of!(CFork, count)),
            ("generation", offset_of!(CFork, generation)),
            ("vm_id", offset_of!(CFork, vm_id)),
            ("parent_id", offset_of!(CFork, parent_id)),
            ("name", offset_of!(CFork, name)),
            ("vm_type", offset_of!(CFork, vm_type)),
        ] {
            equal(&format!("offsetof(struct vmfork_fork_t, {field})"), &offset);
        }
        equal("sizeof(struct vmfork_copy_t)", &size_of::<CCopy>());
        for (field, offset) in [
            ("vm_id", offset_of!(CCopy, vm_id)),
            ("index", offset_of!(CCopy, index)),
            ("placement", offset_of!(CCopy, placement)),
            ("platform", offset_of!(CCopy, platform)),
        ] {
            equal(&format!("offsetof(struct vmfork_copy_t, {field})"), &offset);
        }
        for (name, code) in [
            ("OK", OK),
            ("EINVAL", EINVAL),
            ("ENOVMM", ENOVMM),
            ("EVERSION", EVERSION),
            ("EACCESS", EACCESS),
            ("ENOANSWER", ENOANSWER),
            ("EPROTOCOL", EPROTOCOL),
            ("EPARENT", EPARENT),
            ("ECHILD", ECHILD),
            ("ECOPIED", ECOPIED),
            ("EDEADLINE", EDEADLINE),
            ("EINTERRUPTED", EINTERRUPTED),
        ] {
            equal(&format!("VMFORK_{name}"), &code);
        }
        for code in ErrorCode::ALL.iter().filter(|&&code| code != ErrorCode::None) {
            let name = format!("VMFORK_REFUSED(VMFORK_REFUSED{})", screaming(&format!("{code:?}")));
            equal(&name, &fork_code(&ForkError::Refused(*code)));
        }
        equal("VMFORK_PARENT", &Role::Parent.number());
        equal("VMFORK_CHILD", &Role::Child.number());
        equal("VMFORK_LOCAL", &Location::Local.number());
        equal("VMFORK_REMOTE", &Location::Remote.number());
        equal("VMFORK_MAX_CHILDREN", &vmfork_abi::MAX_CHILDREN);
        source
    }

    /// `_UNKNOWN_COMMAND` of `UnknownCommand`.
    fn screaming(name: &str) -> String {
        let word_start = |c: char| c.is_ascii_uppercase().then_some('_');
        name.chars().flat_map(|c| word_start(c).into_iter().chain([c.to_ascii_uppercase()])).collect()
    }

    #[test]
    fn the_header_says_what_the_library_does() {
        let mut compiler = Command::new("cc")
            .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x", "c", "-"])
            .arg(concat!("-I", env!("CARGO_MANIFEST_DIR"), "/include"))
            .stdin(Stdio::piped())
            .spawn()
            .expect("cc, which links these tests too");
        compiler.stdin.take().unwrap().write_all(assertions().as_bytes()).unwrap();
        assert!(compiler.wait().unwrap().success());
    }

    #[test]
    fn a_fork_crosses_whole() {
        let fork = CFork::from(&Fork::after_fork(&of(child())).unwrap());
        assert_eq!((fork.role, fork.index, fork.count, fork.generation), (2, 2, 4, 1));
        assert_eq!((fork.vm_id, fork.parent_id), ([0x11; 16], [0x22; 16]));
        assert_eq!(CStr::from_bytes_until_nul(&fork.name).unwrap(), c"web.2");
        assert_eq!(CStr::from_bytes_until_nul(&fork.vm_type).unwrap(), c"web");
        assert_eq!(terminated::<4>("12345"), *b"123\0");
    }

    #[test]
    fn a_copy_crosses_whole() {
        let copy = CCopy::from(&Fork::after_fork(&with_copies(copies())).unwrap().copies[1]);
        assert_eq!((copy.index, copy.placement, copy.vm_id), (2, 2, [0x33; 16]));
        assert_eq!(CStr::from_bytes_until_nul(&copy.platform).unwrap(), c"b");
    }

    #[test]
    fn bad_arguments_are_told_apart_from_a_missing_vmm() {
        let mut out = CFork::from(&Fork::after_fork(&of(child())).unwrap());
        let mut call = |vm_type: *const c_char, count| {
            // SAFETY: NULL or a literal with its NUL, and memory for one outcome.
            unsafe { vmfork_fork(vm_type, count, &raw mut out) }
        };
        assert_eq!(call(std::ptr::null(), 1), EINVAL);
        assert_eq!(call(c"Web".as_ptr(), 1), EINVAL);
        assert_eq!(call(c"web".as_ptr(), 0), EINVAL);
        // SAFETY: a literal with its NUL, and NULL.
        assert_eq!(unsafe { vmfork_fork(c"web".as_ptr(), 1, std::ptr::null_mut()) }, EINVAL);
        // SAFETY: memory for no copy, where there is none to write.
        assert_eq!(unsafe { vmfork_copies(std::ptr::null_mut(), 1) }, EINVAL);
        // SAFETY: a literal with its NUL, and NULL.
        assert_eq!(unsafe { vmfork_fork_within(c"web".as_ptr(), 1, 1, std::ptr::null_mut()) }, EINVAL);
        // SAFETY: NULL.
        assert_eq!(unsafe { vmfork_generation_map(std::ptr::null_mut()) }, EINVAL);
    }
}
