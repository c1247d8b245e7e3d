//! ACPI tables of the machine: hardware-reduced, one PCI root (by port and by ECAM), COM1, and events by a generic
//! event device: the power button and, of a plain guest, a new VM generation id.

mod hotplug;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, MethodCall,
    Name, Notify, ONE, OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

pub use self::hotplug::Slots;
use crate::devices::events::Event;
use crate::vmm::layout::{
    COM1, COM1_GSI, ECAM, ECAM_SIZE, EVENTS, EVENTS_GSI, GENERATION, I8042_COMMAND, IOAPIC, LAPIC,
    PCI_CONFIG_ADDRESS, PCI_WINDOW, PCI_WINDOW_LAST, PVPANIC, RESET_VALUE, S5_SLEEP_TYPE,
    SLEEP_CONTROL, SLEEP_STATUS,
};

/// What the tables say of the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Board {
    /// Where PCI configuration is reached by memory access.
    pub ecam: u64,
    /// First and last byte of the PCI window.
    pub window: (u64, u64),
    /// How far the sleep and event ports lie behind their places in the layout.
    pub behind: u16,
    /// Slots for hot-plug.
    pub slots: Slots,
}

impl Board {
    /// That of a kernel that is booted directly.
    pub const DIRECT: Self = Self {
        ecam: ECAM,
        window: (PCI_WINDOW, PCI_WINDOW_LAST),
        behind: 0,
        slots: Slots::NONE,
    };
}

/// All tables, to be placed at `base`; the RSDP comes first. `generation` is whether the guest has a VM generation id.
pub fn tables(vcpus: u8, generation: bool, slots: Slots, base: u64) -> Vec<u8> {
    let board = &Board {
        slots,
        ..Board::DIRECT
    };
    let mut blob = vec![0u8; Rsdp::len().next_multiple_of(ALIGNMENT)];
    let dsdt = place(&mut blob, base, &dsdt(generation, board));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    for table in [fadt(dsdt, board), madt(vcpus), mcfg(board)] {
        xsdt.add_entry(place(&mut blob, base, &table));
    }
    let xsdt = place(&mut blob, base, &bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    for (to, from) in blob.iter_mut().zip(rsdp) {
        *to = from;
    }
    blob
}

/// The tables one after another as firmware links them: every pointer counts from the first byte. The XSDT comes last.
pub(super) struct Unlinked {
    /// DSDT, FADT, MADT, MCFG, XSDT.
    pub blob: Vec<u8>,
    /// Where the FADT begins.
    pub fadt: usize,
    /// Where the XSDT begins.
    pub xsdt: usize,
    /// How many tables it points to.
    pub entries: usize,
    /// The RSDP, which is apart.
    pub rsdp: Vec<u8>,
}

/// Tables to be linked by firmware.
pub(super) fn unlinked(vcpus: u8, generation: bool, board: &Board) -> Unlinked {
    let mut blob = Vec::new();
    let dsdt = place(&mut blob, 0, &dsdt(generation, board));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    let fadt = place(&mut blob, 0, &fadt(dsdt, board));
    let others = [madt(vcpus), mcfg(board)].map(|table| place(&mut blob, 0, &table));
    xsdt.add_entry(fadt);
    others.iter().for_each(|at| xsdt.add_entry(*at));
    let xsdt = place(&mut blob, 0, &bytes_of(&xsdt));
    Unlinked {
        blob,
        fadt: fadt as usize,
        xsdt: xsdt as usize,
        entries: 1 + others.len(),
        rsdp: bytes_of(&Rsdp::new(OEM_ID, xsdt)),
    }
}

fn place(blob: &mut Vec<u8>, base: u64, table: &[u8]) -> u64 {
    let address = base + blob.len() as u64;
    blob.extend_from_slice(table);
    blob.resize(blob.len().next_multiple_of(ALIGNMENT), 0);
    address
}

fn dsdt(generation: bool, board: &Board) -> Vec<u8> {
    let mut body = Vec::new();
    com1(&mut body);
    pci_root(board, &mut body);
    hotplug::slots(board.slots, &mut body);
    panic_device(&mut body);
    board_memory(board, &mut body);
    power_button(&mut body);
    if generation {
        generation_id(&mut body);
    }
    events(generation, board, &mut body);
    Name::new(Path::new("_S5_"), &Package::new(vec![&S5_SLEEP_TYPE])).to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

fn com1(sink: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, COM1_GSI);
    let ports = IO::new(COM1, COM1, 0, 8);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    Device::new(
        Path::new("\\_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

/// By which a guest says that its kernel panicked; Linux's driver finds it by this name (`pvpanic-mmio`).
fn panic_device(sink: &mut Vec<u8>) {
    let ports = IO::new(PVPANIC, PVPANIC, 1, 1);
    let resources = ResourceTemplate::new(vec![&ports]);
    Device::new(
        Path::new("\\_SB_.PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_STA"), &PRESENT),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

fn pci_root(board: &Board, sink: &mut Vec<u8>) {
    let window = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        board.window.0 as u32,
        board.window.1 as u32,
        None,
    );
    let buses = AddressSpace::<u16>::new_bus_number(0, 0);
    let ports = IO::new(PCI_CONFIG_ADDRESS, PCI_CONFIG_ADDRESS, 1, 8);
    let resources = ResourceTemplate::new(vec![&buses, &ports, &window]);
    Device::new(
        Path::new("\\_SB_.PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

/// What is the board's own: the ECAM range, which must not be taken for a window of the bridge.
fn board_memory(board: &Board, sink: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, board.ecam as u32, ECAM_SIZE as u32);
    let resources = ResourceTemplate::new(vec![&ecam]);
    Device::new(
        Path::new("\\_SB_.MB00"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(sink);
}

fn power_button(sink: &mut Vec<u8>) {
    Device::new(
        Path::new("\\_SB_.PWRB"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &ZERO),
        ],
    )
    .to_aml_bytes(sink);
}

/// Microsoft's "Virtual Machine Generation ID": where the 16 bytes are.
fn generation_id(sink: &mut Vec<u8>) {
    let (low, high) = (GENERATION as u32, (GENERATION >> 32) as u32);
    Device::new(
        Path::new("\\_SB_.VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"CSMT0001"),
            // The second for Linux before 6.10, which cuts the first.
            &Name::new(
                Path::new("_CID"),
                &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]),
            ),
            &Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
}

/// The generic event device (section 5.6.9): its interrupt says that something happened, its port what.
fn events(generation: bool, board: &Board, sink: &mut Vec<u8>) {
    let port = EVENTS + board.behind;
    let interrupt = Interrupt::new(true, true, false, false, EVENTS_GSI);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let region = OpRegion::new(Path::new("EVTS"), OpRegionSpace::SystemIO, &port, &ONE);
    let field = Field::new(
        Path::new("EVTS"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"EVNT", 8)],
    );
    let status = Path::new("EVNT");
    let take = Store::new(&Local(0), &status);
    let (button, page) = (Path::new("\\_SB_.PWRB"), Path::new("\\_SB_.VGEN"));
    let (pressed, changed) = (Event::PowerButton as u8, Event::Generation as u8);
    let (is_pressed, is_changed) = (
        And::new(&ZERO, &Local(0), &pressed),
        And::new(&ZERO, &Local(0), &changed),
    );
    let notify_button = Notify::new(&button, &NOTIFY);
    let notify_page = Notify::new(&page, &NOTIFY);
    let if_pressed = If::new(&is_pressed, vec![&notify_button]);
    let if_changed = If::new(&is_changed, vec![&notify_page]);
    let mut steps: Vec<&dyn Aml> = vec![&take, &if_pressed];
    if generation {
        steps.push(&if_changed);
    }
    let plugged = Event::Slots as u8;
    let is_plugged = And::new(&ZERO, &Local(0), &plugged);
    let scan = MethodCall::new(Path::new(hotplug::SCAN), vec![]);
    let if_plugged = If::new(&is_plugged, vec![&scan]);
    if board.slots.count > 0 {
        steps.push(&if_plugged);
    }
    Device::new(
        Path::new("\\_SB_.GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
            &region,
            &field,
            &Method::new(Path::new("_EVT"), 1, true, steps),
        ],
    )
    .to_aml_bytes(sink);
}

fn mcfg(board: &Board) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(board.ecam, 0, 0, 0);
    bytes_of(&mcfg)
}

fn fadt(dsdt: u64, board: &Board) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_ASPM | NO_CMOS_RTC).into();
    fadt.reset_reg = port(I8042_COMMAND);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL + board.behind);
    fadt.sleep_status_reg = port(SLEEP_STATUS + board.behind);
    bytes_of(&fadt.finalize())
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC),
    );
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC, 0));
    bytes_of(&madt)
}

