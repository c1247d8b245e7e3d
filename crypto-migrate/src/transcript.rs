//! The manifest: what both ends must agree on, to the last page, before anything resumes.
//!
//! Each end folds the newest version of every page (guest page, round, kind, tag) into a sum of keyed PRFs
//! modulo 2^256; a page that is sent again has its old term taken out. The sum costs one HMAC a page as it
//! passes and nothing during the pause. The table needs 24 bytes per guest page.

use serde::{Deserialize, Serialize};

use crate::code::Code;
use crate::crypto::{self, MacKey, TAG_SIZE};
use crate::guest::PageRange;
use crate::wire::batch::PageKind;
use crate::wire::messages::Message;
use crate::wire::{FrameKind, WireError};

/// Pages one guest may have (1 TiB).
pub const MAX_PAGES: u64 = 1 << 28;
/// Ranges of memory one guest may have.
pub const MAX_RANGES: usize = 64;

/// A page that does not fit the transcript.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TranscriptError {
    /// Outside the offered memory.
    #[error("page {0:#x} is outside the memory that was offered")]
    OutOfRange(u64),
    /// Twice in one round.
    #[error("page {0:#x} came twice in one round")]
    Duplicated(u64),
    /// The offered memory is not a set of ascending ranges within bounds.
    #[error(
        "the offered memory is empty, overlaps, or exceeds {MAX_RANGES} ranges or {MAX_PAGES} pages"
    )]
    Memory,
}

impl TranscriptError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            TranscriptError::OutOfRange(_) => Code::PageOutOfRange,
            TranscriptError::Duplicated(_) => Code::PageDuplicated,
            TranscriptError::Memory => Code::OfferInvalid,
        }
    }
}

/// The newest version of every page, and their sum.
pub struct PageTable {
    ranges: Vec<PlacedRange>,
    slots: Vec<Slot>,
    key: MacKey,
    sum: Sum,
    present: u64,
}

impl PageTable {
    pub(crate) fn new(memory: &[PageRange], key: MacKey) -> Result<Self, TranscriptError> {
        let pages = check_memory(memory)?;
        let mut offset = 0;
        let mut ranges = Vec::with_capacity(memory.len());
        for range in memory {
            ranges.push(PlacedRange {
                start: range.start.0,
                count: range.count,
                offset,
            });
            offset += range.count;
        }
        let length = usize::try_from(pages).map_err(|_| TranscriptError::Memory)?;
        Ok(Self {
            ranges,
            slots: vec![Slot::default(); length],
            key,
            sum: Sum::default(),
            present: 0,
        })
    }

    /// Records a version of `count` pages from `page`.
    pub fn record(
        &mut self,
        page: u64,
        count: u32,
        round: u32,
        kind: PageKind,
        tag: &[u8; TAG_SIZE],
    ) -> Result<(), TranscriptError> {
        let first = self.index(page, count)?;
        for step in 0..count {
            let page = page + u64::from(step);
            let index = usize::try_from(u64::from(step))
                .map_or(usize::MAX, |step| first.saturating_add(step));
            let slot = self
                .slots
                .get_mut(index)
                .ok_or(TranscriptError::OutOfRange(page))?;
            if slot.round == round {
                return Err(TranscriptError::Duplicated(page));
            }
            if slot.round == 0 {
                self.present += 1;
            } else {
                self.sum.subtract(&slot.term(page, &self.key));
            }
            *slot = Slot {
                round,
                kind: kind as u8,
                tag: *tag,
            };
            self.sum.add(&slot.term(page, &self.key));
        }
        Ok(())
    }

    /// What this end holds.
    pub fn manifest(&self, stream: StreamEnd, state: &[u8], offer_hash: [u8; 32]) -> Manifest {
        Manifest {
            pages: self.present,
            pages_sum: self.sum.to_bytes(),
            seals: stream.seals,
            rounds: stream.rounds,
            epoch: stream.epoch,
            state_length: state.len() as u64,
            state_sha256: crypto::sha256(&[state]),
            offer_sha256: offer_hash,
        }
    }

