//! QEMU's ACPI loader script (`docs/specs/acpi_... bios-linker-loader`): how firmware places the tables, links them, and
//! sums them up.

use super::acpi::Unlinked;

/// Where the tables and the RSDP are found, by the names of their files.
pub fn script(tables: &Unlinked, tables_file: &str, rsdp_file: &str) -> Vec<u8> {
    let mut script = Vec::new();
    let entries = tables.xsdt + XSDT_ENTRIES;
    allocate(&mut script, rsdp_file, RSDP_ALIGNMENT, LOW);
    allocate(&mut script, tables_file, TABLES_ALIGNMENT, HIGH);
    pointer(&mut script, tables_file, tables_file, tables.fadt + X_DSDT);
    checksum(
        &mut script,
        tables_file,
        tables.fadt,
        length(&tables.blob, tables.fadt),
    );
    for entry in 0..tables.entries {
        pointer(&mut script, tables_file, tables_file, entries + entry * 8);
    }
    checksum(
        &mut script,
        tables_file,
        tables.xsdt,
        length(&tables.blob, tables.xsdt),
    );
    pointer(&mut script, rsdp_file, tables_file, RSDP_XSDT);
    sum(&mut script, rsdp_file, RSDP_CHECKSUM, 0, RSDP_FIRST);
    sum(&mut script, rsdp_file, RSDP_EXTENDED_CHECKSUM, 0, RSDP_ALL);
    script
}

/// Sets to zero what the script sums up.
pub fn clear_checksums(tables: &mut Unlinked) {
    let (fadt, xsdt) = (tables.fadt + CHECKSUM, tables.xsdt + CHECKSUM);
    let blob = [fadt, xsdt].map(|at| (at, true));
    let rsdp = [RSDP_CHECKSUM, RSDP_EXTENDED_CHECKSUM].map(|at| (at, false));
    for (at, in_blob) in blob.into_iter().chain(rsdp) {
        let bytes = if in_blob {
            &mut tables.blob
        } else {
            &mut tables.rsdp
        };
        bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = 0);
    }
}

/// Length of the table that begins at `at`.
fn length(blob: &[u8], at: usize) -> usize {
    let field = blob.get(at + 4..).and_then(|rest| rest.first_chunk());
    field.map_or(0, |bytes| u32::from_le_bytes(*bytes) as usize)
}

fn allocate(script: &mut Vec<u8>, file: &str, alignment: u32, zone: u8) {
    command(script, ALLOCATE, |body| {
        name(body, file);
        body.extend_from_slice(&alignment.to_le_bytes());
        body.push(zone);
    });
}

/// Adds to the 8 bytes at `offset` of `file` where `to` was placed.
fn pointer(script: &mut Vec<u8>, file: &str, to: &str, offset: usize) {
    command(script, ADD_POINTER, |body| {
        name(body, file);
        name(body, to);
        body.extend_from_slice(&(offset as u32).to_le_bytes());
        body.push(8);
    });
}

/// The checksum of the whole table at `start`.
fn checksum(script: &mut Vec<u8>, file: &str, start: usize, length: usize) {
    sum(script, file, start + CHECKSUM, start, length);
}

/// Makes the byte at `offset` such that `length` bytes from `start` sum to zero.
fn sum(script: &mut Vec<u8>, file: &str, offset: usize, start: usize, length: usize) {
    command(script, ADD_CHECKSUM, |body| {
        name(body, file);
        for number in [offset, start, length] {
            body.extend_from_slice(&(number as u32).to_le_bytes());
        }
    });
}

fn command(script: &mut Vec<u8>, number: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    let end = script.len() + COMMAND;
    script.extend_from_slice(&number.to_le_bytes());
    fill(script);
    script.resize(end, 0);
}

fn name(body: &mut Vec<u8>, file: &str) {
    let end = body.len() + NAME;
    body.extend(file.bytes().take(NAME - 1));
    body.resize(end, 0);
}

