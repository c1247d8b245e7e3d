//! The bytes of a snapshot: header and index, parsed once. Nothing here is authenticated yet.

use super::VaultError;
use crate::crypto::TAG_SIZE;
use crate::guest::PAGE_SIZE;

/// What a snapshot says of itself in clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its own, random.
    pub snapshot_id: [u8; 16],
    /// The guest's.
    pub vm_id: [u8; 16],
    /// Rises by one with each snapshot of a guest.
    pub generation: u64,
    /// Pages of guest memory.
    pub pages: u64,
    /// Pages that are in the file.
    pub data_pages: u64,
    /// Runs in the index.
    pub runs: u32,
    /// Bytes of the description.
    pub description: u32,
    /// Bytes of the machine state.
    pub state: u32,
}

impl Header {
    /// Parses the first [`HEADER_SIZE`] bytes; every number is within its bounds afterwards.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<Self, VaultError> {
        let mut rest = bytes.as_slice();
        if take::<8>(&mut rest)? != *MAGIC {
            return Err(VaultError::Malformed);
        }
        let version = u16::from_le_bytes(take(&mut rest)?);
        if version != VERSION {
            return Err(VaultError::Version(version));
        }
        if take::<6>(&mut rest)? != [0; 6] {
            return Err(VaultError::Malformed);
        }
        let header = Self {
            snapshot_id: take(&mut rest)?,
            vm_id: take(&mut rest)?,
            generation: u64::from_le_bytes(take(&mut rest)?),
            pages: u64::from_le_bytes(take(&mut rest)?),
            data_pages: u64::from_le_bytes(take(&mut rest)?),
            runs: u32::from_le_bytes(take(&mut rest)?),
            description: u32::from_le_bytes(take(&mut rest)?),
            state: u32::from_le_bytes(take(&mut rest)?),
        };
        let reserved = rest.get(..rest.len() - MAC_SIZE).unwrap_or_default();
        if reserved.iter().any(|byte| *byte != 0) {
            return Err(VaultError::Malformed);
        }
        header.check()?;
        Ok(header)
    }

    pub(super) fn check(&self) -> Result<(), VaultError> {
        let bounds = [
            (self.pages > 0 && self.pages <= MAX_PAGES, "memory"),
            (self.data_pages <= self.pages, "number of pages"),
            (
                u64::from(self.runs) <= self.data_pages && self.runs as usize <= MAX_RUNS,
                "number of runs",
            ),
            (self.description as usize <= MAX_DESCRIPTION, "description"),
            (self.state as usize <= MAX_STATE, "machine state"),
        ];
        match bounds.iter().find(|(kept, _)| !kept) {
            Some((_, what)) => Err(VaultError::Bounds(what)),
            None => Ok(()),
        }
    }

    /// Everything but the MAC.
    pub(super) fn encode(&self) -> [u8; CLEAR_SIZE] {
        let mut bytes = [0; CLEAR_SIZE];
        let fields = MAGIC
            .iter()
            .copied()
            .chain(VERSION.to_le_bytes())
            .chain([0; 6])
            .chain(self.snapshot_id)
            .chain(self.vm_id)
            .chain(self.generation.to_le_bytes())
            .chain(self.pages.to_le_bytes())
            .chain(self.data_pages.to_le_bytes())
            .chain(self.runs.to_le_bytes())
            .chain(self.description.to_le_bytes())
            .chain(self.state.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(b, f)| *b = f);
        bytes
    }

    /// Where the part begins, and its plain length. All sums stay far below 2^64: every number is bounded.
    pub(super) fn part(&self, part: Part) -> (u64, usize) {
        let index = PAGES_AT + self.data_pages * PAGE_SIZE as u64;
        let index_size = self.runs as usize * RUN_SIZE + self.data_pages as usize * TAG_SIZE;
        let description = index + (PART_OVERHEAD + index_size) as u64;
        let state = description + PART_OVERHEAD as u64 + u64::from(self.description);
        match part {
            Part::Index => (index, index_size),
            Part::Description => (description, self.description as usize),
            Part::State => (state, self.state as usize),
        }
    }

    /// Size of the whole file.
    pub(super) fn size(&self) -> u64 {
        let (at, length) = self.part(Part::State);
        at + (PART_OVERHEAD + length) as u64
    }

    /// Associated data of the page at `slot`.
    pub(super) fn page_aad(&self, page: u64, slot: u64) -> [u8; 58] {
        let mut aad = [0; 58];
        let fields = VERSION
            .to_le_bytes()
            .into_iter()
            .chain(self.snapshot_id)
            .chain(self.vm_id)
            .chain(self.generation.to_le_bytes())
            .chain(page.to_le_bytes())
            .chain(slot.to_le_bytes());
        aad.iter_mut().zip(fields).for_each(|(a, f)| *a = f);
        aad
    }
}

