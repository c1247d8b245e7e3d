//! Pages that check themselves: each holds its index, its version, and a keyed pattern derived from both.
//!
//! A lost, stale, torn, swapped or flipped page is then told apart from the right one, and which of these it was. It has
//! to be cheap, one addition a word: the guest may run under two layers of emulation.

/// One page or disk block, aligned so that it is exactly one page of the guest and fit for `O_DIRECT`.
#[repr(C, align(4096))]
#[derive(Clone)]
pub(crate) struct Page([u64; WORDS]);

impl Page {
    /// A page of zeroes.
    pub(crate) const ZERO: Self = Self([0; WORDS]);

    /// Writes the pattern of page `index` in its `version`.
    pub(crate) fn fill(&mut self, key: u64, index: u64, version: u64) {
        let mut word = seed(key, index, version);
        let [first, second, rest @ ..] = &mut self.0;
        (*first, *second) = (index, version);
        for place in rest {
            word = word.wrapping_add(STEP);
            *place = word;
        }
    }

    /// Compares with what [`Page::fill`] writes.
    pub(crate) fn check(&self, key: u64, index: u64, version: u64) -> Result<(), Mismatch> {
        let [found_index, found_version, rest @ ..] = &self.0;
        let mut word = seed(key, index, version);
        let mut different = (found_index ^ index) | (found_version ^ version);
        for place in rest {
            word = word.wrapping_add(STEP);
            different |= place ^ word;
        }
        if different == 0 {
            Ok(())
        } else {
            Err(self.mismatch(key, index, version))
        }
    }

    /// The page as bytes, little-endian.
    pub(crate) fn to_bytes(&self, bytes: &mut Block) {
        for (to, from) in bytes.0.as_chunks_mut::<8>().0.iter_mut().zip(&self.0) {
            *to = from.to_le_bytes();
        }
    }

    /// Takes the page from its bytes.
    pub(crate) fn load(&mut self, bytes: &Block) {
        for (to, from) in self.0.iter_mut().zip(bytes.0.as_chunks::<8>().0) {
            *to = u64::from_le_bytes(*from);
        }
    }

    /// Finds out, slowly, what is wrong.
    fn mismatch(&self, key: u64, index: u64, version: u64) -> Mismatch {
        let mut right = Self::ZERO;
        right.fill(key, index, version);
        let bad = self
            .0
            .iter()
            .zip(&right.0)
            .map(|(found, right)| found != right);
        let (mut first, mut count) = (None, 0);
        for (place, _) in bad.enumerate().filter(|(_, bad)| *bad) {
            first.get_or_insert(place);
            count += 1;
        }
        let [found_index, found_version, ..] = self.0;
        Mismatch {
            index,
            version,
            found_index,
            found_version,
            first_bad_word: first.unwrap_or(0),
            bad_words: count,
        }
    }
}

/// A page's bytes, aligned for `O_DIRECT`.
#[repr(C, align(4096))]
pub(crate) struct Block(pub(crate) [u8; PAGE]);

/// How a page differs from what it should be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    index: u64,
    version: u64,
    found_index: u64,
    found_version: u64,
    first_bad_word: usize,
    bad_words: usize,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            index,
            version,
            found_index,
            found_version,
            first_bad_word,
            bad_words,
        } = self;
        write!(
            f,
            "{index} version {version}: found {found_index} version {found_version}, {bad_words} words wrong \
             from word {first_bad_word}"
        )
    }
}

/// A key for this boot. It keeps one guest's pages from passing for another's; it is no secret.
pub(crate) fn boot_key() -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    mix(now.as_nanos() as u64)
}

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
/// Odd, so that no word of a page repeats.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

fn seed(key: u64, index: u64, version: u64) -> u64 {
    mix(mix(key ^ index) ^ version)
}

/// The finaliser of SplitMix64: every input bit reaches every output bit.
fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(key: u64, index: u64, version: u64) -> Page {
        let mut page = Page::ZERO;
        page.fill(key, index, version);
        page
    }

    #[test]
    fn what_is_filled_checks() {
        assert_eq!(page(1, 2, 3).check(1, 2, 3), Ok(()));
        assert_eq!(size_of::<Page>(), PAGE);
        assert_eq!(align_of::<Page>(), PAGE);
    }

    #[test]
    fn another_page_an_older_version_and_another_key_are_noticed() {
        assert_eq!(page(1, 9, 3).check(1, 2, 3).unwrap_err().found_index, 9);
        assert_eq!(page(1, 2, 2).check(1, 2, 3).unwrap_err().found_version, 2);
        assert_eq!(page(7, 2, 3).check(1, 2, 3).unwrap_err().first_bad_word, 2);
        assert!(
            Page::ZERO.check(0, 0, 0).is_err(),
            "a page that never arrived"
        );
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let good = page(1, 2, 3);
        for bit in (0..WORDS * 64).step_by(61) {
            let mut bad = good.clone();
            bad.0[bit / 64] ^= 1 << (bit % 64);
            let mismatch = bad.check(1, 2, 3).unwrap_err();
            assert_eq!((mismatch.first_bad_word, mismatch.bad_words), (bit / 64, 1));
        }
    }

    #[test]
    fn a_torn_page_is_noticed() {
        let mut torn = page(1, 2, 4);
        torn.0[256..].copy_from_slice(&page(1, 2, 3).0[256..]);
        let mismatch = torn.check(1, 2, 4).unwrap_err();
        assert_eq!((mismatch.first_bad_word, mismatch.bad_words), (256, 256));
        assert!(
            mismatch
                .to_string()
                .starts_with("2 version 4: found 2 version 4, 256 words wrong from word 256")
        );
    }

    #[test]
    fn bytes_round_trip() {
        let (mut block, mut back) = (Block([0; PAGE]), Page::ZERO);
        page(5, 6, 7).to_bytes(&mut block);
        back.load(&block);
        assert_eq!(back.check(5, 6, 7), Ok(()));
        assert_eq!(block.0[..8], 6_u64.to_le_bytes());
    }
}
