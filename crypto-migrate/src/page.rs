//! Page seals: AES-256-GCM per extent of pages, bound to exactly one place in exactly one migration.
//!
//! The associated data is protocol version, session id, VM id, epoch, the entry's clear header (sequence,
//! guest page, count, round, session tag, stream, kind) and the length. The nonce is the sequence number and
//! never travels. Not yet believed: the clear header, until it equals what must come next and the seal opens.

use crate::code::Code;
use crate::crypto::{CryptoError, KeyChain, TAG_SIZE};
use crate::guest::{Gpn, PACKET_HEADER_SIZE, PageContent};
use crate::wire::WireError;
use crate::wire::batch::{BatchBuilder, ENTRY_HEADER_SIZE, Entries, Entry, EntryHeader, PageKind};

/// A page that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The seal does not open.
    #[error("page {0:#x}: the seal does not open; it was changed on the way")]
    Authentication(u64),
    /// A sequence number that was there before.
    #[error("page {0:#x}: sent again")]
    Replayed(u64),
    /// A sequence number is left out.
    #[error("before page {0:#x}: a page of the stream is missing")]
    Missing(u64),
    /// The missing page comes later in the same batch.
    #[error("page {0:#x}: changed places with another")]
    Reordered(u64),
    /// An older round.
    #[error("page {page:#x}: of round {round}, the stream is in round {current}")]
    RolledBack {
        /// The page.
        page: u64,
        /// Its round.
        round: u32,
        /// The stream's round.
        current: u32,
    },
    /// A round that has not begun.
    #[error("page {page:#x}: of round {round}, which has not begun")]
    FutureRound {
        /// The page.
        page: u64,
        /// Its round.
        round: u32,
    },
    /// Another session or stream.
    #[error("page {0:#x}: of another session or stream")]
    Session(u64),
    /// A key reached its limit or a primitive failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// The batch is full.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The guest handed over a page of the wrong size.
    #[error("page {0:#x}: the guest handed over a page of the wrong size")]
    Size(u64),
}

impl PageError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            PageError::Authentication(_) => Code::PageAuthentication,
            PageError::Replayed(_) => Code::PageReplayed,
            PageError::Missing(_) => Code::PageMissing,
            PageError::Reordered(_) => Code::PageReordered,
            PageError::RolledBack { .. } => Code::PageRolledBack,
            PageError::FutureRound { .. } => Code::RoundMismatch,
            PageError::Session(_) => Code::SessionMismatch,
            PageError::Crypto(error) => (*error).into(),
            PageError::Wire(error) => error.code(),
            PageError::Size(_) => Code::GuestFailed,
        }
    }
}

/// What every seal of a stream is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The session.
    pub session_id: [u8; 16],
    /// The guest.
    pub vm_id: [u8; 16],
    /// The epoch that the source holds.
    pub epoch: u64,
    /// The stream.
    pub stream: u16,
}

impl Binding {
    fn session_tag(&self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.session_id;
        [a, b, c, d]
    }
}

/// Seals pages at the source.
pub struct PageSealer {
    keys: KeyChain,
    binding: Binding,
    aad: Aad,
    next: u64,
}

impl PageSealer {
    pub(crate) fn new(keys: KeyChain, binding: Binding) -> Self {
        Self {
            keys,
            aad: Aad::new(&binding),
            binding,
            next: 0,
        }
    }

    /// Number of the next seal.
    pub fn next_sequence(&self) -> u64 {
        self.next
    }

    /// Seals `count` pages (of data, of zeroes, or one packet) into the batch; returns the clear header and the tag.
    pub fn seal(
        &mut self,
        batch: &mut BatchBuilder,
        round: u32,
        page: Gpn,
        count: u32,
        content: PageContent<'_>,
    ) -> Result<(EntryHeader, [u8; TAG_SIZE]), PageError> {
        let (kind, parts): (_, [&[u8]; 2]) = match content {
            PageContent::Zero => (PageKind::Zero, [&[], &[]]),
            PageContent::Data(data) => (PageKind::Data, [data, &[]]),
            PageContent::Firmware { header, ciphertext } => {
                (PageKind::Firmware, [header, ciphertext])
            }
        };
        let (session, stream, sequence) =
            (self.binding.session_tag(), self.binding.stream, self.next);
        let header = EntryHeader {
            sequence,
            page: page.0,
            count,
            round,
            session,
            stream,
            kind,
        };
        let [first, second] = parts;
        let firmware_fits = kind != PageKind::Firmware || first.len() == PACKET_HEADER_SIZE;
        let count_fits = (1..=kind.max_count()).contains(&count);
        if first.len() + second.len() != header.body_length() || !firmware_fits || !count_fits {
            return Err(PageError::Size(page.0));
        }
        let (key, aad) = (self.keys.of(sequence)?, self.aad.fill(&header));
        let mut sealed_tag = [0; TAG_SIZE];
        batch.push(&header.encode(), header.body_length(), |out| {
            sealed_tag = match kind {
                PageKind::Data | PageKind::Zero => key.seal_from(sequence, aad, first, out)?,
                PageKind::Firmware => {
                    let (head, body) = out.split_at_mut(PACKET_HEADER_SIZE);
                    head.copy_from_slice(first);
                    body.copy_from_slice(second);
                    key.seal(sequence, aad, out)?
                }
            };
            Ok::<_, PageError>(sealed_tag)
        })?;
        self.next += 1;
        Ok((header, sealed_tag))
    }
}

