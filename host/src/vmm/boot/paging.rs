//! Descriptor table and page tables for the first instructions of the guest: flat 64-bit segments, 4 GiB
//! mapped one to one in 2 MiB pages.

use super::super::layout::{PAGE_SIZE, PAGE_TABLES};

/// Selector of the 64-bit code segment (`__BOOT_CS`).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
pub const TSS_SELECTOR: u16 = 0x20;

/// Where the 32-bit descriptor table begins, from the start of [`gdt`]; selectors mean the same in both.
pub const GDT32_OFFSET: u64 = 0x40;

/// The bytes of both descriptor tables: the 64-bit one, and [`GDT32_OFFSET`] behind it the 32-bit one.
pub fn gdt() -> Vec<u8> {
    let bytes = |entries: [u64; 5]| entries.into_iter().flat_map(u64::to_le_bytes);
    let mut table: Vec<u8> = bytes(GDT_ENTRIES).collect();
    table.resize(GDT32_OFFSET as usize, 0);
    table.extend(bytes([0, 0, CODE32, DATA, TSS]));
    table
}

/// Last valid byte of each descriptor table.
pub fn gdt_limit() -> u16 {
    (GDT_ENTRIES.len() * 8 - 1) as u16
}

/// Six pages: level 4, level 3, four of level 2.
pub fn page_tables() -> Vec<u8> {
    let mut words = vec![0u64; 6 * ENTRIES];
    let tables = [(0, PAGE_TABLES + PAGE_SIZE)]
        .into_iter()
        .chain((0..4).map(|n| (ENTRIES + n, PAGE_TABLES + (2 + n as u64) * PAGE_SIZE)));
    for (index, table) in tables {
        if let Some(word) = words.get_mut(index) {
            *word = table | PRESENT_WRITABLE;
        }
    }
    for (n, word) in words.iter_mut().skip(2 * ENTRIES).enumerate() {
        *word = ((n as u64) << 21) | PRESENT_WRITABLE | LARGE;
    }
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

const ENTRIES: usize = 512;
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;
// null, unused, 64-bit code, data, TSS: as the boot protocol wants them at 0x10 and 0x18
const GDT_ENTRIES: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, DATA, TSS];
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x008f_8b00_0000_ffff;

#[cfg(test)]
mod tests {
    use super::*;

    fn word(bytes: &[u8], index: usize) -> u64 {
        u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap())
    }

    #[test]
    fn both_tables_have_the_boot_protocols_segments() {
        let table = gdt();
        let (base, selector) = (GDT32_OFFSET as usize / 8, usize::from(CODE_SELECTOR) / 8);
        // L is set in the one, D in the other.
        assert_eq!(word(&table, selector) >> 53 & 3, 0b01);
        assert_eq!(word(&table, base + selector) >> 53 & 3, 0b10);
        for selector in [DATA_SELECTOR, TSS_SELECTOR] {
            let index = usize::from(selector) / 8;
            assert_eq!(word(&table, index), word(&table, base + index));
        }
        assert!(usize::from(gdt_limit()) < GDT32_OFFSET as usize);
        assert_eq!(
            table.len(),
            GDT32_OFFSET as usize + usize::from(gdt_limit()) + 1
        );
    }

    #[test]
    fn four_gibibytes_are_mapped_one_to_one() {
        let tables = page_tables();
        assert_eq!(tables.len(), 6 * 4096);
        for gpa in [0u64, 0x100_0200, 0xfee0_0000, (4 << 30) - 1] {
            let level3 = (word(&tables, 0) & !0xfff) - PAGE_TABLES;
            let pointer = word(&tables, level3 as usize / 8 + (gpa >> 30) as usize);
            let level2 = (pointer & !0xfff) - PAGE_TABLES;
            let entry = word(&tables, level2 as usize / 8 + ((gpa >> 21) & 511) as usize);
            assert_eq!(entry & !0x1f_ffff, gpa & !0x1f_ffff);
            assert_eq!(entry & 0x83, 0x83);
        }
    }
}
