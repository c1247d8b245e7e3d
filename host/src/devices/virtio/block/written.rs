//! Which blocks of a disk were written, for a mover that copies it while the guest goes on writing.

use super::medium::Extent;

/// A bit a block, while somebody keeps track.
#[derive(Default)]
pub(super) struct Written {
    words: Option<Vec<u64>>,
}

impl Written {
    /// Begins anew on a disk of so many bytes.
    pub(super) fn start(&mut self, bytes: u64) {
        let words = bytes.div_ceil(BLOCK).div_ceil(64);
        self.words = Some(vec![0; usize::try_from(words).unwrap_or(0)]);
    }

    pub(super) fn stop(&mut self) {
        self.words = None;
    }

    /// Notes an extent whose bytes have been, or may have been, changed. After the change: who takes the note before it
    /// would read the old bytes and never come back.
    pub(super) fn note(&mut self, extent: Extent) {
        let Some(words) = self.words.as_mut().filter(|_| extent.len > 0) else {
            return;
        };
        let last = (extent.offset + extent.len - 1) / BLOCK;
        for block in extent.offset / BLOCK..=last {
            let word = usize::try_from(block / 64).ok();
            if let Some(word) = word.and_then(|word| words.get_mut(word)) {
                *word |= 1 << (block % 64);
            }
        }
    }

    /// What was noted since the last call; nothing if nobody keeps track.
    pub(super) fn take(&mut self) -> Option<Vec<u64>> {
        let words = self.words.as_mut()?;
        let empty = vec![0; words.len()];
        Some(std::mem::replace(words, empty))
    }
}

/// As large as a page of memory: both travel alike.
pub(super) const BLOCK: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, len: u64) -> Extent {
        Extent { offset, len }
    }

    #[test]
    fn every_block_that_an_extent_touches_is_noted_once() {
        let mut written = Written::default();
        written.note(extent(0, 512));
        assert_eq!(written.take(), None, "nobody keeps track");
        written.start(BLOCK * 70);
        written.note(extent(4095, 2));
        written.note(extent(BLOCK * 64 + 512, 512));
        written.note(extent(BLOCK * 9, 0));
        written.note(extent(BLOCK * 500, 512));
        assert_eq!(written.take(), Some(vec![3, 1]));
        assert_eq!(written.take(), Some(vec![0, 0]));
        written.note(extent(BLOCK * 62, BLOCK * 3));
        assert_eq!(written.take(), Some(vec![3 << 62, 1]));
        written.stop();
        assert_eq!(written.take(), None);
    }
}
