//! ACPI tables: the processors, the I/O APIC, the serial console, the VM generation ID, and how to power off
//! and reset.
//!
//! The machine is "hardware-reduced": no PIT, no CMOS clock, no ACPI fixed hardware. The kernel finds all of
//! it here and probes for nothing.

use acpi_tables::{
    Aml, aml,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{Error, write as failed};
use crate::{
    arch::layout::{
        ACPI, GENERATION_ID, GENERATION_ID_GSI, Gpa, IO_APIC, LOCAL_APIC, RESET_PORT, SERIAL_GSI,
        SERIAL_PORT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
    },
    devices::power::{RESET_VALUE, SLEEP_TYPE_OFF},
};

const OEM_ID: [u8; 6] = *b"VMFORK";
const OEM_TABLE_ID: [u8; 8] = *b"VMFORKVM";

/// FADT `iapc_boot_arch`: VGA is not there; CMOS clock is not there.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

/// Notification that there is another generation ID: the first of those that are each device's own.
const ID_CHANGED: u8 = 0x80;

/// Writes the tables, and returns the address of the RSDP.
pub(super) fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<Gpa, Error> {
    let mut next = ACPI.0 + u64::try_from(Rsdp::len()).unwrap_or(0);
    let mut put = |table: &dyn Aml| -> Result<u64, Error> {
        // Tables start at multiples of 16 for the sake of those who look at dumps.
        let gpa = next.next_multiple_of(16);
        next = write_table(memory, table, Gpa(gpa))?;
        Ok(gpa)
    };
    let dsdt = put(&dsdt())?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    write_table(memory, &Rsdp::new(OEM_ID, xsdt), ACPI)?;
    Ok(ACPI)
}

/// Writes one table and returns the first address behind it.
fn write_table(memory: &GuestMemoryMmap, table: &dyn Aml, gpa: Gpa) -> Result<u64, Error> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    memory.write_slice(&bytes, GuestAddress(gpa.0)).map_err(failed("an ACPI table", gpa))?;
    Ok(gpa.0 + bytes.len() as u64)
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let address = u32::try_from(LOCAL_APIC.0).unwrap_or(u32::MAX);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, 1, LocalInterruptController::Address(address));
    for vcpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, u32::try_from(IO_APIC.0).unwrap_or(u32::MAX), 0));
    madt
}

/// The serial console (PNP0501), the VM generation ID with the device for its event, and the sleep state S5.
fn dsdt() -> Sdt {
    let mut body = Vec::new();
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_DDN".into(), &"COM1"),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Interrupt::new(true, true, false, false, SERIAL_GSI),
                    &aml::IO::new(SERIAL_PORT, SERIAL_PORT, 0, 8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut body);
    generation_id(&mut body);
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&SLEEP_TYPE_OFF])).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, 1);
    dsdt.append_slice(&body);
    dsdt.update_checksum();
    dsdt
}

/// The VM generation ID, and the generic event device (ACPI0013) that announces a new one. Linux has a driver
/// for it since 5.18, which knows both names. One of them is the `_HID`, since not every kernel looks at a
/// `_CID` for it.
fn generation_id(body: &mut Vec<u8>) {
    let interrupt = aml::Interrupt::new(true, true, false, false, GENERATION_ID_GSI);
    let (low, high) = (GENERATION_ID.0 & u64::from(u32::MAX), GENERATION_ID.0 >> u32::BITS);
    aml::Device::new(
        "_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_GEN_COUNTER"),
            &aml::Name::new("_DDN".into(), &"VM_GEN_COUNTER"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(body);
    aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&interrupt])),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::If::new(
                    &aml::Equal::new(&aml::Arg(0), &GENERATION_ID_GSI),
                    vec![&aml::Notify::new(&aml::Path::new("\\_SB_.VGEN"), &ID_CHANGED)],
                )],
            ),
        ],
    )
    .to_aml_bytes(body);
}