    fn index(&self, page: u64, count: u32) -> Result<usize, TranscriptError> {
        let count = u64::from(count);
        self.ranges
            .iter()
            .find_map(|range| {
                let within = page.checked_sub(range.start)?;
                let fits = within.checked_add(count)? <= range.count;
                fits.then(|| usize::try_from(range.offset + within).ok())
                    .flatten()
            })
            .ok_or(TranscriptError::OutOfRange(page))
    }
}

/// How the stream ended.
#[derive(Clone, Copy, Debug)]
pub struct StreamEnd {
    /// Page seals made.
    pub seals: u64,
    /// Rounds, the last included.
    pub rounds: u32,
    /// The epoch that the source holds.
    pub epoch: u64,
}

/// What one end holds: the content of the last frame before the switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Distinct pages.
    pub pages: u64,
    /// The sum over their newest versions.
    pub pages_sum: [u8; 32],
    /// Page seals made.
    pub seals: u64,
    /// Rounds, the last included.
    pub rounds: u32,
    /// The epoch that the source holds.
    pub epoch: u64,
    /// Bytes of machine state.
    pub state_length: u64,
    /// Their digest.
    pub state_sha256: [u8; 32],
    /// Digest of the signed offer (identity, description, memory).
    pub offer_sha256: [u8; 32],
}

impl Message for Manifest {
    const KIND: FrameKind = FrameKind::Manifest;
}

impl Manifest {
    /// The root: one digest over everything, for logs and evidence.
    pub fn root(&self) -> Result<[u8; 48], WireError> {
        Ok(crypto::sha384(&[
            b"casemate-migrate/1 manifest",
            &self.encode()?,
        ]))
    }
}

/// Checks that memory is ascending, without overlap and within bounds; returns the number of pages.
pub fn check_memory(memory: &[PageRange]) -> Result<u64, TranscriptError> {
    let mut end = 0u64;
    let mut pages = 0u64;
    for range in memory {
        if range.count == 0 || range.start.0 < end {
            return Err(TranscriptError::Memory);
        }
        end = range
            .start
            .0
            .checked_add(range.count)
            .ok_or(TranscriptError::Memory)?;
        pages = pages
            .checked_add(range.count)
            .ok_or(TranscriptError::Memory)?;
    }
    if pages == 0 || pages > MAX_PAGES || end > MAX_GPN || memory.len() > MAX_RANGES {
        return Err(TranscriptError::Memory);
    }
    Ok(pages)
}

struct PlacedRange {
    start: u64,
    count: u64,
    offset: u64,
}

/// Round 0: no version yet.
#[derive(Clone, Copy, Default)]
struct Slot {
    round: u32,
    kind: u8,
    tag: [u8; TAG_SIZE],
}

impl Slot {
    fn term(&self, page: u64, key: &MacKey) -> [u8; 32] {
        let mut message = [0; 8 + 4 + 1 + TAG_SIZE];
        let fields = page
            .to_le_bytes()
            .into_iter()
            .chain(self.round.to_le_bytes())
            .chain([self.kind])
            .chain(self.tag);
        message.iter_mut().zip(fields).for_each(|(m, f)| *m = f);
        key.mac(&message)
    }
}

/// A number modulo 2^256, little-endian limbs.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Sum([u64; 4]);

impl Sum {
    fn add(&mut self, term: &[u8; 32]) {
        let mut carry = false;
        for (limb, add) in self.0.iter_mut().zip(limbs(term)) {
            let (sum, over) = limb.overflowing_add(add);
            let (sum, again) = sum.overflowing_add(u64::from(carry));
            *limb = sum;
            carry = over || again;
        }
    }

    fn subtract(&mut self, term: &[u8; 32]) {
        let mut borrow = false;
        for (limb, sub) in self.0.iter_mut().zip(limbs(term)) {
            let (difference, under) = limb.overflowing_sub(sub);
            let (difference, again) = difference.overflowing_sub(u64::from(borrow));
            *limb = difference;
            borrow = under || again;
        }
    }

    fn to_bytes(self) -> [u8; 32] {
        let mut out = [0; 32];
        let bytes = self.0.iter().flat_map(|limb| limb.to_le_bytes());
        out.iter_mut().zip(bytes).for_each(|(o, b)| *o = b);
        out
    }
}

