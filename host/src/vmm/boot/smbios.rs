//! SMBIOS 3: what `dmidecode` and the guest's system manager call this machine. The least that the specification
//! (DSP0134, 3.0) demands of a virtual machine: firmware, system, chassis, memory array, end.

use crate::vmm::layout::SMBIOS;

/// Entry point at [`SMBIOS`], tables behind it. `id` is the system's UUID, zeros where it has none.
pub fn tables(id: &[u8; 16], memory: u64) -> Vec<u8> {
    let (entry, body) = parts(id, memory);
    let mut blob = entry;
    blob.resize(ENTRY_ROOM, 0);
    blob.extend_from_slice(&body);
    blob
}

/// Entry point and tables apart, as firmware takes them; it places the tables itself.
pub fn parts(id: &[u8; 16], memory: u64) -> (Vec<u8>, Vec<u8>) {
    let mut body = Vec::new();
    // 0: vendor, version, no segment, date, 64 KiB; characteristics: virtual machine, and no more
    let firmware = [
        1, 2, 0, 0, 3, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0xff, 0xff,
    ];
    structure(&mut body, 0, &firmware, &[NAME, VERSION, DATE]);
    // 1: maker, product, version, no serial, UUID, woken by power, no SKU, family
    let mut system = vec![1, 2, 3, 0];
    system.extend_from_slice(&mixed_endian(id));
    system.extend_from_slice(&[6, 0, 4]);
    structure(&mut body, 1, &system, &[NAME, PRODUCT, VERSION, PRODUCT]);
    // 3: maker, kind "other", no strings more, states unknown, no height, no cords, no elements
    let chassis = [1, 1, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    structure(&mut body, 3, &chassis, &[NAME]);
    // 16: system memory, in the board's place, no correction, size in KiB by the wide field, no error handle
    let mut array = vec![1, 3, 3];
    array.extend_from_slice(&0x8000_0000u32.to_le_bytes());
    array.extend_from_slice(&[0xfe, 0xff, 0, 0]);
    array.extend_from_slice(&memory.to_le_bytes());
    structure(&mut body, 16, &array, &[]);
    structure(&mut body, 127, &[], &[]);
    (entry_point(body.len() as u32), body)
}

fn entry_point(length: u32) -> Vec<u8> {
    let mut entry = b"_SM3_\0".to_vec();
    entry.extend_from_slice(&[ENTRY_LENGTH as u8, 3, 0, 0, 1, 0]);
    entry.extend_from_slice(&length.to_le_bytes());
    entry.extend_from_slice(&(SMBIOS + ENTRY_ROOM as u64).to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = entry.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    entry
}

/// Type, length, handle, fields; then its strings, each with a zero, and one zero more.
fn structure(body: &mut Vec<u8>, kind: u8, fields: &[u8], strings: &[&str]) {
    body.extend_from_slice(&[kind, 4 + fields.len() as u8]);
    body.extend_from_slice(&u16::from(kind).to_le_bytes());
    body.extend_from_slice(fields);
    for text in strings {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    if strings.is_empty() {
        body.push(0);
    }
    body.push(0);
}

/// The first three fields of a UUID are little-endian here (section 7.2.1).
fn mixed_endian(id: &[u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = *id;
    let mut out = [d, c, b, a, f, e, h, g, 0, 0, 0, 0, 0, 0, 0, 0];
    out.iter_mut()
        .skip(8)
        .zip(rest)
        .for_each(|(to, from)| *to = from);
    out
}

const NAME: &str = "Casemate";
const PRODUCT: &str = "Casemate virtual machine";
/// Of the machine's make, not of the program: it is measured.
const VERSION: &str = "1";
const DATE: &str = "01/01/2026";
const ENTRY_LENGTH: usize = 24;
const ENTRY_ROOM: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_point_sums_to_zero_and_the_structures_follow_one_another_to_the_end() {
        let blob = tables(&std::array::from_fn(|n| n as u8), 512 << 20);
        let sum = blob[..ENTRY_LENGTH]
            .iter()
            .fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!((&blob[..5], sum), (&b"_SM3_"[..], 0));
        let length = u32::from_le_bytes(blob[12..16].try_into().unwrap()) as usize;
        let at = u64::from_le_bytes(blob[16..24].try_into().unwrap()) - SMBIOS;
        let mut rest = &blob[at as usize..];
        assert_eq!(rest.len(), length);
        let mut kinds = Vec::new();
        while let [kind, size, ..] = rest {
            let end = rest[*size as usize..]
                .windows(2)
                .position(|pair| pair == [0, 0]);
            if *kind == 1 {
                assert_eq!(rest[8..16], [3, 2, 1, 0, 5, 4, 7, 6]);
                assert_eq!(rest[16..24], [8, 9, 10, 11, 12, 13, 14, 15]);
                let strings = &rest[*size as usize..];
                assert!(strings.starts_with(b"Casemate\0Casemate virtual machine\0"));
            }
            kinds.push((*kind, *size));
            rest = &rest[*size as usize + end.unwrap() + 2..];
        }
        assert_eq!(kinds, [(0, 24), (1, 27), (3, 22), (16, 23), (127, 4)]);
    }
}
