// SPDX-License-Identifier: GPL-2.0

//! Calls from the VFS: each takes its raw arguments apart, and goes on in safe code.

use core::mem::MaybeUninit;

use kernel::{
    c_str,
    error::from_result,
    ffi::{c_char, c_int, c_long, c_uint, c_ulong},
    prelude::*,
};
use vmfork_abi::{device::Notice, PAGE_BYTES};

use crate::{
    bindings,
    device::{Device, SeenForks},
    ioctl,
};

/// Permissions before anyone changes them: root's alone.
const MODE: u16 = 0o600;

/// An open file.
struct Client {
    device: &'static Device,
    seen_forks: SeenForks,
}

impl Client {
    fn new(device: &'static Device) -> Self {
        device.job_slot().opened();
        Self {
            device,
            seen_forks: device.seen_forks(),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.device.job_slot().closed();
    }
}

/// What can be done with a file. Programs of 32 bits have the same structs.
struct Operations(bindings::file_operations);

// SAFETY: It does not change.
unsafe impl Sync for Operations {}

static OPERATIONS: Operations = Operations(bindings::file_operations {
    owner: crate::THIS_MODULE.as_ptr().cast(),
    open: Some(open),
    release: Some(release),
    read: Some(read),
    poll: Some(poll),
    unlocked_ioctl: Some(control),
    compat_ioctl: Some(control),
    mmap: Some(mmap),
    // SAFETY: Zeros are no operations.
    ..unsafe { MaybeUninit::zeroed().assume_init() }
});

/// The miscellaneous device.
pub(crate) fn misc_device() -> bindings::miscdevice {
    bindings::miscdevice {
        minor: bindings::VMFORK_DYNAMIC_MINOR,
        name: c_str!("vmfork").as_char_ptr(),
        fops: &OPERATIONS.0,
        mode: MODE,
        ..Default::default()
    }
}

/// # Safety
///
/// Called by the VFS as `open`.
unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    from_result(|| {
        // SAFETY: `misc_open` has put the device there, and the file keeps the module, and so the
        // device, until `release`.
        let device: &'static Device = unsafe { Device::from_misc((*file).private_data.cast()) };
        let client = KBox::new(Client::new(device), GFP_KERNEL)?;
        // SAFETY: The file is the caller's until this returns.
        unsafe { (*file).private_data = KBox::into_raw(client).cast() };
        // SAFETY: As above. It can't fail.
        unsafe { bindings::nonseekable_open(inode, file) };
        Ok(0)
    })
}

/// # Safety
///
/// Called by the VFS as `release`: nobody uses the file any more.
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `open` has put it there, and this is the last call.
    drop(unsafe { KBox::from_raw((*file).private_data.cast::<Client>()) });
    0
}

/// # Safety
///
/// Called by the VFS as `read`.
unsafe extern "C" fn read(
    file: *mut bindings::file,
    buffer: *mut c_char,
    bytes: usize,
    _position: *mut bindings::loff_t,
) -> isize {
    // SAFETY: As the VFS calls this.
    let client = unsafe { client(file) };
    // SAFETY: As above.
    let waits = unsafe { (*file).f_flags } & bindings::O_NONBLOCK == 0;
    from_result(|| {
        if bytes < Notice::BYTES {
            return Err(EINVAL);
        }
        let forks = client.wait_for_forks(waits)?;
        ioctl::write(buffer as usize, &client.device.notice(forks).to_bytes())?;
        client.set_seen_forks(forks);
        Ok(Notice::BYTES as isize)
    })
}

/// # Safety
///
/// Called by the VFS as `poll`.
unsafe extern "C" fn poll(
    file: *mut bindings::file,
    table: *mut bindings::poll_table_struct,
) -> bindings::__poll_t {
    // SAFETY: As the VFS calls this.
    let client = unsafe { client(file) };
    // SAFETY: As above; the queue is the device's, which lives for as long as the file is open.
    unsafe { client.device.pollers().join(file, table) };
    if client.has_new_forks() {
        bindings::VMFORK_EPOLLIN
    } else {
        0
    }
}

/// # Safety
///
/// Called by the VFS as `unlocked_ioctl` or `compat_ioctl`.
unsafe extern "C" fn control(
    file: *mut bindings::file,
    command: c_uint,
    argument: c_ulong,
) -> c_long {
    // SAFETY: As the VFS calls this.
    let client = unsafe { client(file) };
    // SAFETY: As above.
    let may_fork = unsafe { (*file).f_mode } & bindings::VMFORK_FMODE_WRITE != 0;
    from_result(|| {
        client
            .device
            .control(command, argument, may_fork)
            .map(|()| 0)
    })
}

/// # Safety
///
/// Called by the VFS as `mmap`.
unsafe extern "C" fn mmap(file: *mut bindings::file, area: *mut bindings::vm_area_struct) -> c_int {
    // SAFETY: As the VFS calls this.
    let client = unsafe { client(file) };
    from_result(|| {
        let gpa = client.device.page().generation_gpa().ok_or(ENODEV)?;
        // SAFETY: Nobody else sees the area until this returns.
        let area = unsafe { &mut *area };
        // SAFETY: Either field of the union holds the flags.
        let flags = unsafe { &mut area.__bindgen_anon_2.vm_flags };
        if *flags & bindings::VMFORK_VM_WRITE != 0 {
            return Err(EACCES);
        }
        // Nor later, by mprotect.
        *flags &= !bindings::VMFORK_VM_MAYWRITE;
        // SAFETY: Either field of the union holds the range.
        let range = unsafe { area.__bindgen_anon_1.__bindgen_anon_1 };
        if area.vm_pgoff != 0 || range.vm_end - range.vm_start != PAGE_BYTES as c_ulong {
            return Err(EINVAL);
        }
        let (frame, protection) = ((gpa / PAGE_BYTES as u64) as c_ulong, area.vm_page_prot);
        // SAFETY: The area is new and one page long, and the page is the VMM's, with nothing in it
        // that is not for everyone.
        let result = unsafe {
            bindings::remap_pfn_range(
                area,
                range.vm_start,
                frame,
                PAGE_BYTES as c_ulong,
                protection,
            )
        };
        kernel::error::to_result(result).map(|()| 0)
    })
}

/// The client of a file.
///
/// # Safety
///
/// `file` is open, and is not released while the result is used.
unsafe fn client<'a>(file: *mut bindings::file) -> &'a Client {
    // SAFETY: `open` has put it there, and only `release` takes it away.
    unsafe { &*(*file).private_data.cast::<Client>() }
}

impl Client {
    /// How many forks the VM has come out of, once they are more than this client was told of.
    fn wait_for_forks(&self, waits: bool) -> Result<u64> {
        let mut state = self.device.up_to_date();
        loop {
            if state.forks != *self.seen_forks.access(&state) {
                return Ok(state.forks);
            }
            if !waits {
                return Err(EAGAIN);
            }
            if self.device.fork_events().wait_interruptible(&mut state) {
                return Err(ERESTARTSYS);
            }
        }
    }

    fn has_new_forks(&self) -> bool {
        let state = self.device.up_to_date();
        state.forks != *self.seen_forks.access(&state)
    }

    fn set_seen_forks(&self, forks: u64) {
        let mut state = self.device.state().lock();
        let seen_forks = self.seen_forks.access_mut(&mut state);
        // Another reader of this file may have been told of more meanwhile.
        *seen_forks = (*seen_forks).max(forks);
    }
}
