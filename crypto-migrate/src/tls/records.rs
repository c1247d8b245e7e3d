//! The records after the handshake (RFC 8446, 5.1, 5.2, 4.6.3): content, its type, a seal; sealed and opened in place.
//!
//! Not yet believed: every byte, until its record opens. Beside application data there are only alerts and key
//! updates; tickets, a further handshake and padding beyond a record's size are refused. A sender updates its key long
//! before the bound of AES-GCM; a receiver refuses a peer that does not.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::time::Instant;

use rustls::AlertDescription;

use super::handshake::{Incoming, RECORD_HEADER};
use super::{TlsError, Transport, is_pause, map_io};
use crate::crypto::{CryptoError, Provider, RecordKey, TAG_SIZE, TrafficSecret};

/// One direction's secret and the key of its records.
struct Keys {
    secret: TrafficSecret,
    key: RecordKey,
    provider: Provider,
}

impl Keys {
    fn new(secret: TrafficSecret, provider: Provider) -> Result<Self, CryptoError> {
        let key = secret.key(provider)?;
        Ok(Self {
            secret,
            key,
            provider,
        })
    }

    fn update(&mut self) -> Result<(), CryptoError> {
        *self = Self::new(self.secret.next()?, self.provider)?;
        Ok(())
    }
}

/// Seals records and writes them.
pub(super) struct Sender {
    keys: Keys,
    update_after: u64,
    seams: Vec<Seam>,
}

/// What stands before and behind the content of a record.
type Seam = ([u8; RECORD_HEADER], [u8; 1 + TAG_SIZE]);

impl Sender {
    pub(super) fn new(secret: TrafficSecret, provider: Provider) -> Result<Self, CryptoError> {
        Ok(Self {
            keys: Keys::new(secret, provider)?,
            update_after: UPDATE_AFTER,
            seams: Vec::new(),
        })
    }

    /// Sends application data: all but the last byte of `bytes`, which is room for a content type. What is left is
    /// ciphertext.
    pub(super) fn send<T: Transport>(
        &mut self,
        io: &mut T,
        bytes: &mut [u8],
        deadline: Instant,
    ) -> Result<(), TlsError> {
        let length = bytes.len().saturating_sub(1);
        for start in (0..length).step_by(GROUP) {
            let end = length.min(start + GROUP);
            if self.keys.key.sequence() >= self.update_after {
                self.update(io, deadline)?;
            }
            let group = bytes.get_mut(start..=end).unwrap_or_default();
            self.send_group(io, APPLICATION_DATA, group, deadline)?;
        }
        Ok(())
    }

    /// Sends an alert.
    pub(super) fn alert<T: Transport>(
        &mut self,
        io: &mut T,
        description: u8,
        deadline: Instant,
    ) -> Result<(), TlsError> {
        let level = if description == 0 { 1 } else { 2 };
        self.send_group(io, ALERT, &mut [level, description, 0], deadline)
    }

    /// Announces the next key under the old one, and uses it.
    pub(super) fn update<T: Transport>(
        &mut self,
        io: &mut T,
        deadline: Instant,
    ) -> Result<(), TlsError> {
        let [a, b, c, d] = KEY_UPDATE;
        self.send_group(io, HANDSHAKE, &mut [a, b, c, d, 0, 0], deadline)?;
        Ok(self.keys.update()?)
    }

    /// Sends records of all but the last byte of `group`.
    fn send_group<T: Transport>(
        &mut self,
        io: &mut T,
        content: u8,
        group: &mut [u8],
        deadline: Instant,
    ) -> Result<(), TlsError> {
        let Self { keys, seams, .. } = self;
        let length = group.len().saturating_sub(1);
        seams.clear();
        for start in (0..length).step_by(MAX_CONTENT) {
            let end = length.min(start + MAX_CONTENT);
            let header = header(end - start + 1 + TAG_SIZE);
            let record = group.get_mut(start..=end).unwrap_or_default();
            seams.push((header, keys.key.seal(&header, record, content)?));
        }
        let contents = group.get(..length).unwrap_or_default().chunks(MAX_CONTENT);
        let mut slices: Vec<IoSlice<'_>> = contents
            .zip(seams.iter())
            .flat_map(|(content, (header, trailer))| {
                [header.as_slice(), content, trailer].map(IoSlice::new)
            })
            .collect();
        write(io, &mut slices, deadline)
    }
}

