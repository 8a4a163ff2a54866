//! What /dev/kvm is good for on this host, found out by running guest code on it.
//!
//! That the device is there and knows all capabilities says little: a KVM without hardware virtualisation may
//! run guest user mode at full speed and emulate guest kernel code instruction by instruction, too slow to
//! boot anything, and never complete a hypercall. So a small guest counts down, at CPL 0 and at CPL 3, and
//! makes a hypercall, all under a time limit.

use std::{
    arch::x86_64::__cpuid,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use vmfork_abi::doorbell;

use super::{Error, Exit, Hypervisor, Vcpu, Vm};
use crate::{
    arch::{
        Registers, Segment, SystemRegisters, VcpuId,
        layout::{CONTROL_PAGE, Gpa},
    },
    memory::{self, Mapping},
};

/// Instructions that the guest executes before it reports. With hardware virtualisation they take less than a
/// millisecond, in nested software emulation some 20; a KVM that emulates each of them takes 230 to 1,300
/// (measured).
const INSTRUCTIONS: u32 = 400_000;

/// How long each part may take: at fewer than 4 million instructions a second a kernel would boot for hours.
const TIME_LIMIT: Duration = Duration::from_millis(100);

/// The guest reports on these ports that it has counted down, and that its hypercall returned.
const COUNTED: u16 = 0x10;
const CALLED: u16 = 0x11;

/// Where the guest's page tables and code lie in its memory.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x5000;
const RAM_BYTES: usize = 0x10000;

/// Why the guest could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// KVM refuses.
    #[error("KVM refuses a guest")]
    Kvm(#[from] Error),
    /// There is no memory for the guest.
    #[error("no memory for a guest")]
    Memory(#[from] memory::Error),
}

/// What works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Findings {
    /// Guest kernel code (CPL 0): instructions a second, or `None` where it is too slow or does not run.
    pub kernel_code: Option<u64>,
    /// Guest user code (CPL 3), likewise.
    pub user_code: Option<u64>,
    /// A hypercall from guest kernel code reaches the VMM, and returns.
    pub hypercall: bool,
    /// The kernel says that it hands hypercalls on (KVM_CAP_EXIT_HYPERCALL).
    pub hypercall_promised: bool,
}

impl Findings {
    /// Whether a Linux guest runs: its kernel's code does, and KVM keeps what it promises. One that promises
    /// hypercalls and completes none emulates guest kernel code, however fast it does so.
    pub fn is_usable(&self) -> bool {
        self.kernel_code.is_some() && (self.hypercall || !self.hypercall_promised)
    }
}

/// Tries it out.
///
/// # Errors
/// [`ProbeError`] where not even a small guest can be made.
pub fn probe() -> Result<Findings, ProbeError> {
    let kernel = try_guest(0)?;
    let user = try_guest(3)?;
    Ok(Findings {
        kernel_code: kernel.speed,
        user_code: user.speed,
        hypercall: kernel.hypercall,
        hypercall_promised: kernel.hypercall_promised,
    })
}

#[derive(Debug, Default)]
struct Tried {
    speed: Option<u64>,
    hypercall: bool,
    hypercall_promised: bool,
}

/// Runs the guest at a privilege level.
fn try_guest(level: u8) -> Result<Tried, ProbeError> {
    let (vm, mut vcpu) = make_guest(level)?;
    vcpu.kicker().adopt();
    let mut tried = Tried { hypercall_promised: vm.can_exit_on_hypercall(), ..Tried::default() };
    let started = Instant::now();
    match run_limited(&mut vcpu)? {
        Some(Event::Port(COUNTED)) => {
            let nanoseconds = started.elapsed().as_nanos().max(1);
            tried.speed = u64::try_from(u128::from(INSTRUCTIONS) * 1_000_000_000 / nanoseconds).ok();
        }
        _ => return Ok(tried),
    }
    if level == 0 && run_limited(&mut vcpu)? == Some(Event::Hypercall) {
        tried.hypercall = run_limited(&mut vcpu)? == Some(Event::Port(CALLED));
    }
    Ok(tried)
}

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Port(u16),
    Hypercall,
    Other,
}

/// Runs the guest to its next exit, or for as long as the time limit.
fn run_limited(vcpu: &mut Vcpu) -> Result<Option<Event>, Error> {
    let kicker = vcpu.kicker().clone();
    kicker.clear();
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            // The sender is dropped when the guest has exited.
            if wait.recv_timeout(TIME_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        let event = match vcpu.run()? {
            Exit::PortWrite { port, .. } => Some(Event::Port(port)),
            Exit::Hypercall { result, .. } => {
                *result = 0;
                Some(Event::Hypercall)
            }
            Exit::Interrupted => None,
            _ => Some(Event::Other),
        };
        drop(done);
        Ok(event)
    })
}