const COMMAND: usize = 128;
const NAME: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
const HIGH: u8 = 1;
/// Where a legacy system looks for the RSDP.
const LOW: u8 = 2;
const RSDP_ALIGNMENT: u32 = 16;
const TABLES_ALIGNMENT: u32 = 64;
// offsets in the tables
const CHECKSUM: usize = 9;
const X_DSDT: usize = 140;
const XSDT_ENTRIES: usize = 36;
const RSDP_CHECKSUM: usize = 8;
const RSDP_FIRST: usize = 20;
const RSDP_XSDT: usize = 24;
const RSDP_EXTENDED_CHECKSUM: usize = 32;
const RSDP_ALL: usize = 36;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::boot::acpi::{Board, unlinked};
    use std::collections::BTreeMap;

    const TABLES: &str = "t";
    const RSDP: &str = "r";

    /// Memory as a firmware would leave it that follows the script: files at the places it chose.
    fn linked(
        script: &[u8],
        mut files: BTreeMap<String, (u64, Vec<u8>)>,
    ) -> BTreeMap<String, (u64, Vec<u8>)> {
        let text = |bytes: &[u8]| {
            String::from_utf8(bytes.iter().copied().take_while(|b| *b != 0).collect()).unwrap()
        };
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
        let mut placed = Vec::new();
        for command in script.chunks_exact(COMMAND) {
            let file = text(&command[4..60]);
            match word(command) as u32 {
                ALLOCATE => placed.push(file),
                ADD_POINTER => {
                    let to = text(&command[60..116]);
                    assert!(placed.contains(&file) && placed.contains(&to));
                    let (offset, size) = (word(&command[116..]), command[120] as usize);
                    assert_eq!(size, 8);
                    let base = files[&to].0;
                    let bytes = &mut files.get_mut(&file).unwrap().1[offset..offset + 8];
                    let value = u64::from_le_bytes(bytes.try_into().unwrap()) + base;
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
                ADD_CHECKSUM => {
                    let (offset, start, length) = (
                        word(&command[60..]),
                        word(&command[64..]),
                        word(&command[68..]),
                    );
                    let bytes = &mut files.get_mut(&file).unwrap().1;
                    let sum = bytes[start..start + length]
                        .iter()
                        .fold(0u8, |s, b| s.wrapping_add(*b));
                    bytes[offset] = bytes[offset].wrapping_sub(sum);
                }
                other => panic!("{other}"),
            }
        }
        files
    }

    #[test]
    fn what_firmware_links_is_a_good_set_of_tables() {
        let board = Board {
            ecam: 0xb000_0000,
            ..Board::DIRECT
        };
        let mut tables = unlinked(2, true, &board);
        clear_checksums(&mut tables);
        let script = script(&tables, TABLES, RSDP);
        assert!(script.len().is_multiple_of(COMMAND));
        let (base, root) = (0x7e01_0000, 0xf_5a00);
        let files = linked(
            &script,
            BTreeMap::from([
                (TABLES.into(), (base, tables.blob)),
                (RSDP.into(), (root, tables.rsdp)),
            ]),
        );
        let (rsdp, blob) = (&files[RSDP].1, &files[TABLES].1);
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp[..36])), (0, 0));
        let table = |address: &[u8]| {
            let at = (u64::from_le_bytes(address.try_into().unwrap()) - base) as usize;
            let table = &blob[at..at + length(blob, at)];
            assert_eq!(sum(table), 0);
            table
        };
        let xsdt = table(&rsdp[24..32]);
        let mut seen = vec![];
        for entry in xsdt[36..].chunks(8) {
            let table = table(entry);
            if table.starts_with(b"MCFG") {
                assert_eq!(table[44..52], board.ecam.to_le_bytes());
            }
            seen.push(table[..4].to_vec());
        }
        assert_eq!(seen, [b"FACP", b"APIC", b"MCFG"]);
        let fadt = table(&xsdt[36..44]);
        assert!(table(&fadt[140..148]).starts_with(b"DSDT"));
    }
}