fn port(address: u16) -> GAS {
    GAS::new(
        GasSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Present, enabled, functioning, not shown.
const PRESENT: u8 = 0xb;
/// "The button was pressed"; "the generation has changed".
const NOTIFY: u8 = 0x80;
const ALIGNMENT: usize = 16;
const OEM_ID: [u8; 6] = *b"CASEMT";
const OEM_TABLE: [u8; 8] = *b"CASEMATE";
const OEM_REVISION: u32 = 1;
// ACPI specification, section 5.2.9.3: boot architecture flags
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
const NO_CMOS_RTC: u16 = 1 << 5;

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table_at(blob: &[u8], base: u64, address: u64) -> &[u8] {
        let start = (address - base) as usize;
        let length = u32::from_le_bytes(blob[start + 4..start + 8].try_into().unwrap());
        &blob[start..start + length as usize]
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let base = 0xe_0000;
        let slots = Slots { first: 5, count: 4 };
        let blob = tables(3, true, slots, base);
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!(sum(&blob[..20]), 0);
        assert_eq!(sum(&blob[..36]), 0);
        let xsdt = table_at(
            &blob,
            base,
            u64::from_le_bytes(blob[24..32].try_into().unwrap()),
        );
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let mut seen = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table_at(&blob, base, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(table), 0);
            seen.push(table[..4].to_vec());
            if &table[..4] == b"FACP" {
                let dsdt = u64::from_le_bytes(table[140..148].try_into().unwrap());
                assert_eq!(sum(table_at(&blob, base, dsdt)), 0);
            }
            if &table[..4] == b"MCFG" {
                let ecam = u64::from_le_bytes(table[44..52].try_into().unwrap());
                assert_eq!((ecam, table.len()), (ECAM, 60));
            }
            if &table[..4] == b"APIC" {
                assert_eq!(table.len(), 44 + 3 * 8 + 12);
            }
        }
        assert_eq!(seen, [*b"FACP", *b"APIC", *b"MCFG"]);
    }
}
