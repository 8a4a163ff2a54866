//! Why a vCPU stopped running guest code.

use kvm_ioctls::VcpuExit;

use crate::arch::layout::Gpa;

/// A VM exit. Buffers lie in the vCPU's shared page: what is written to them is what the guest reads.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port.
    PortRead {
        /// The port.
        port: u16,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// The guest writes a port.
    PortWrite {
        /// The port.
        port: u16,
        /// What it writes.
        data: &'a [u8],
    },
    /// The guest reads where there is no memory.
    MmioRead {
        /// The address.
        gpa: Gpa,
        /// To be filled.
        data: &'a mut [u8],
    },
    /// The guest writes where there is no memory.
    MmioWrite {
        /// The address.
        gpa: Gpa,
        /// What it writes.
        data: &'a [u8],
    },
    /// The guest made a hypercall that KVM hands on.
    Hypercall {
        /// Its number.
        number: u64,
        /// Its arguments: RBX, RCX, RDX, RSI.
        arguments: [u64; 4],
        /// What the guest gets in RAX.
        result: &'a mut u64,
    },
    /// A signal or a kick came; nothing happened in the guest.
    Interrupted,
    /// The vCPU can't go on: a triple fault.
    Shutdown,
    /// KVM can't run this guest any further; the text says why, for a person.
    Broken(String),
}

impl<'a> From<VcpuExit<'a>> for Exit<'a> {
    fn from(exit: VcpuExit<'a>) -> Self {
        match exit {
            VcpuExit::IoIn(port, data) => Self::PortRead { port, data },
            VcpuExit::IoOut(port, data) => Self::PortWrite { port, data },
            VcpuExit::MmioRead(gpa, data) => Self::MmioRead { gpa: Gpa(gpa), data },
            VcpuExit::MmioWrite(gpa, data) => Self::MmioWrite { gpa: Gpa(gpa), data },
            VcpuExit::Hypercall(call) => {
                let [rbx, rcx, rdx, rsi, ..] = call.args;
                Self::Hypercall { number: call.nr, arguments: [rbx, rcx, rdx, rsi], result: call.ret }
            }
            VcpuExit::Intr => Self::Interrupted,
            VcpuExit::Shutdown => Self::Shutdown,
            VcpuExit::FailEntry(reason, cpu) => Self::Broken(format!(
                "KVM can't enter the guest, for the hardware's reason {reason:#x}, on CPU {cpu}; the kernel's log tells more where the module kvm_intel has \
                 dump_invalid_vmcs=1, or kvm_amd dump_invalid_vmcb=1"
            )),
            other => Self::Broken(format!("{other:?}")),
        }
    }
}
