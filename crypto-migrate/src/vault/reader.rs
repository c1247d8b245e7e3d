//! Opens a snapshot: header, index, description and state at once, pages one by one in any order.

use super::format::{CLEAR_SIZE, HEADER_SIZE, Header, Index, PAGES_AT, Part};
use super::{Keys, Storage, VaultError};
use crate::crypto::TAG_SIZE;
use crate::guest::PAGE_SIZE;

/// A snapshot whose header and parts have opened.
pub struct Reader<'a, S: Storage> {
    storage: &'a S,
    keys: Keys,
    header: Header,
    index: Index,
    description: Vec<u8>,
    state: Vec<u8>,
}

impl<'a, S: Storage> Reader<'a, S> {
    /// What the file claims, before any key is there: who asks for the key needs it.
    pub fn claim(storage: &S) -> Result<Header, VaultError> {
        Ok(Self::clear(storage)?.0)
    }

    /// Opens everything but the pages.
    pub fn open(storage: &'a S, secret: &[u8; 32]) -> Result<Self, VaultError> {
        let (header, bytes) = Self::clear(storage)?;
        let (clear, mac) = bytes
            .split_first_chunk::<CLEAR_SIZE>()
            .ok_or(VaultError::Malformed)?;
        let keys = Keys::derive(secret, &header.snapshot_id)?;
        keys.header
            .verify(clear, mac)
            .map_err(|_| VaultError::Header)?;
        // The header is believed from here on, and with it every length.
        let (found, wanted) = (storage.size()?, header.size());
        if found < wanted {
            return Err(VaultError::Truncated { wanted, found });
        }
        if found > wanted {
            return Err(VaultError::Trailing(found - wanted));
        }
        let open = |part| open_part(storage, &keys, &header, part, clear);
        let index = Index::parse(&open(Part::Index)?, &header)?;
        let description = open(Part::Description)?;
        let state = open(Part::State)?;
        Ok(Self {
            storage,
            keys,
            header,
            index,
            description,
            state,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The description.
    pub fn description(&self) -> &[u8] {
        &self.description
    }

    /// The machine state.
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// Runs of data pages, ascending: first page and count.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.index.runs.iter().map(|run| (run.first, run.count))
    }

    /// Opens pages from `page` on into `into`, a whole number of pages; zero where the snapshot has none.
    pub fn read(&self, page: u64, into: &mut [u8]) -> Result<(), VaultError> {
        let (pages, behind) = into.as_chunks_mut::<PAGE_SIZE>();
        if !behind.is_empty() {
            return Err(VaultError::Bounds("page"));
        }
        for (page, body) in (page..).zip(pages) {
            self.read_page(page, body)?;
        }
        Ok(())
    }

    fn read_page(&self, page: u64, body: &mut [u8; PAGE_SIZE]) -> Result<(), VaultError> {
        if page >= self.header.pages {
            return Err(VaultError::Order(page));
        }
        let Some(slot) = self.index.slot(page) else {
            body.fill(0);
            return Ok(());
        };
        let tag = usize::try_from(slot)
            .ok()
            .and_then(|s| self.index.tags.get(s));
        let tag = tag.ok_or(VaultError::Page(page))?;
        let mut sealed = [0u8; PAGE_SIZE + TAG_SIZE];
        let (data, place) = sealed.split_at_mut(PAGE_SIZE);
        self.storage
            .read_at(PAGES_AT + slot * PAGE_SIZE as u64, data)?;
        place.copy_from_slice(tag);
        let aad = self.header.page_aad(page, slot);
        let plain = self
            .keys
            .pages
            .open(slot, &aad, &mut sealed)
            .map_err(|_| VaultError::Page(page))?;
        body.copy_from_slice(plain);
        Ok(())
    }

    fn clear(storage: &S) -> Result<(Header, [u8; HEADER_SIZE]), VaultError> {
        if storage.size()? < HEADER_SIZE as u64 {
            return Err(VaultError::Malformed);
        }
        let mut bytes = [0u8; HEADER_SIZE];
        storage.read_at(0, &mut bytes)?;
        Ok((Header::parse(&bytes)?, bytes))
    }
}

fn open_part<S: Storage>(
    storage: &S,
    keys: &Keys,
    header: &Header,
    part: Part,
    clear: &[u8; CLEAR_SIZE],
) -> Result<Vec<u8>, VaultError> {
    let (at, length) = header.part(part);
    let mut id = [0u8; 16];
    storage.read_at(at, &mut id)?;
    if id != header.snapshot_id {
        return Err(VaultError::Spliced(part.name()));
    }
    let mut sealed = vec![0u8; length + TAG_SIZE];
    storage.read_at(at + 16, &mut sealed)?;
    let plain = keys
        .parts
        .open(part.counter(), clear, &mut sealed)
        .map_err(|_| VaultError::Changed(part.name()))?
        .len();
    sealed.truncate(plain);
    Ok(sealed)
}