fn make_guest(level: u8) -> Result<(Vm, Vcpu), ProbeError> {
    let ram = Arc::new(Mapping::reserve(RAM_BYTES)?);
    ram.map_shared(&memory::unsealed("vm-probe", RAM_BYTES as u64)?)?;
    fill(&ram, &code(), CODE)?;
    fill(&ram, &page_tables(), TABLES)?;
    let hypervisor = Hypervisor::open()?;
    let mut vm = hypervisor.create_vm()?;
    vm.map(0, Gpa(0), &ram, 0, RAM_BYTES as u64)?;
    vm.enable_hypercall()?;
    let mut vcpu = vm.create_vcpu(VcpuId(0))?;
    vcpu.set_cpuid(hypervisor.supported_cpuid()?)?;
    // RFLAGS: bit 1 is always set; I/O privilege level 3, so that ports can be written from CPL 3.
    let registers = Registers { rip: CODE, rflags: 0x3002, ..Default::default() };
    vcpu.set_entry(&registers, |reset| long_mode(reset, level))?;
    Ok((vm, vcpu))
}

fn fill(ram: &Mapping, bytes: &[u8], at: u64) -> Result<(), memory::Error> {
    ram.write(usize::try_from(at).map_err(|_| memory::Error::Invalid("address"))?, bytes)
}

/// Counts down, writes [`COUNTED`], makes the hypercall, writes [`CALLED`].
fn code() -> Vec<u8> {
    let vendor = __cpuid(0);
    let amd = vendor.ebx.to_le_bytes() == *b"Auth" || vendor.ebx.to_le_bytes() == *b"Hygo";
    let hypercall: [u8; 3] = if amd { [0x0f, 0x01, 0xd9] } else { [0x0f, 0x01, 0xc1] };
    let move_imm = |opcode: u8, value: u32| [&[opcode][..], &value.to_le_bytes()].concat();
    let low = |value: u64| u32::try_from(value).unwrap_or(0);
    [
        move_imm(0xb9, INSTRUCTIONS / 2),                // mov ecx
        vec![0xff, 0xc9, 0x75, 0xfc],                    // dec ecx; jnz
        vec![0xe6, COUNTED.to_le_bytes()[0]],            // out
        move_imm(0xb8, low(doorbell::HYPERCALL)),        // mov eax
        move_imm(0xbb, low(CONTROL_PAGE.0)),             // mov ebx
        move_imm(0xb9, 1),                               // mov ecx
        vec![0x31, 0xd2],                                // xor edx, edx
        hypercall.to_vec(),                              // vmcall or vmmcall
        vec![0xe6, CALLED.to_le_bytes()[0], 0xeb, 0xfe], // out; loop
    ]
    .concat()
}

/// Maps the first 2 MiB one to one, for user code too.
fn page_tables() -> Vec<u8> {
    const USER_WRITABLE: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    let mut tables = vec![0; 3 * 4096];
    let entries =
        [(TABLES + 0x1000) | USER_WRITABLE, (TABLES + 0x2000) | USER_WRITABLE, USER_WRITABLE | LARGE];
    for (table, entry) in tables.chunks_mut(4096).zip(entries) {
        table[..8].copy_from_slice(&entry.to_le_bytes());
    }
    tables
}

fn long_mode(mut reset: SystemRegisters, level: u8) -> SystemRegisters {
    let code = Segment {
        limit: u32::MAX,
        selector: 0x30 | u16::from(level),
        present: 1,
        type_: 11,
        dpl: level,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = Segment { type_: 3, selector: 0x28 | u16::from(level), l: 0, db: 1, ..code };
    reset.cs = code;
    (reset.ds, reset.es, reset.fs, reset.gs, reset.ss) = (data, data, data, data, data);
    reset.cr0 = 0x8005_0033;
    reset.cr3 = TABLES;
    reset.cr4 = 0x20;
    reset.efer = 0xd00;
    reset
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_has_to_keep_its_promises() {
        let found = |kernel_code, hypercall, hypercall_promised| {
            Findings { kernel_code, user_code: Some(1), hypercall, hypercall_promised }.is_usable()
        };
        assert!(found(Some(1), true, true));
        assert!(found(Some(1), false, false), "a kernel before 5.14");
        assert!(!found(Some(1), false, true), "emulated guest kernel code");
        assert!(!found(None, false, false));
    }
}