fn limbs(term: &[u8; 32]) -> impl Iterator<Item = u64> + '_ {
    term.as_chunks::<8>()
        .0
        .iter()
        .map(|limb| u64::from_le_bytes(*limb))
}

const MAX_GPN: u64 = 1 << 40; // 52 bits of guest physical address

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::KeySchedule;
    use crate::guest::Gpn;

    fn table() -> PageTable {
        let memory = [range(0, 16), range(100, 16)];
        PageTable::new(&memory, KeySchedule::extract(b"s", b"k").mac(b"m").unwrap()).unwrap()
    }

    fn range(start: u64, count: u64) -> PageRange {
        PageRange {
            start: Gpn(start),
            count,
        }
    }

    #[test]
    fn order_does_not_matter_but_versions_do() {
        let (mut a, mut b, mut c) = (table(), table(), table());
        a.record(1, 1, 1, PageKind::Data, &[1; 16]).unwrap();
        a.record(100, 4, 1, PageKind::Zero, &[2; 16]).unwrap();
        a.record(1, 1, 2, PageKind::Data, &[3; 16]).unwrap();
        b.record(100, 4, 1, PageKind::Zero, &[2; 16]).unwrap();
        b.record(1, 1, 2, PageKind::Data, &[3; 16]).unwrap();
        c.record(100, 4, 1, PageKind::Zero, &[2; 16]).unwrap();
        c.record(1, 1, 2, PageKind::Data, &[1; 16]).unwrap();
        assert_eq!((a.sum, a.present), (b.sum, 5));
        assert_ne!(a.sum, c.sum);
    }

    #[test]
    fn manifest_covers_pages_state_offer_and_counts() {
        let end = StreamEnd {
            seals: 3,
            rounds: 2,
            epoch: 5,
        };
        let mut full = table();
        full.record(1, 1, 1, PageKind::Data, &[1; 16]).unwrap();
        let root = |table: &PageTable, end, state: &[u8], offer| {
            table.manifest(end, state, offer).root().unwrap()
        };
        let base = root(&full, end, b"state", [0; 32]);
        assert_eq!(base, root(&full, end, b"state", [0; 32]));
        assert_ne!(base, root(&table(), end, b"state", [0; 32]));
        assert_ne!(base, root(&full, end, b"stat", [0; 32]));
        assert_ne!(base, root(&full, end, b"state", [1; 32]));
        assert_ne!(
            base,
            root(&full, StreamEnd { seals: 4, ..end }, b"state", [0; 32])
        );
        assert_ne!(
            base,
            root(&full, StreamEnd { epoch: 6, ..end }, b"state", [0; 32])
        );
    }

    #[test]
    fn out_of_range_and_duplicates_are_refused() {
        let mut table = table();
        assert_eq!(
            table.record(16, 1, 1, PageKind::Data, &[0; 16]),
            Err(TranscriptError::OutOfRange(16))
        );
        assert_eq!(
            table.record(15, 2, 1, PageKind::Zero, &[0; 16]),
            Err(TranscriptError::OutOfRange(15))
        );
        table.record(3, 1, 1, PageKind::Data, &[0; 16]).unwrap();
        assert_eq!(
            table.record(3, 1, 1, PageKind::Data, &[0; 16]),
            Err(TranscriptError::Duplicated(3))
        );
    }

    #[test]
    fn memory_bounds() {
        assert!(check_memory(&[]).is_err());
        assert!(check_memory(&[range(0, 0)]).is_err());
        assert!(check_memory(&[range(4, 4), range(7, 1)]).is_err());
        assert!(check_memory(&[range(u64::MAX, 2)]).is_err());
        assert!(check_memory(&[range(0, MAX_PAGES + 1)]).is_err());
        assert_eq!(check_memory(&[range(0, 4), range(8, 2)]), Ok(6));
    }

    proptest! {
        #[test]
        fn subtract_undoes_add(a: [u8; 32], b: [u8; 32]) {
            let mut sum = Sum::default();
            sum.add(&a);
            let before = sum;
            sum.add(&b);
            sum.subtract(&b);
            prop_assert_eq!(sum, before);
        }
    }
}
