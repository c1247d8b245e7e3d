//! A page batch: a count, then that many entries, each a clear header, a ciphertext and a tag.
//!
//! | Bytes of an entry | Field |
//! | --- | --- |
//! | 0..8 | sequence of the seal, from 0, per stream and direction |
//! | 8..16 | guest page number of the first page |
//! | 16..20 | number of pages: of an extent at most [`EXTENT_PAGES`], of a zero run at most [`MAX_RUN`], else 1 |
//! | 20..24 | round |
//! | 24..28 | the first four bytes of the session id |
//! | 28..30 | stream |
//! | 30 | kind: 1 extent of data, 2 zero run, 3 firmware packet |
//! | 31 | 0 |
//! | 32.. | ciphertext: 4096 bytes a page, 0, or 52 + 4096 bytes |
//! | last 16 | tag |
//!
//! All little endian. The clear header is what a gateway can change; the seal authenticates it, and before
//! that the receiver compares it with what must come next, so that every attack gets a code of its own.

use super::{HEADER_SIZE, WireError};
use crate::crypto::TAG_SIZE;
use crate::guest::{EXTENT_PAGES, PACKET_HEADER_SIZE, PAGE_SIZE};

/// Size of an entry's clear header.
pub const ENTRY_HEADER_SIZE: usize = 32;
/// Entries one batch may carry.
pub const MAX_ENTRIES: usize = 256;
/// Pages one zero run may cover.
pub const MAX_RUN: u32 = 1 << 20;
/// The largest payload of a batch; an entry costs at most a packet's size per page.
pub const MAX_PAYLOAD: usize =
    COUNT_SIZE + MAX_ENTRIES * (ENTRY_HEADER_SIZE + PACKET_HEADER_SIZE + PAGE_SIZE + TAG_SIZE);

/// What an entry carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PageKind {
    /// Pages one after the other.
    Data = 1,
    /// A run of zero pages.
    Zero = 2,
    /// A packet of the secure processor.
    Firmware = 3,
}

impl PageKind {
    /// Pages one entry may cover.
    pub const fn max_count(self) -> u32 {
        match self {
            PageKind::Data => EXTENT_PAGES as u32,
            PageKind::Zero => MAX_RUN,
            PageKind::Firmware => 1,
        }
    }
}

/// The clear header of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// Number of the seal.
    pub sequence: u64,
    /// First guest page number.
    pub page: u64,
    /// Pages covered.
    pub count: u32,
    /// The round.
    pub round: u32,
    /// The first four bytes of the session id.
    pub session: [u8; 4],
    /// The stream.
    pub stream: u16,
    /// The kind.
    pub kind: PageKind,
}

impl EntryHeader {
    /// Parses the 32 bytes.
    pub fn parse(bytes: &[u8; ENTRY_HEADER_SIZE]) -> Result<Self, WireError> {
        let mut rest = bytes.as_slice();
        let sequence = u64::from_le_bytes(take(&mut rest)?);
        let page = u64::from_le_bytes(take(&mut rest)?);
        let count = u32::from_le_bytes(take(&mut rest)?);
        let round = u32::from_le_bytes(take(&mut rest)?);
        let session = take(&mut rest)?;
        let stream = u16::from_le_bytes(take(&mut rest)?);
        let kind = match take::<2>(&mut rest)? {
            [1, 0] => PageKind::Data,
            [2, 0] => PageKind::Zero,
            [3, 0] => PageKind::Firmware,
            _ => return Err(WireError::Malformed("page entry of unknown kind")),
        };
        if count == 0 || count > kind.max_count() {
            return Err(WireError::Malformed("page entry with an impossible count"));
        }
        Ok(Self {
            sequence,
            page,
            count,
            round,
            session,
            stream,
            kind,
        })
    }

    /// Bytes of ciphertext.
    pub fn body_length(&self) -> usize {
        match self.kind {
            PageKind::Data => usize::try_from(self.count).map_or(0, |count| count * PAGE_SIZE),
            PageKind::Zero => 0,
            PageKind::Firmware => PACKET_HEADER_SIZE + PAGE_SIZE,
        }
    }

    /// The 32 bytes.
    pub fn encode(&self) -> [u8; ENTRY_HEADER_SIZE] {
        let mut out = [0; ENTRY_HEADER_SIZE];
        let fields = self
            .sequence
            .to_le_bytes()
            .into_iter()
            .chain(self.page.to_le_bytes())
            .chain(self.count.to_le_bytes())
            .chain(self.round.to_le_bytes())
            .chain(self.session)
            .chain(self.stream.to_le_bytes())
            .chain([self.kind as u8, 0]);
        out.iter_mut().zip(fields).for_each(|(o, f)| *o = f);
        out
    }
}

