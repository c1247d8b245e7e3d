//! The manifest: what both ends must agree on, to the last page, before anything resumes.
//!
//! Each end digests every seal in the order of its stream: its clear header (guest page, count, round, kind) and
//! its tag. Seals of a stream are numbered without a gap, a page comes once a round on one stream alone, no round begins
//! before all streams have ended the one before, and a later version of a page replaces the earlier; so the digests fix
//! the newest version of every page, and two bits a guest page suffice: whether it came at all, whether it came
//! in this round.

use serde::{Deserialize, Serialize};

use crate::code::Code;
use crate::crypto::{self, RunningSha256, TAG_SIZE};
use crate::guest::{EXTENT_PAGES, Gpn, PAGE_SIZE, PageRange};
use crate::pages::PageSet;
use crate::wire::batch::EntryHeader;
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

/// Which pages came, over all streams.
pub struct PageTable {
    present: PageSet,
    this_round: PageSet,
    round: u32,
}

impl PageTable {
    pub(crate) fn new(memory: &[PageRange]) -> Result<Self, TranscriptError> {
        check_memory(memory)?;
        let none = PageSet::empty(memory);
        Ok(Self {
            present: none.clone(),
            this_round: none,
            round: 0,
        })
    }

    /// Records `header.count` pages. Rounds come in order.
    pub fn record(&mut self, header: &EntryHeader) -> Result<(), TranscriptError> {
        self.record_run(header.page, header.count, header.round)
    }

    /// The same for pages whose seal is still to be made.
    pub(crate) fn record_run(
        &mut self,
        first: u64,
        count: u32,
        round: u32,
    ) -> Result<(), TranscriptError> {
        let (page, count) = (Gpn(first), u64::from(count));
        if !self.present.covers(page, count) {
            return Err(TranscriptError::OutOfRange(first));
        }
        if round != self.round {
            self.round = round;
            self.this_round.clear();
        }
        if let Some(twice) = self.this_round.first_of(page, count) {
            return Err(TranscriptError::Duplicated(twice.0));
        }
        self.this_round.insert_run(page, count);
        self.present.insert_run(page, count);
        Ok(())
    }

    /// The pages that came.
    pub fn present(&self) -> &PageSet {
        &self.present
    }

    /// What this end holds.
    pub fn manifest<'a>(
        &self,
        streams: impl IntoIterator<Item = &'a SealLog>,
        end: StreamEnd,
        state: &[u8],
        offer_hash: [u8; 32],
    ) -> Manifest {
        let mut digests = RunningSha256::default();
        let streams = streams.into_iter().map(|log| {
            digests.update(&log.digest.digest());
            log.count
        });
        let streams = streams.collect();
        Manifest {
            pages: self.present.len(),
            seals_sha256: digests.digest(),
            streams,
            rounds: end.rounds,
            epoch: end.epoch,
            state_length: state.len() as u64,
            state_sha256: crypto::sha256(&[state]),
            offer_sha256: offer_hash,
            content_sha256: end.content_sha256,
        }
    }
}

/// How much one stream carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamCount {
    /// Page seals.
    pub seals: u64,
    /// Pages under them, zero pages included, each as often as it was sent.
    pub pages: u64,
}

/// The seals of one stream in their order.
#[derive(Default)]
pub struct SealLog {
    digest: RunningSha256,
    count: StreamCount,
}

impl SealLog {
    /// Adds the next one.
    pub fn add(&mut self, header: &EntryHeader, tag: &[u8; TAG_SIZE]) {
        self.digest.update(&header.encode());
        self.digest.update(tag);
        self.count.seals += 1;
        self.count.pages += u64::from(header.count);
    }
}

/// How the streams ended.
#[derive(Clone, Copy, Debug)]
pub struct StreamEnd {
    /// Rounds, the last included.
    pub rounds: u32,
    /// The epoch that the source holds.
    pub epoch: u64,
    /// [`ContentDigest`] of the memory, where the source asks for its comparison.
    pub content_sha256: Option<[u8; 32]>,
}

/// SHA-256 over what memory holds: of each page that is not zero, in ascending order, its number (eight bytes, little
/// endian) and its bytes. Independent of how the pages travelled.
#[derive(Default)]
pub struct ContentDigest(RunningSha256);

