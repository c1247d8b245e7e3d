//! A machine that starts in UEFI firmware: where the image lies, and what the firmware is told of the machine.
//!
//! The image is whatever the description named; nothing in it is believed but its length.

use super::acpi::{self, Board};
use super::map::{MapEntry, RAM};
use super::table_loader::{clear_checksums, script};
use super::{BootError, Component, GENERATION, component, smbios};
use crate::machine::plan::{MachinePlan, Technology};
use crate::vmm::chipset::fw_cfg::FwCfgItems;
use crate::vmm::layout::{HIGH_MEMORY, PCI_ECAM_SPAN, PCI_FIRMWARE_LAST};

/// The image as it lies in front of 4 GiB, in a place of `room` bytes: its last byte is the place's last, and what is
/// in front of it reads as erased flash.
pub fn rom(image: &[u8], room: u64) -> Result<Vec<u8>, BootError> {
    let room = usize::try_from(room).unwrap_or(0);
    let free = room
        .checked_sub(image.len())
        .filter(|free| *free < ROM_UNIT && image.len() >= MIN_IMAGE)
        .ok_or(BootError::Firmware(
            "is not of the length that the description's file had",
        ))?;
    let mut rom = vec![0xff; free];
    rom.extend_from_slice(image);
    Ok(rom)
}

/// What is in memory beside the image: of a plain guest its generation.
pub fn pieces(plan: &MachinePlan) -> Vec<Component> {
    match plan.technology {
        Technology::None => vec![component("generation", GENERATION, plan.vm_id.to_vec())],
        _ => Vec::new(),
    }
}

/// What firmware asks of the machine, by `fw_cfg`.
pub fn items(plan: &MachinePlan) -> FwCfgItems {
    let mut items = FwCfgItems::new(plan.vcpus);
    let linked = linked(plan, crate::vmm::layout::ECAM);
    items.set_file(TABLES, linked.tables);
    items.set_file(RSDP, linked.rsdp);
    items.set_file(LOADER, linked.loader);
    items.set_file(E820, e820(plan));
    let (anchor, body) = smbios::parts(&plan.vm_id, plan.memory_bytes);
    items.set_file(SMBIOS_ANCHOR, anchor);
    items.set_file(SMBIOS_TABLES, body);
    items
}

/// The ACPI tables of a machine whose firmware has put the ECAM range at `ecam`.
pub fn tables(plan: &MachinePlan, ecam: u64) -> Vec<u8> {
    linked(plan, ecam).tables
}

struct Linked {
    tables: Vec<u8>,
    rsdp: Vec<u8>,
    loader: Vec<u8>,
}

fn linked(plan: &MachinePlan, ecam: u64) -> Linked {
    let board = Board {
        ecam,
        window: (ecam + PCI_ECAM_SPAN, PCI_FIRMWARE_LAST),
        behind: crate::vmm::layout::BEHIND_FIRMWARE,
        slots: acpi::Slots::of(plan),
    };
    let plain = plan.technology == Technology::None;
    let mut tables = acpi::unlinked(plan.vcpus, plain, &board);
    clear_checksums(&mut tables);
    let loader = script(&tables, TABLES, RSDP);
    Linked {
        tables: tables.blob,
        rsdp: tables.rsdp,
        loader,
    }
}

/// Where there is memory, in the numbering of e820.
fn e820(plan: &MachinePlan) -> Vec<u8> {
    let low = plan.low_memory();
    let ranges = [(0, low), (HIGH_MEMORY, plan.memory_bytes - low)];
    let entries = ranges.into_iter().filter(|(_, length)| *length > 0);
    let entry = |(start, length)| MapEntry {
        start,
        length,
        kind: RAM,
    };
    let bytes = entries.map(entry).flat_map(|entry| {
        let mut bytes = entry.start.to_le_bytes().to_vec();
        bytes.extend_from_slice(&entry.length.to_le_bytes());
        bytes.extend_from_slice(&entry.kind.to_le_bytes());
        bytes
    });
    bytes.collect()
}

/// The ACPI tables' file.
pub const TABLES: &str = "etc/acpi/tables";
const RSDP: &str = "etc/acpi/rsdp";
const LOADER: &str = "etc/table-loader";
const E820: &str = "etc/e820";
const SMBIOS_ANCHOR: &str = "etc/smbios/smbios-anchor";
const SMBIOS_TABLES: &str = "etc/smbios/smbios-tables";
/// Least length of an image: its reset vector.
const MIN_IMAGE: usize = 16;
const ROM_UNIT: usize = crate::machine::plan::FIRMWARE_UNIT as usize;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::plan::FirmwarePlan;

    fn plan(memory_bytes: u64) -> MachinePlan {
        MachinePlan {
            memory_bytes,
            technology: Technology::None,
            firmware: Some(FirmwarePlan { rom_bytes: 4 << 20 }),
            ..crate::vmm::boot::tests::plan()
        }
    }

    #[test]
    fn an_image_ends_where_its_place_ends_and_is_of_the_place_or_refused() {
        let place = rom(&[0x90; 3 << 20], 4 << 20).unwrap();
        assert_eq!(place.len(), 4 << 20);
        assert_eq!(place[..1 << 20], vec![0xff; 1 << 20]);
        assert_eq!(place[1 << 20..], vec![0x90; 3 << 20]);
        for length in [0, 15, 2 << 20, (4 << 20) + 1] {
            assert!(rom(&vec![0; length], 4 << 20).is_err(), "{length}");
        }
        assert!(rom(&[0; 15], 2 << 20).is_err());
    }

    #[test]
    fn memory_is_told_below_2_gib_and_above_4() {
        let bytes = e820(&plan(3 << 30));
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(
            (word(0), word(8), word(20), word(28)),
            (0, 2 << 30, 4 << 30, 1 << 30)
        );
        assert_eq!((bytes.len(), bytes[16], bytes[36]), (40, 1, 1));
        assert_eq!(e820(&plan(512 << 20)).len(), 20);
    }

    #[test]
    fn firmware_finds_tables_of_one_length_whatever_the_ecam_range() {
        let plan = plan(512 << 20);
        let items = items(&plan);
        for file in [TABLES, RSDP, LOADER, E820, SMBIOS_ANCHOR, SMBIOS_TABLES] {
            assert!(
                items.file(file).is_some_and(|bytes| !bytes.is_empty()),
                "{file}"
            );
        }
        let moved = tables(&plan, 0xb000_0000);
        let first = items.file(TABLES).unwrap();
        assert_eq!(moved.len(), first.len());
        assert_ne!(moved, first);
        assert_eq!(items.file(SMBIOS_ANCHOR).unwrap().len(), 24);
        assert_eq!(pieces(&plan)[0].bytes[..16], plan.vm_id);
    }
}