/// Opens pages at the destination.
pub struct PageOpener {
    keys: KeyChain,
    binding: Binding,
    aad: Aad,
    expected: u64,
    round: u32,
}

/// A page whose seal has opened.
pub struct Opened<'a> {
    /// The authenticated header.
    pub header: EntryHeader,
    /// The seal's tag, for the manifest.
    pub tag: [u8; TAG_SIZE],
    /// What the page holds.
    pub content: PageContent<'a>,
}

impl PageOpener {
    pub(crate) fn new(keys: KeyChain, binding: Binding) -> Self {
        Self {
            keys,
            aad: Aad::new(&binding),
            binding,
            expected: 0,
            round: 1,
        }
    }

    /// Number of the next seal.
    pub fn next_sequence(&self) -> u64 {
        self.expected
    }

    /// The round whose pages are accepted.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Begins the next round.
    pub fn next_round(&mut self) {
        self.round = self.round.saturating_add(1);
    }

    /// Opens the next entry of a batch; `None` after the last.
    pub fn open_next<'a>(
        &mut self,
        entries: &mut Entries<'a>,
    ) -> Result<Option<Opened<'a>>, OpenError> {
        let Some(entry) = entries.next_entry()? else {
            return Ok(None);
        };
        self.check_claim(&entry.header, entries)?;
        Ok(Some(self.open(entry)?))
    }

    /// Compares what the clear header claims with what must come next.
    fn check_claim(&self, header: &EntryHeader, rest: &Entries<'_>) -> Result<(), PageError> {
        let page = header.page;
        if header.stream != self.binding.stream || header.session != self.binding.session_tag() {
            return Err(PageError::Session(page));
        }
        if header.round < self.round {
            return Err(PageError::RolledBack {
                page,
                round: header.round,
                current: self.round,
            });
        }
        if header.sequence < self.expected {
            return Err(PageError::Replayed(page));
        }
        if header.sequence > self.expected {
            let later = rest
                .remaining_headers()
                .iter()
                .any(|other| other.sequence == self.expected);
            return Err(if later {
                PageError::Reordered(page)
            } else {
                PageError::Missing(page)
            });
        }
        if header.round > self.round {
            return Err(PageError::FutureRound {
                page,
                round: header.round,
            });
        }
        Ok(())
    }

    fn open<'a>(&mut self, entry: Entry<'a>) -> Result<Opened<'a>, PageError> {
        let header = entry.header;
        let refused = PageError::Authentication(header.page);
        let tag = *entry
            .sealed
            .last_chunk::<TAG_SIZE>()
            .ok_or(refused.clone())?;
        let aad = self.aad.fill(&header);
        let plain = self
            .keys
            .of(self.expected)?
            .open(self.expected, aad, entry.sealed)
            .map_err(|_| refused.clone())?;
        let content = match header.kind {
            PageKind::Zero => PageContent::Zero,
            PageKind::Data => PageContent::Data(plain),
            PageKind::Firmware => {
                let (header, ciphertext) =
                    plain.split_at_checked(PACKET_HEADER_SIZE).ok_or(refused)?;
                PageContent::Firmware { header, ciphertext }
            }
        };
        self.expected += 1;
        Ok(Opened {
            header,
            tag,
            content,
        })
    }
}

/// Why an entry is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The batch does not parse.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The page is refused.
    #[error(transparent)]
    Page(#[from] PageError),
}

impl OpenError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            OpenError::Wire(error) => error.code(),
            OpenError::Page(error) => error.code(),
        }
    }
}

/// The associated data: a constant prefix, then the entry's header and the length. Built in place.
struct Aad([u8; AAD_SIZE]);