impl ContentDigest {
    /// Of these pages, which `read` gives: runs of at most [`EXTENT_PAGES`] that follow one another.
    pub fn over<E>(
        pages: &PageSet,
        mut read: impl FnMut(Gpn, &mut [u8]) -> Result<(), E>,
    ) -> Result<[u8; 32], E> {
        let mut digest = Self::default();
        let mut buffer = [0; EXTENT_PAGES * PAGE_SIZE];
        let mut pages = pages.iter().peekable();
        while let Some(first) = pages.next() {
            let mut count = 1;
            while count < EXTENT_PAGES
                && pages
                    .next_if(|page| page.0 == first.0 + count as u64)
                    .is_some()
            {
                count += 1;
            }
            let bytes = buffer.get_mut(..count * PAGE_SIZE).unwrap_or_default();
            read(first, bytes)?;
            digest.add(first, bytes);
        }
        Ok(digest.finish())
    }

    /// Adds pages that follow one another, whole ones.
    pub fn add(&mut self, first: Gpn, pages: &[u8]) {
        let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
        for (number, page) in (first.0..).zip(pages) {
            if *page != [0; PAGE_SIZE] {
                self.0.update(&number.to_le_bytes());
                self.0.update(page);
            }
        }
    }

    /// The digest.
    pub fn finish(&self) -> [u8; 32] {
        self.0.digest()
    }
}

/// What one end holds: the content of the last frame before the switch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Distinct pages.
    pub pages: u64,
    /// Digest over the digests of the streams, each of all its page seals in their order.
    pub seals_sha256: [u8; 32],
    /// What each stream carried, the first connection's first.
    pub streams: Vec<StreamCount>,
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
    /// [`ContentDigest`] of the memory, where the source asked for its comparison.
    pub content_sha256: Option<[u8; 32]>,
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

