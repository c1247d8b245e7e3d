//! The map of guest memory as the guest is told it, in the numbering of e820.

use crate::vmm::layout::{
    ECAM, ECAM_SIZE, HIGH_MEMORY, HIGH_RAM, LOW_RAM_END, SECRET_GPA, SECRET_SIZE, low_memory,
};

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// First byte.
    pub start: u64,
    /// Bytes, not zero.
    pub length: u64,
    /// [`RAM`] or [`RESERVED`].
    pub kind: u32,
}

/// Usable memory.
pub const RAM: u32 = 1;
/// Not memory, or not the guest's to use.
pub const RESERVED: u32 = 2;
/// Most entries that [`memory_map`] makes.
pub const MAX_ENTRIES: usize = 7;

/// The map of a machine with `memory` bytes, in ascending order. Memory is reserved from `reserved`, if given, to the
/// end of the secret page.
pub fn memory_map(memory: u64, reserved: Option<u64>) -> Vec<MapEntry> {
    let low = low_memory(memory);
    let mut ranges = vec![(0, LOW_RAM_END, RAM), (LOW_RAM_END, HIGH_RAM, RESERVED)];
    match reserved {
        Some(from) => ranges.extend([
            (HIGH_RAM, from, RAM),
            (from, SECRET_GPA + SECRET_SIZE, RESERVED),
            (SECRET_GPA + SECRET_SIZE, low, RAM),
        ]),
        None => ranges.push((HIGH_RAM, low, RAM)),
    }
    ranges.push((ECAM, ECAM + ECAM_SIZE, RESERVED));
    ranges.push((HIGH_MEMORY, HIGH_MEMORY + (memory - low), RAM));
    ranges
        .into_iter()
        .filter(|(start, end, _)| start < end)
        .map(|(start, end, kind)| MapEntry {
            start,
            length: end - start,
            kind,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::layout::{PAGE_SIZE, PCI_WINDOW, SNP_CPUID};

    fn ram(map: &[MapEntry]) -> u64 {
        let ram = map.iter().filter(|entry| entry.kind == RAM);
        ram.map(|entry| entry.length).sum()
    }

    #[test]
    fn what_is_reserved_is_in_the_map_and_nothing_overlaps() {
        for (from, length) in [
            (SECRET_GPA, SECRET_SIZE),
            (SNP_CPUID, 2 * PAGE_SIZE + SECRET_SIZE),
        ] {
            let map = memory_map(512 << 20, Some(from));
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].length <= pair[1].start);
            }
            let kept = MapEntry {
                start: from,
                length,
                kind: RESERVED,
            };
            assert!(map.contains(&kept));
            assert_eq!(ram(&map), (512 << 20) - (HIGH_RAM - LOW_RAM_END) - length);
        }
    }

    #[test]
    fn what_does_not_fit_below_the_pci_window_is_above_4_gib() {
        for memory in [64u64 << 20, 3 << 30, (3 << 30) + (2 << 20), 64 << 30] {
            let map = memory_map(memory, None);
            assert!(map.len() <= MAX_ENTRIES);
            assert_eq!(ram(&map), memory - (HIGH_RAM - LOW_RAM_END));
            let below = map.iter().filter(|entry| entry.kind == RAM);
            let below = below.filter(|entry| entry.start < HIGH_MEMORY);
            assert!(below.map(|e| e.start + e.length).max().unwrap() <= PCI_WINDOW);
            assert!(map.iter().any(|entry| entry.start == ECAM));
        }
    }
}
