//! Pages of guest memory given back to the host: holes in the file that guest memory is.

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::super::GuestRam;
use super::super::ring::Segments;

/// The balloon's page, whatever the guest's is.
pub(super) const PAGE: u64 = 4096;

/// The page numbers of a request, in runs of neighbours; nothing if they are too many or not whole.
pub(super) fn runs_of(request: &Segments<'_>) -> Option<Vec<(u32, u32)>> {
    let len = request.len();
    if len == 0 || !len.is_multiple_of(4) || len > NUMBERS_MAX * 4 {
        return None;
    }
    let mut bytes = vec![0; len];
    if request.read_at(0, &mut bytes) != len {
        return None;
    }
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut numbers: Vec<u32> = numbers.iter().map(|n| u32::from_le_bytes(*n)).collect();
    // Linux takes pages from the top of free lists: downwards as often as upwards.
    numbers.sort_unstable();
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((first, count)) if first.checked_add(*count) == Some(number) => *count += 1,
            Some((first, count)) if number < first.saturating_add(*count) => {} // twice
            _ => runs.push((number, 1)),
        }
    }
    Some(runs)
}

/// Gives a range back. How many bytes: none while the file is sealed (a mover reads it); nothing if the range is not
/// whole pages of guest memory.
pub(super) fn give_back(ram: &GuestRam, gpa: u64, len: u64) -> Option<u64> {
    let region = ram.find_region(GuestAddress(gpa))?;
    let offset = gpa - region.start_addr().0;
    if !gpa.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || len > region.len() - offset {
        return None;
    }
    let file = region.file_offset()?;
    let at = i64::try_from(file.start().checked_add(offset)?).ok()?;
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file.file(), mode, at, i64::try_from(len).ok()?) {
        Ok(()) => {
            // Its content is another now, and a copy of the guest must know.
            region
                .bitmap()
                .mark_dirty(usize::try_from(offset).ok()?, usize::try_from(len).ok()?);
            Some(len)
        }
        Err(error) => {
            tracing::debug!(%error, "memory of the balloon stays the guest's");
            Some(0)
        }
    }
}

/// The same for ranges that the guest named as buffers.
pub(super) fn give_back_slices(ram: &GuestRam, ranges: &Segments<'_>) -> Option<u64> {
    let mut bytes = 0;
    for slice in ranges.slices() {
        let start = slice.ptr_guard().as_ptr().addr();
        let region = ram.iter().find_map(|region| {
            let offset = start.checked_sub(region.as_ptr().addr())? as u64;
            (offset < region.len()).then_some(region.start_addr().0 + offset)
        })?;
        bytes += give_back(ram, region, slice.len() as u64)?;
    }
    Some(bytes)
}

/// Page numbers in one request; Linux sends 256.
const NUMBERS_MAX: usize = 4096;
