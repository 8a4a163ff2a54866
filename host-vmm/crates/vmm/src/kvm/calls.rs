//! Calls on a vCPU that kvm-ioctls does not have.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_sregs2};
use kvm_ioctls::{Error, VcpuFd};

mod abi {
    use kvm_bindings::{KVMIO, kvm_device_attr, kvm_sregs2};

    /// KVM's ioctls all have this type.
    const TYPE: u32 = KVMIO;

    nix::ioctl_write_ptr!(setup_mce, TYPE, 0x9c, u64);
    nix::ioctl_read!(get_sregs2, TYPE, 0xcc, kvm_sregs2);
    nix::ioctl_write_ptr!(set_sregs2, TYPE, 0xcd, kvm_sregs2);
    nix::ioctl_write_ptr!(set_device_attr, TYPE, 0xe1, kvm_device_attr);
    nix::ioctl_write_ptr!(get_device_attr, TYPE, 0xe2, kvm_device_attr);
}

/// Guest's time-stamp counter less the host's, in the guest's units, modulo 2^64 (KVM_GET_DEVICE_ATTR of
/// KVM_VCPU_TSC_OFFSET, Linux 5.16).
pub(super) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0_u64;
    let attribute = tsc_offset_at((&raw mut offset).expose_provenance());
    // SAFETY: KVM writes the eight bytes of this attribute to the address in it, those of `offset`.
    unsafe { abi::get_device_attr(vcpu.as_raw_fd(), &raw const attribute) }.map_err(error)?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] gives (KVM_SET_DEVICE_ATTR).
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_at((&raw const offset).expose_provenance());
    // SAFETY: KVM reads the eight bytes of this attribute from the address in it, those of `offset`.
    unsafe { abi::set_device_attr(vcpu.as_raw_fd(), &raw const attribute) }.map_err(error)?;
    Ok(())
}

/// The attribute, at this address of this process.
fn tsc_offset_at(address: usize) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: address as u64,
        ..Default::default()
    }
}

/// Says how many banks of machine-check registers there are, and what they can do: IA32_MCG_CAP
/// (KVM_X86_SETUP_MCE). It resets them.
pub(super) fn setup_mce(vcpu: &VcpuFd, mcg_cap: u64) -> Result<(), Error> {
    // SAFETY: KVM reads eight bytes.
    unsafe { abi::setup_mce(vcpu.as_raw_fd(), &raw const mcg_cap) }.map_err(error)?;
    Ok(())
}

/// The system registers with the page-directory pointers (KVM_GET_SREGS2, Linux 5.14).
pub(super) fn sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: KVM writes a structure of this type.
    unsafe { abi::get_sregs2(vcpu.as_raw_fd(), &raw mut sregs) }.map_err(error)?;
    Ok(sregs)
}

/// Sets what [`sregs2`] gives (KVM_SET_SREGS2).
pub(super) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Error> {
    // SAFETY: KVM reads a structure of this type.
    unsafe { abi::set_sregs2(vcpu.as_raw_fd(), sregs) }.map_err(error)?;
    Ok(())
}

fn error(errno: nix::Error) -> Error {
    Error::new(errno as i32)
}
