//! What a kernel that is entered by PVH is told: `struct hvm_start_info` and what it points to
//! (Xen's `public/arch-x86/hvm/start_info.h`), all in one page.

use super::map::MapEntry;
use crate::vmm::layout::{ACPI, CMDLINE, PAGE_SIZE, START_INFO};

/// The page at [`START_INFO`]: the structure, the one module (the initramfs), the memory map.
pub fn start_info(initrd: Option<(u64, u64)>, map: &[MapEntry]) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE_SIZE as usize);
    let modules = START_INFO + MODULES_AT as u64;
    word32s(
        &mut page,
        &[START_MAGIC, VERSION, 0, u32::from(initrd.is_some())],
    );
    word64s(
        &mut page,
        &[modules, CMDLINE, ACPI, START_INFO + MAP_AT as u64],
    );
    word32s(&mut page, &[map.len() as u32, 0]);
    page.resize(MODULES_AT, 0);
    if let Some((start, length)) = initrd {
        word64s(&mut page, &[start, length, 0, 0]);
    }
    page.resize(MAP_AT, 0);
    for entry in map {
        word64s(&mut page, &[entry.start, entry.length]);
        word32s(&mut page, &[entry.kind, 0]);
    }
    page
}

fn word32s(page: &mut Vec<u8>, words: &[u32]) {
    words
        .iter()
        .for_each(|word| page.extend_from_slice(&word.to_le_bytes()));
}

fn word64s(page: &mut Vec<u8>, words: &[u64]) {
    words
        .iter()
        .for_each(|word| page.extend_from_slice(&word.to_le_bytes()));
}

const START_MAGIC: u32 = 0x336e_c578;
/// The version that has the memory map.
const VERSION: u32 = 1;
const MODULES_AT: usize = 0x40;
const MAP_AT: usize = 0x80;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::boot::map::{MAX_ENTRIES, memory_map};

    fn word(page: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn pointers_lead_to_module_and_map() {
        let map = memory_map(5 << 30, None);
        let page = start_info(Some((0x800_0000, 77)), &map);
        assert!(MAP_AT + MAX_ENTRIES * 24 <= PAGE_SIZE as usize);
        assert_eq!(word(&page, 0), 0x1_336e_c578);
        assert_eq!(word(&page, 8), 1 << 32);
        let module = (word(&page, 16) - START_INFO) as usize;
        assert_eq!(
            (word(&page, module), word(&page, module + 8)),
            (0x800_0000, 77)
        );
        assert_eq!((word(&page, 24), word(&page, 32)), (CMDLINE, ACPI));
        let at = (word(&page, 40) - START_INFO) as usize;
        assert_eq!(word(&page, 48), map.len() as u64);
        let last = at + (map.len() - 1) * 24;
        assert_eq!(
            (word(&page, last), word(&page, last + 8)),
            (4 << 30, 2 << 30)
        );
        assert_eq!(page.len(), last + 24);
        assert_eq!(word(&start_info(None, &map), 8), 0);
    }
}
