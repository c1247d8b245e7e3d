//! Fixed-offset reads that cannot run past the end of what was received.

/// `N` bytes at `offset`, or `None` where the buffer ends sooner.
pub(crate) fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    let end = offset.checked_add(N)?;
    bytes.get(offset..end)?.try_into().ok()
}

/// A little-endian `u32` at `offset`.
pub(crate) fn le32(bytes: &[u8], offset: usize) -> Option<u32> {
    array(bytes, offset).map(u32::from_le_bytes)
}

/// The same bytes in the opposite order: AMD stores big numbers little-endian.
pub(crate) fn reversed(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().rev().copied().collect()
}

/// Appends `bytes` reversed and zero-filled to `field` bytes; longer input is cut by the caller.
pub(crate) fn push_reversed(out: &mut Vec<u8>, bytes: &[u8], field: usize) {
    let start = out.len();
    out.extend(bytes.iter().rev());
    out.resize(start.saturating_add(field), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_end_with_the_buffer() {
        let bytes = [1, 2, 3, 4, 5];
        assert_eq!(le32(&bytes, 1), Some(0x0504_0302));
        assert_eq!(le32(&bytes, 2), None);
        assert_eq!(array::<1>(&bytes, usize::MAX), None);
    }

    #[test]
    fn numbers_are_turned_round_and_filled() {
        let mut out = vec![9];
        push_reversed(&mut out, &[1, 2], 4);
        assert_eq!(out, [9, 2, 1, 0, 0]);
    }
}