/// Walks the entries of a batch, in place: the ciphertexts are opened where they lie.
pub struct Entries<'a> {
    announced: u16,
    left: u16,
    rest: &'a mut [u8],
}

/// One entry, its ciphertext and tag still sealed.
pub struct Entry<'a> {
    /// The clear header.
    pub header: EntryHeader,
    /// Its bytes, as they are authenticated.
    pub header_bytes: [u8; ENTRY_HEADER_SIZE],
    /// Ciphertext and tag.
    pub sealed: &'a mut [u8],
}

impl<'a> Entries<'a> {
    /// Starts at the payload of a batch.
    pub fn parse(payload: &'a mut [u8]) -> Result<Self, WireError> {
        let (count, rest) = payload
            .split_first_chunk_mut::<COUNT_SIZE>()
            .ok_or(WireError::Malformed("page batch without a count"))?;
        let [c0, c1, 0, 0] = *count else {
            return Err(WireError::Malformed("page batch with unknown flags"));
        };
        let announced = u16::from_le_bytes([c0, c1]);
        if announced == 0 {
            return Err(WireError::Empty);
        }
        if usize::from(announced) > MAX_ENTRIES {
            return Err(WireError::Malformed("page batch with an impossible count"));
        }
        Ok(Self {
            announced,
            left: announced,
            rest,
        })
    }

    /// The next entry; `None` after the last.
    pub fn next_entry(&mut self) -> Result<Option<Entry<'a>>, WireError> {
        let rest = std::mem::take(&mut self.rest);
        if self.left == 0 {
            return if rest.is_empty() {
                Ok(None)
            } else {
                Err(WireError::Malformed("bytes after the last entry"))
            };
        }
        let truncated = WireError::Truncated(self.announced);
        let (header_bytes, rest) = rest
            .split_first_chunk_mut::<ENTRY_HEADER_SIZE>()
            .ok_or(truncated.clone())?;
        let header = EntryHeader::parse(header_bytes)?;
        let length = header.body_length() + TAG_SIZE;
        let (sealed, rest) = rest.split_at_mut_checked(length).ok_or(truncated)?;
        self.rest = rest;
        self.left -= 1;
        Ok(Some(Entry {
            header,
            header_bytes: *header_bytes,
            sealed,
        }))
    }

    /// The headers that are still to come; stops at the first that does not parse.
    pub fn remaining_headers(&self) -> Vec<EntryHeader> {
        let mut headers = Vec::new();
        let mut rest: &[u8] = self.rest;
        for _ in 0..self.left {
            let Some((header, after)) = rest.split_first_chunk::<ENTRY_HEADER_SIZE>() else {
                break;
            };
            let Ok(header) = EntryHeader::parse(header) else {
                break;
            };
            headers.push(header);
            rest = after
                .get(header.body_length() + TAG_SIZE..)
                .unwrap_or_default();
        }
        headers
    }
}

/// Splits a batch's payload into its entries (for a gateway, and for tests).
pub fn split(payload: &[u8]) -> Result<Vec<Vec<u8>>, WireError> {
    let mut copy = payload.to_vec();
    let mut entries = Entries::parse(&mut copy)?;
    let mut out = Vec::new();
    while let Some(entry) = entries.next_entry()? {
        out.push([entry.header_bytes.as_slice(), entry.sealed].concat());
    }
    Ok(out)
}

/// Joins entries into the payload of a batch.
pub fn join(entries: &[Vec<u8>]) -> Vec<u8> {
    let [c0, c1] = u16::try_from(entries.len())
        .unwrap_or(u16::MAX)
        .to_le_bytes();
    let mut out = vec![c0, c1, 0, 0];
    entries
        .iter()
        .for_each(|entry| out.extend_from_slice(entry));
    out
}

/// A frame under construction: room for its header, the count, then entries, and a byte of room behind them.
/// Allocated once, reused.
pub struct BatchBuilder {
    bytes: Vec<u8>,
    used: usize,
    entries: u16,
}