/// A sealed part behind the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Index,
    Description,
    State,
}

impl Part {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Index => "index",
            Self::Description => "description",
            Self::State => "machine state",
        }
    }

    /// Counter of its seal: each part is sealed once.
    pub(super) fn counter(self) -> u64 {
        self as u64
    }
}

/// A run of data pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
    /// Slot of the first.
    pub(super) slot: u64,
}

/// Where each data page lies, and its tag.
pub(super) struct Index {
    pub(super) runs: Vec<Run>,
    pub(super) tags: Vec<[u8; TAG_SIZE]>,
}

impl Index {
    /// Parses an index whose seal has opened: ascending, apart, within memory, as many as the header says.
    pub(super) fn parse(bytes: &[u8], header: &Header) -> Result<Self, VaultError> {
        let wrong = VaultError::Bounds("index");
        let mut rest = bytes;
        let (mut runs, mut next, mut slot) = (Vec::new(), 0u64, 0u64);
        for _ in 0..header.runs {
            let first = u64::from_le_bytes(take(&mut rest)?);
            let count = u64::from_le_bytes(take(&mut rest)?);
            let end = first.checked_add(count).filter(|end| *end <= header.pages);
            let (Some(end), true) = (end, first >= next && count > 0) else {
                return Err(wrong);
            };
            runs.push(Run { first, count, slot });
            (next, slot) = (end, slot + count);
        }
        let (tags, behind) = rest.as_chunks::<TAG_SIZE>();
        if slot != header.data_pages || tags.len() as u64 != slot || !behind.is_empty() {
            return Err(wrong);
        }
        Ok(Self {
            runs,
            tags: tags.to_vec(),
        })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let runs = self.runs.iter().flat_map(|run| [run.first, run.count]);
        let mut bytes: Vec<u8> = runs.flat_map(u64::to_le_bytes).collect();
        bytes.extend(self.tags.iter().flatten());
        bytes
    }

    /// The slot of a page; `None` is a zero page.
    pub(super) fn slot(&self, page: u64) -> Option<u64> {
        let after = self.runs.partition_point(|run| run.first <= page);
        let run = self.runs.get(after.checked_sub(1)?)?;
        let within = page - run.first;
        (within < run.count).then(|| run.slot + within)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], VaultError> {
    let (first, behind) = rest.split_first_chunk::<N>().ok_or(VaultError::Malformed)?;
    *rest = behind;
    Ok(*first)
}

/// Size of the header with its MAC.
pub const HEADER_SIZE: usize = CLEAR_SIZE + MAC_SIZE;
/// Most pages of guest memory: 1 TiB.
pub const MAX_PAGES: u64 = 1 << 28;
/// Most runs of data pages.
pub const MAX_RUNS: usize = 1 << 24;
/// Longest description in bytes.
pub const MAX_DESCRIPTION: usize = 64 << 10;
/// Largest machine state in bytes.
pub const MAX_STATE: usize = 4 << 20;

pub(super) const CLEAR_SIZE: usize = 128;
pub(super) const MAC_SIZE: usize = 32;
/// Pages begin on a page border.
pub(super) const PAGES_AT: u64 = 4096;
/// Snapshot id before a part, tag behind it.
pub(super) const PART_OVERHEAD: usize = 16 + TAG_SIZE;
const RUN_SIZE: usize = 16;
const MAGIC: &[u8; 8] = b"CSMTSNAP";
const VERSION: u16 = 1;