impl Aad {
    fn new(binding: &Binding) -> Self {
        let mut out = [0; AAD_SIZE];
        let prefix = PAGE_SEAL_VERSION
            .to_le_bytes()
            .into_iter()
            .chain(binding.session_id)
            .chain(binding.vm_id)
            .chain(binding.epoch.to_le_bytes())
            .chain(binding.stream.to_le_bytes());
        out.iter_mut().zip(prefix).for_each(|(o, p)| *o = p);
        Self(out)
    }

    fn fill(&mut self, header: &EntryHeader) -> &[u8] {
        if let Some((_, tail)) = self.0.split_at_mut_checked(PREFIX_SIZE)
            && let Some((place, length)) = tail.split_first_chunk_mut::<ENTRY_HEADER_SIZE>()
        {
            *place = header.encode();
            let bytes = u32::try_from(header.body_length())
                .unwrap_or(u32::MAX)
                .to_le_bytes();
            length.iter_mut().zip(bytes).for_each(|(l, b)| *l = b);
        }
        &self.0
    }
}

/// An example for the document: the entry's header and the associated data.
#[cfg(test)]
pub(crate) fn associated_data() -> ([u8; ENTRY_HEADER_SIZE], [u8; AAD_SIZE]) {
    let binding = Binding {
        session_id: [1; 16],
        vm_id: [2; 16],
        epoch: 3,
        stream: 4,
    };
    let header = EntryHeader {
        sequence: 5,
        page: 6,
        count: 2,
        round: 7,
        session: binding.session_tag(),
        stream: binding.stream,
        kind: PageKind::Data,
    };
    let mut aad = Aad::new(&binding);
    aad.fill(&header);
    (header.encode(), aad.0)
}