/// Writes all slices or fails by the deadline.
fn write<T: Transport>(
    io: &mut T,
    mut slices: &mut [IoSlice<'_>],
    deadline: Instant,
) -> Result<(), TlsError> {
    while !slices.is_empty() {
        match io.write_vectored(slices) {
            Ok(0) => return Err(TlsError::Truncated),
            Ok(count) => IoSlice::advance_slices(&mut slices, count),
            Err(error) if is_pause(&error) => {
                if Instant::now() >= deadline {
                    return Err(TlsError::Timeout);
                }
            }
            Err(error) => return Err(map_io(error)),
        }
    }
    Ok(())
}

/// Opens records.
pub(super) struct Receiver {
    keys: Keys,
    incoming: Incoming,
    /// Application data of one record that was not opened into its place.
    plain: Vec<u8>,
    taken: usize,
    closed: bool,
    update_requested: bool,
}

impl Receiver {
    pub(super) fn new(
        secret: TrafficSecret,
        provider: Provider,
        incoming: Incoming,
    ) -> Result<Self, CryptoError> {
        Ok(Self {
            keys: Keys::new(secret, provider)?,
            incoming,
            plain: Vec::new(),
            taken: 0,
            closed: false,
            update_requested: false,
        })
    }

    /// Whether the peer has said that nothing follows.
    pub(super) fn closed(&self) -> bool {
        self.closed
    }

    /// Whether the peer wants this side's key updated, too; asked once.
    pub(super) fn take_update_request(&mut self) -> bool {
        std::mem::take(&mut self.update_requested)
    }

    /// Reads once from the transport.
    pub(super) fn fill_from<T: Transport>(&mut self, io: &mut T) -> io::Result<usize> {
        self.incoming.fill_from(io)
    }

    /// Application data that is there; `None`: the transport must be read first, or the peer has closed. A record that
    /// fits is opened straight into `out`.
    pub(super) fn read(&mut self, out: &mut [u8]) -> Result<Option<usize>, TlsError> {
        loop {
            let waiting = self.plain.get(self.taken..).unwrap_or_default();
            if !waiting.is_empty() {
                let count = waiting.len().min(out.len());
                let pairs = out.split_at_mut_checked(count).zip(waiting.get(..count));
                if let Some(((out, _), waiting)) = pairs {
                    out.copy_from_slice(waiting);
                }
                self.taken += count;
                return Ok(Some(count));
            }
            let Some(record) = self.next_record() else {
                return Ok(None);
            };
            let inner = record.len().saturating_sub(RECORD_HEADER + TAG_SIZE);
            match out.get_mut(..inner) {
                Some(place) if inner > SMALL => {
                    let (header, body) = split(self.incoming.slice(&record))?;
                    self.keys.key.open_into(&header, body, place)?;
                    let (content, length) = content(place)?;
                    if content == APPLICATION_DATA {
                        return Ok(Some(length));
                    }
                    let message = place.get(..length).unwrap_or_default().to_vec();
                    self.control(content, &message)?;
                }
                _ => self.open_aside(&record)?,
            }
        }
    }

    /// Opens records until there is application data or none is left; whether there is any, or the end.
    pub(super) fn advance(&mut self) -> Result<bool, TlsError> {
        while self.taken >= self.plain.len() && !self.closed {
            let Some(record) = self.next_record() else {
                return Ok(false);
            };
            self.open_aside(&record)?;
        }
        Ok(true)
    }

    /// Drops what was opened and not read.
    pub(super) fn drop_plain(&mut self) {
        self.taken = self.plain.len();
    }

    fn next_record(&mut self) -> Option<Range<usize>> {
        if self.closed {
            return None;
        }
        self.incoming.take_record()
    }

    /// Opens a record in place and keeps its application data.
    fn open_aside(&mut self, record: &Range<usize>) -> Result<(), TlsError> {
        let (header, body) = split(self.incoming.slice(record))?;
        let plain = self.keys.key.open(&header, body)?;
        let (content, length) = content(plain)?;
        let plain = plain.get(..length).unwrap_or_default();
        if content == APPLICATION_DATA {
            self.plain.clear();
            self.plain.extend_from_slice(plain);
            self.taken = 0;
            return Ok(());
        }
        let message = plain.to_vec();
        self.control(content, &message)
    }

    fn control(&mut self, content: u8, message: &[u8]) -> Result<(), TlsError> {
        match (content, message) {
            (ALERT, [_, 0]) => self.closed = true,
            (ALERT, [_, description]) => {
                let description = AlertDescription::from(*description);
                return Err(TlsError::Alert(format!("{description:?}")));
            }
            (HANDSHAKE, [kind @ .., request @ 0..=1]) if kind == KEY_UPDATE.as_slice() => {
                self.keys.update()?;
                self.update_requested |= *request == 1;
            }
            _ => return Err(misbehaved("a record that has no place here")),
        }
        Ok(())
    }
}

/// Header and body of a whole record.
fn split(record: &mut [u8]) -> Result<([u8; RECORD_HEADER], &mut [u8]), TlsError> {
    let whole = record.len();
    match record.split_first_chunk_mut::<RECORD_HEADER>() {
        Some((found, body))
            if *found == header(body.len())
                && whole > RECORD_HEADER + TAG_SIZE
                && body.len() <= MAX_CONTENT + 1 + TAG_SIZE =>
        {
            Ok((*found, body))
        }
        _ => Err(misbehaved("bytes that are no record")),
    }
}

/// Content type and length of what was opened: zeroes behind the type are padding.
fn content(plain: &[u8]) -> Result<(u8, usize), TlsError> {
    let at = plain.iter().rposition(|byte| *byte != 0);
    let content = at.and_then(|at| Some((*plain.get(at)?, at)));
    content.ok_or_else(|| misbehaved("a record without a content type"))
}

fn header(length: usize) -> [u8; RECORD_HEADER] {
    let [high, low] = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}

fn misbehaved(what: &str) -> TlsError {
    TlsError::Protocol(rustls::Error::General(format!("the peer sent {what}")))
}

/// Records one key seals before it is updated: 64 GiB, a quarter of what RFC 8446, 5.5 allows.
const UPDATE_AFTER: u64 = 1 << 22;
/// Bytes of content in a record.
const MAX_CONTENT: usize = 1 << 14;
/// Bytes that are sealed before they are written: they are in the cache still.
const GROUP: usize = 8 * MAX_CONTENT;
/// A record of less is copied: frames' headers, mostly.
const SMALL: usize = 64;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
/// Handshake type 24, three bytes of length; the request follows.
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

#[cfg(test)]
pub(super) fn limits() -> [u64; 3] {
    [MAX_CONTENT as u64, UPDATE_AFTER, crate::crypto::MAX_RECORDS]
}

#[cfg(test)]
impl Sender {
    /// Lowers the limit.
    pub(super) fn update_after(&mut self, records: u64) {
        self.update_after = records;
    }

    /// Number of the next record under this key.
    pub(super) fn sequence(&self) -> u64 {
        self.keys.key.sequence()
    }

    /// A record of any type.
    pub(super) fn raw<T: Transport>(
        &mut self,
        io: &mut T,
        content: u8,
        group: &mut [u8],
        deadline: Instant,
    ) -> Result<(), TlsError> {
        self.send_group(io, content, group, deadline)
    }
}
