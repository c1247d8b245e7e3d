//! The parts of the stream one by one, for a benchmark that compares the whole with their sum. Keys nobody uses.
//!
//! Every call works on [`PIECE`] bytes that are in the cache, in the extents and records of a real stream.

use crate::crypto::{
    AeadKey, CryptoError, KeySchedule, Provider, RecordKey, TAG_SIZE, TrafficSecret,
};
use crate::guest::{EXTENT_PAGES, PAGE_SIZE};

/// Bytes that each call works on: about a frame.
pub const PIECE: usize = 4 * EXTENT;

/// The cryptography of both ends.
pub struct Parts {
    pages: AeadKey,
    next: u64,
    sender: RecordKey,
    receiver: RecordKey,
    extents: Vec<[u8; EXTENT + TAG_SIZE]>,
    wire: Vec<u8>,
    plain: [u8; RECORD + 1],
}

impl Parts {
    /// As the provider does them.
    pub fn new(provider: Provider) -> Result<Self, CryptoError> {
        let schedule = KeySchedule::extract(b"casemate-migrate/1 parts", b"");
        let secret = TrafficSecret::new(&[0; 48])?;
        Ok(Self {
            pages: schedule.aead(provider, b"page")?,
            next: 0,
            sender: secret.key(provider)?,
            receiver: secret.key(provider)?,
            extents: vec![[0; EXTENT + TAG_SIZE]; PIECE / EXTENT],
            wire: vec![0; PIECE / RECORD * (RECORD + OVERHEAD)],
            plain: [0; RECORD + 1],
        })
    }

    /// Seals a piece extent by extent, as the source does.
    pub fn seal(&mut self, piece: &[u8; PIECE]) -> Result<(), CryptoError> {
        for (from, to) in piece.as_chunks::<EXTENT>().0.iter().zip(&mut self.extents) {
            if let Some((body, tag)) = to.split_last_chunk_mut::<TAG_SIZE>() {
                *tag = self.pages.seal_from(self.next, AAD, from, body)?;
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Opens what [`Parts::seal`] left, as the destination does.
    pub fn open(&mut self) -> Result<(), CryptoError> {
        let first = self.next.saturating_sub(self.extents.len() as u64);
        for (number, extent) in (first..).zip(&mut self.extents) {
            self.pages.open(number, AAD, extent)?;
        }
        Ok(())
    }

    /// Seals a piece record by record, as TLS at the source does.
    pub fn seal_records(&mut self) -> Result<(), CryptoError> {
        for record in self.wire.chunks_mut(RECORD + OVERHEAD) {
            let content = record.get_mut(..=RECORD).unwrap_or_default();
            let trailer = self.sender.seal(AAD, content, 23)?;
            if let Some(place) = record.last_chunk_mut::<OVERHEAD>() {
                *place = trailer;
            }
        }
        Ok(())
    }

    /// Opens what [`Parts::seal_records`] left into another place, as TLS at the destination does.
    pub fn open_records(&mut self) -> Result<(), CryptoError> {
        for record in self.wire.chunks_mut(RECORD + OVERHEAD) {
            self.receiver.open_into(AAD, record, &mut self.plain)?;
        }
        Ok(())
    }
}

const EXTENT: usize = EXTENT_PAGES * PAGE_SIZE;
const RECORD: usize = 1 << 14;
/// A content type and a tag.
const OVERHEAD: usize = 1 + TAG_SIZE;
const AAD: &[u8] = b"header";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_of_each_part_fit_each_other() {
        for &provider in Provider::ALL {
            let mut parts = Parts::new(provider).unwrap();
            for _ in 0..3 {
                parts.seal(&[7; PIECE]).unwrap();
                parts.open().unwrap();
                assert!(parts.open().is_err(), "open already");
                parts.seal_records().unwrap();
                parts.open_records().unwrap();
            }
            assert!(parts.open_records().is_err(), "other records were due");
        }
    }
}