impl BatchBuilder {
    /// An empty batch.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; HEADER_SIZE + MAX_PAYLOAD + 1],
            used: HEADER_SIZE + COUNT_SIZE,
            entries: 0,
        }
    }

    /// Empties the batch, keeping its memory.
    pub fn clear(&mut self) {
        self.used = HEADER_SIZE + COUNT_SIZE;
        self.entries = 0;
    }

    /// Entries so far.
    pub fn entries(&self) -> usize {
        usize::from(self.entries)
    }

    /// Bytes of payload so far.
    pub fn payload_length(&self) -> usize {
        self.used.saturating_sub(HEADER_SIZE)
    }

    /// Appends an entry: `seal` writes the ciphertext of `length` bytes and returns the tag. Where it fails, or there is
    /// no room, the batch is what it was.
    pub fn push<E: From<WireError>>(
        &mut self,
        header: &[u8; ENTRY_HEADER_SIZE],
        length: usize,
        seal: impl FnOnce(&mut [u8]) -> Result<[u8; TAG_SIZE], E>,
    ) -> Result<(), E> {
        let full = || WireError::Malformed("page batch without room for another entry");
        let room = self.bytes.split_last_mut().and_then(|(_, bytes)| {
            let (place, rest) = bytes
                .get_mut(self.used..)?
                .split_first_chunk_mut::<ENTRY_HEADER_SIZE>()?;
            let (body, rest) = rest.split_at_mut_checked(length)?;
            Some((place, body, rest.first_chunk_mut::<TAG_SIZE>()?))
        });
        let (place, body, tag) = room.ok_or_else(full)?;
        *place = *header;
        *tag = seal(body)?;
        self.used += ENTRY_HEADER_SIZE + length + TAG_SIZE;
        self.entries = self.entries.checked_add(1).ok_or_else(full)?;
        Ok(())
    }

    /// Completes the frame with its header and returns all its bytes, and one of room behind them.
    pub fn finish(&mut self, header: &[u8; HEADER_SIZE]) -> &mut [u8] {
        let [c0, c1] = self.entries.to_le_bytes();
        let front = header.iter().copied().chain([c0, c1, 0, 0]);
        self.bytes.iter_mut().zip(front).for_each(|(b, f)| *b = f);
        self.bytes.get_mut(..=self.used).unwrap_or_default()
    }
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::new()
    }
}

pub(crate) const COUNT_SIZE: usize = 4;

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], WireError> {
    let (head, tail) = rest
        .split_first_chunk::<N>()
        .ok_or(WireError::Malformed("entry header too short"))?;
    *rest = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn entry_headers_round_trip(bytes: [u8; ENTRY_HEADER_SIZE]) {
            if let Ok(header) = EntryHeader::parse(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }

        #[test]
        fn entries_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), count in 0u8..4, kind in 0u8..5) {
            if bytes.len() > 4 + 31 {
                bytes[..4].copy_from_slice(&[count, 0, 0, 0]);
                bytes[4 + 30..4 + 32].copy_from_slice(&[kind, 0]);
                bytes[4 + 16..4 + 20].copy_from_slice(&1u32.to_le_bytes());
            }
            let mut walked = 0;
            if let Ok(mut entries) = Entries::parse(&mut bytes) {
                entries.remaining_headers();
                while let Ok(Some(_)) = entries.next_entry() { walked += 1; }
            }
            prop_assert!(walked <= usize::from(count));
        }

        #[test]
        fn split_and_join_are_inverse(kinds in proptest::collection::vec(0u8..2, 1..20)) {
            let entries: Vec<Vec<u8>> = kinds.iter().enumerate().map(|(i, kind)| {
                let kind = if *kind == 0 { PageKind::Zero } else { PageKind::Data };
                let header = EntryHeader { sequence: i as u64, page: 7, count: 1, round: 1, session: [1; 4], stream: 0, kind };
                [header.encode().to_vec(), vec![i as u8; header.body_length() + TAG_SIZE]].concat()
            }).collect();
            prop_assert_eq!(split(&join(&entries)).unwrap(), entries);
        }
    }

    #[test]
    fn shortened_batch_is_truncated() {
        let header = EntryHeader {
            sequence: 0,
            page: 0,
            count: 1,
            round: 1,
            session: [0; 4],
            stream: 0,
            kind: PageKind::Data,
        };
        let entry = [header.encode().to_vec(), vec![0; PAGE_SIZE + TAG_SIZE]].concat();
        let mut payload = join(&[entry]);
        payload.truncate(payload.len() - 1);
        assert_eq!(split(&payload), Err(WireError::Truncated(1)));
    }
}