const PAGE_SEAL_VERSION: u16 = 3;
const PREFIX_SIZE: usize = 2 + 16 + 16 + 8 + 2;
const AAD_SIZE: usize = PREFIX_SIZE + ENTRY_HEADER_SIZE + 4;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::{KeySchedule, Provider};
    use crate::guest::{EXTENT_PAGES, PAGE_SIZE};
    use crate::wire::batch::{join, split};

    fn binding() -> Binding {
        Binding {
            session_id: [1; 16],
            vm_id: [2; 16],
            epoch: 3,
            stream: 0,
        }
    }

    fn key() -> KeyChain {
        KeySchedule::extract(b"salt", b"secret")
            .chain(Provider::default(), b"page")
            .unwrap()
    }

    /// Four pages in round 1: data, zero run, firmware, data.
    fn batch(binding: Binding) -> Vec<u8> {
        let mut sealer = PageSealer::new(key(), binding);
        let mut batch = BatchBuilder::new();
        let page = [0x5a; PAGE_SIZE];
        let packet = PageContent::Firmware {
            header: &[7; PACKET_HEADER_SIZE],
            ciphertext: &page,
        };
        sealer
            .seal(&mut batch, 1, Gpn(10), 1, PageContent::Data(&page))
            .unwrap();
        sealer
            .seal(&mut batch, 1, Gpn(11), 9, PageContent::Zero)
            .unwrap();
        sealer.seal(&mut batch, 1, Gpn(20), 1, packet).unwrap();
        sealer
            .seal(&mut batch, 1, Gpn(21), 1, PageContent::Data(&page))
            .unwrap();
        let frame = batch.finish(&[0; 16]);
        frame[16..frame.len() - 1].to_vec()
    }

    fn open_all(opener: &mut PageOpener, payload: &[u8]) -> Result<usize, Code> {
        let mut payload = payload.to_vec();
        let mut entries = Entries::parse(&mut payload).map_err(|e| e.code())?;
        let mut opened = 0;
        while opener
            .open_next(&mut entries)
            .map_err(|e| e.code())?
            .is_some()
        {
            opened += 1;
        }
        Ok(opened)
    }

    fn opener() -> PageOpener {
        PageOpener::new(key(), binding())
    }

    #[test]
    fn untouched_batch_opens_and_content_survives() {
        let mut payload = batch(binding());
        assert!(!payload.windows(16).any(|w| w == [0x5a; 16]), "ciphertext");
        let mut entries = Entries::parse(&mut payload).unwrap();
        let mut opener = opener();
        let first = opener.open_next(&mut entries).unwrap().unwrap();
        assert_eq!(first.content, PageContent::Data(&[0x5a; PAGE_SIZE]));
        let run = opener.open_next(&mut entries).unwrap().unwrap();
        assert_eq!((run.content, run.header.count), (PageContent::Zero, 9));
        let packet = opener.open_next(&mut entries).unwrap().unwrap();
        let expected = PageContent::Firmware {
            header: &[7; PACKET_HEADER_SIZE],
            ciphertext: &[0x5a; PAGE_SIZE],
        };
        assert_eq!(packet.content, expected);
    }

    #[test]
    fn replay_drop_swap_duplicate_each_have_their_code() {
        let entries = split(&batch(binding())).unwrap();
        let take = |order: &[usize]| {
            join(
                &order
                    .iter()
                    .map(|i| entries[*i].clone())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(open_all(&mut opener(), &take(&[0, 1, 2, 3])), Ok(4));
        assert_eq!(
            open_all(&mut opener(), &take(&[0, 0, 1, 2, 3])),
            Err(Code::PageReplayed)
        );
        assert_eq!(
            open_all(&mut opener(), &take(&[0, 2, 3])),
            Err(Code::PageMissing)
        );
        assert_eq!(
            open_all(&mut opener(), &take(&[0, 2, 1, 3])),
            Err(Code::PageReordered)
        );
        let mut again = opener();
        assert_eq!(open_all(&mut again, &take(&[0, 1, 2, 3])), Ok(4));
        assert_eq!(
            open_all(&mut again, &take(&[0, 1, 2, 3])),
            Err(Code::PageReplayed)
        );
    }

    #[test]
    fn an_extent_holds_one_to_sixteen_whole_pages() {
        let data = vec![0x5a; (EXTENT_PAGES + 1) * PAGE_SIZE];
        let seal = |count: u32, bytes: usize| {
            let content = PageContent::Data(&data[..bytes]);
            let mut batch = BatchBuilder::new();
            let mut sealer = PageSealer::new(key(), binding());
            sealer
                .seal(&mut batch, 1, Gpn(10), count, content)
                .map(|(header, _)| header)
        };
        let whole = seal(16, 16 * PAGE_SIZE).unwrap();
        assert_eq!(EntryHeader::parse(&whole.encode()), Ok(whole));
        for (count, pages) in [(0, 0), (17, 17), (1, 2), (2, 1)] {
            assert_eq!(
                seal(count, pages * PAGE_SIZE),
                Err(PageError::Size(10)),
                "{count}"
            );
        }
        let mut longer = whole;
        longer.count = 17;
        assert!(EntryHeader::parse(&longer.encode()).is_err());
    }

    #[test]
    fn the_key_changes_within_a_stream_and_only_where_it_must() {
        let open = |sealed_per_key: u64, opened_per_key: u64| {
            let keys = key().with_seals_per_key(sealed_per_key);
            let mut sealer = PageSealer::new(keys, binding());
            let mut batch = BatchBuilder::new();
            for page in 0..10 {
                let content = PageContent::Data(&[0x5a; PAGE_SIZE]);
                sealer.seal(&mut batch, 1, Gpn(page), 1, content).unwrap();
            }
            let frame = batch.finish(&[0; 16]);
            let keys = key().with_seals_per_key(opened_per_key);
            open_all(
                &mut PageOpener::new(keys, binding()),
                &frame[16..frame.len() - 1],
            )
        };
        assert_eq!(open(3, 3), Ok(10), "over three changes");
        assert_eq!(open(3, 4), Err(Code::PageAuthentication));
        assert_eq!(open(4, 3), Err(Code::PageAuthentication));
        assert_eq!(open(10, 9), Err(Code::PageAuthentication));
        assert_eq!(open(10, 11), Ok(10), "the same key still");
    }

    #[test]
    fn older_round_is_rolled_back() {
        let mut opener = opener();
        opener.next_round();
        assert_eq!(
            open_all(&mut opener, &batch(binding())),
            Err(Code::PageRolledBack)
        );
    }

    #[test]
    fn splices_are_refused() {
        let other_stream = Binding {
            stream: 1,
            ..binding()
        };
        assert_eq!(
            open_all(&mut opener(), &batch(other_stream)),
            Err(Code::SessionMismatch)
        );
        let other_session = Binding {
            session_id: [9; 16],
            ..binding()
        };
        assert_eq!(
            open_all(&mut opener(), &batch(other_session)),
            Err(Code::SessionMismatch)
        );
        for hidden in [
            Binding {
                vm_id: [9; 16],
                ..binding()
            },
            Binding {
                epoch: 4,
                ..binding()
            },
        ] {
            assert_eq!(
                open_all(&mut opener(), &batch(hidden)),
                Err(Code::PageAuthentication)
            );
        }
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_refused(position: prop::sample::Index, bit in 0u8..8) {
            let mut payload = batch(binding());
            let position = position.index(payload.len());
            payload[position] ^= 1 << bit;
            prop_assert!(open_all(&mut opener(), &payload).is_err());
        }
    }
}