const MAX_GPN: u64 = 1 << 40; // 52 bits of guest physical address

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::batch::PageKind;

    fn table() -> PageTable {
        PageTable::new(&[range(0, 16), range(100, 16)]).unwrap()
    }

    fn seal(page: u64, count: u32, round: u32) -> EntryHeader {
        EntryHeader {
            sequence: 0,
            page,
            count,
            round,
            session: [1; 4],
            stream: 0,
            kind: PageKind::Zero,
        }
    }

    fn range(start: u64, count: u64) -> PageRange {
        PageRange {
            start: Gpn(start),
            count,
        }
    }

    #[test]
    fn every_seal_counts_and_so_does_its_place() {
        let digest = |seals: &[(EntryHeader, u8)]| {
            let (mut table, mut log) = (table(), SealLog::default());
            for (header, tag) in seals {
                table.record(header).unwrap();
                log.add(header, &[*tag; 16]);
            }
            (log.digest.digest(), table.present.len())
        };
        let base = digest(&[(seal(1, 1, 1), 1), (seal(100, 4, 1), 2)]);
        assert_eq!(base.1, 5);
        assert_eq!(base, digest(&[(seal(1, 1, 1), 1), (seal(100, 4, 1), 2)]));
        for other in [
            [(seal(1, 1, 1), 1), (seal(100, 4, 1), 3)],
            [(seal(100, 4, 1), 2), (seal(1, 1, 1), 1)],
            [(seal(2, 1, 1), 1), (seal(100, 4, 1), 2)],
            [(seal(1, 1, 1), 1), (seal(100, 3, 1), 2)],
            [(seal(1, 1, 1), 1), (seal(100, 4, 2), 2)],
        ] {
            assert_ne!(base.0, digest(&other).0, "{other:?}");
        }
        let again = digest(&[(seal(1, 1, 1), 1), (seal(1, 1, 2), 1)]);
        assert_eq!(again.1, 1, "a newer version is no further page");
    }

    #[test]
    fn manifest_covers_pages_state_offer_and_counts() {
        let end = StreamEnd {
            rounds: 2,
            epoch: 5,
            content_sha256: None,
        };
        let mut full = table();
        full.record(&seal(1, 1, 1)).unwrap();
        let log = |tags: &[u8]| {
            let mut log = SealLog::default();
            tags.iter()
                .for_each(|tag| log.add(&seal(1, 1, 1), &[*tag; 16]));
            log
        };
        let streams = [log(&[1]), log(&[2, 3])];
        let of = |streams: &[SealLog]| {
            let manifest = full.manifest(streams, end, b"state", [0; 32]);
            (manifest.streams.clone(), manifest.root().unwrap())
        };
        let two = of(&streams);
        let counts = [1, 2].map(|n| StreamCount { seals: n, pages: n });
        assert_eq!(two.0, counts);
        for other in [
            vec![log(&[1])],
            vec![log(&[1]), log(&[2])],
            vec![log(&[1]), log(&[3, 2])],
            vec![log(&[2, 3]), log(&[1])],
            vec![log(&[1, 2]), log(&[3])],
            vec![log(&[1]), log(&[2, 3]), log(&[])],
        ] {
            assert_ne!(two.1, of(&other).1);
        }
        let root = |table: &PageTable, end, state: &[u8], offer| {
            let manifest = table.manifest(&streams, end, state, offer);
            manifest.root().unwrap()
        };
        let base = root(&full, end, b"state", [0; 32]);
        assert_eq!(base, root(&full, end, b"state", [0; 32]));
        assert_ne!(base, root(&table(), end, b"state", [0; 32]));
        assert_ne!(base, root(&full, end, b"stat", [0; 32]));
        assert_ne!(base, root(&full, end, b"state", [1; 32]));
        assert_ne!(
            base,
            root(&full, StreamEnd { rounds: 4, ..end }, b"state", [0; 32])
        );
        assert_ne!(
            base,
            root(&full, StreamEnd { epoch: 6, ..end }, b"state", [0; 32])
        );
        let content_sha256 = Some([0; 32]);
        let compared = StreamEnd {
            content_sha256,
            ..end
        };
        assert_ne!(base, root(&full, compared, b"state", [0; 32]));
    }

    #[test]
    fn content_is_pages_at_their_places_and_zero_pages_are_none() {
        let digest = |pieces: &[(u64, Vec<u8>)]| {
            let mut digest = ContentDigest::default();
            pieces
                .iter()
                .for_each(|(at, bytes)| digest.add(Gpn(*at), bytes));
            digest.finish()
        };
        let (one, two) = (vec![1; PAGE_SIZE], vec![2; PAGE_SIZE]);
        let base = digest(&[(7, one.clone()), (8, two.clone())]);
        assert_eq!(base, digest(&[(7, [one.clone(), two.clone()].concat())]));
        let spread = [
            (3, vec![0; 2 * PAGE_SIZE]),
            (7, one.clone()),
            (8, two.clone()),
        ];
        assert_eq!(base, digest(&spread));
        let memory = [PageRange {
            start: Gpn(0),
            count: 64,
        }];
        let read = |first: Gpn, into: &mut [u8]| -> Result<(), ()> {
            for (page, into) in (first.0..).zip(into.chunks_exact_mut(PAGE_SIZE)) {
                into.fill(match page {
                    7 => 1,
                    8 => 2,
                    _ => 0,
                });
            }
            Ok(())
        };
        assert_eq!(Ok(base), ContentDigest::over(&PageSet::all(&memory), read));
        for other in [
            vec![(7, one.clone())],
            vec![(7, one.clone()), (9, two.clone())],
            vec![(7, two), (8, one)],
        ] {
            assert_ne!(base, digest(&other));
        }
    }

    #[test]
    fn out_of_range_and_duplicates_are_refused() {
        let mut table = table();
        let mut record = |page, count, round| table.record(&seal(page, count, round));
        assert_eq!(record(16, 1, 1), Err(TranscriptError::OutOfRange(16)));
        assert_eq!(record(15, 2, 1), Err(TranscriptError::OutOfRange(15)));
        assert_eq!(record(3, 1, 1), Ok(()));
        assert_eq!(record(3, 1, 1), Err(TranscriptError::Duplicated(3)));
        assert_eq!(record(2, 4, 1), Err(TranscriptError::Duplicated(3)));
        assert_eq!(record(3, 1, 2), Ok(()), "a new round");
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
}
