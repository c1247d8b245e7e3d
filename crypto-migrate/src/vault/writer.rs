//! Writes a snapshot: pages ascending, then the parts, the header last.

use super::format::{CLEAR_SIZE, HEADER_SIZE, Header, Index, PAGES_AT, Part, Run};
use super::{Keys, Storage, VaultError};
use crate::guest::PAGE_SIZE;

/// What a snapshot is of.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Random, of this snapshot alone.
    pub snapshot_id: [u8; 16],
    /// The guest's.
    pub vm_id: [u8; 16],
    /// Higher than that of every snapshot of this guest before.
    pub generation: u64,
    /// Pages of guest memory.
    pub pages: u64,
}

/// A snapshot under way.
pub struct Writer<'a, S: Storage> {
    storage: &'a S,
    keys: Keys,
    header: Header,
    index: Index,
    next: u64,
    pending: Vec<u8>,
    written: u64,
}

impl<'a, S: Storage> Writer<'a, S> {
    /// Begins; the storage is empty.
    pub fn new(storage: &'a S, secret: &[u8; 32], facts: Facts) -> Result<Self, VaultError> {
        let header = Header {
            snapshot_id: facts.snapshot_id,
            vm_id: facts.vm_id,
            generation: facts.generation,
            pages: facts.pages,
            data_pages: 0,
            runs: 0,
            description: 0,
            state: 0,
        };
        header.check()?;
        Ok(Self {
            storage,
            keys: Keys::derive(secret, &facts.snapshot_id)?,
            header,
            index: Index {
                runs: Vec::new(),
                tags: Vec::new(),
            },
            next: 0,
            pending: Vec::with_capacity(PENDING),
            written: 0,
        })
    }

    /// Adds the next page; those left out are zero.
    pub fn page(&mut self, page: u64, data: &[u8; PAGE_SIZE]) -> Result<(), VaultError> {
        if page < self.next || page >= self.header.pages {
            return Err(VaultError::Order(page));
        }
        if data.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let slot = self.header.data_pages;
        match self.index.runs.last_mut() {
            Some(run) if run.first + run.count == page => run.count += 1,
            _ => self.index.runs.push(Run {
                first: page,
                count: 1,
                slot,
            }),
        }
        let at = self.pending.len();
        self.pending.extend_from_slice(data);
        let aad = self.header.page_aad(page, slot);
        let body = self.pending.get_mut(at..).unwrap_or_default();
        self.index
            .tags
            .push(self.keys.pages.seal(slot, &aad, body)?);
        self.header.data_pages += 1;
        self.next = page + 1;
        if self.pending.len() >= PENDING {
            self.write_pages()?;
        }
        Ok(())
    }

    /// Writes the parts and the header. What it returns is durable once its storage is synchronised.
    pub fn finish(mut self, description: &[u8], state: &[u8]) -> Result<Header, VaultError> {
        self.write_pages()?;
        let bounded =
            |length: usize, what| u32::try_from(length).map_err(|_| VaultError::Bounds(what));
        self.header.runs = bounded(self.index.runs.len(), "number of runs")?;
        self.header.description = bounded(description.len(), "description")?;
        self.header.state = bounded(state.len(), "machine state")?;
        self.header.check()?;
        let clear = self.header.encode();
        self.part(Part::Index, &self.index.encode(), &clear)?;
        self.part(Part::Description, description, &clear)?;
        self.part(Part::State, state, &clear)?;
        let mut bytes = [0u8; HEADER_SIZE];
        let whole = clear.into_iter().chain(self.keys.header.mac(&clear));
        bytes.iter_mut().zip(whole).for_each(|(b, w)| *b = w);
        self.storage.write_at(0, &bytes)?;
        Ok(self.header)
    }

    fn write_pages(&mut self) -> Result<(), VaultError> {
        let at = PAGES_AT + self.written;
        self.storage.write_at(at, &self.pending)?;
        self.written += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }

    fn part(&self, part: Part, plain: &[u8], clear: &[u8; CLEAR_SIZE]) -> Result<(), VaultError> {
        let mut body = plain.to_vec();
        let tag = self.keys.parts.seal(part.counter(), clear, &mut body)?;
        let mut bytes = self.header.snapshot_id.to_vec();
        bytes.extend(body);
        bytes.extend(tag);
        self.storage.write_at(self.header.part(part).0, &bytes)?;
        Ok(())
    }
}

/// Pages are written in slices of this many bytes.
const PENDING: usize = 1 << 20;
