//! Reading a ledger without believing it: every line, its place, its tree, every checkpoint's signature.

use std::path::Path;

use super::LedgerError;
use super::frame::{self, Kind};
use super::merkle::{self, Tree};
use super::note::{Checkpoint, NoteError, VerifyingKey};
use super::record::Record;

/// Verifies a ledger file with nothing but its public key.
pub fn verify(path: &Path, key: &VerifyingKey) -> Result<Verified, LedgerError> {
    let bytes = std::fs::read(path).map_err(LedgerError::Io)?;
    let scanned = scan(&bytes, key)?;
    if scanned.good_bytes < frame::HEADER.len() {
        Err(LedgerError::NotALedger)
    } else if scanned.good_bytes < bytes.len() {
        Err(LedgerError::TornTail {
            offset: scanned.good_bytes,
        })
    } else {
        Ok(scanned.verified)
    }
}

/// A ledger whose every line and checkpoint has verified.
#[derive(Debug)]
pub struct Verified {
    records: Vec<Record>,
    tree: Tree,
    last_checkpoint: Option<Checkpoint>,
}

impl Verified {
    /// The records, in order.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Their tree, for proofs.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The newest checkpoint; without one, nothing is signed.
    pub fn last_checkpoint(&self) -> Option<&Checkpoint> {
        self.last_checkpoint.as_ref()
    }

    /// How many records come after the newest checkpoint and are therefore not signed.
    pub fn uncovered(&self) -> u64 {
        self.tree.size()
            - self
                .last_checkpoint
                .as_ref()
                .map_or(0, |checkpoint| checkpoint.size)
    }

    /// Whether a checkpoint kept elsewhere is one of this very log: the check against a ledger that was cut back.
    pub fn contains(&self, checkpoint: &Checkpoint) -> bool {
        self.tree.root_at(checkpoint.size) == Some(checkpoint.root)
    }

    pub(super) fn into_tree(self) -> Tree {
        self.tree
    }
}

/// What is good in a ledger, up to where its last line may be torn.
pub(super) struct Scanned {
    pub(super) verified: Verified,
    /// How many bytes are good; less than a header for an empty or new file.
    pub(super) good_bytes: usize,
}

pub(super) fn scan(bytes: &[u8], key: &VerifyingKey) -> Result<Scanned, LedgerError> {
    let mut verified = Verified {
        records: Vec::new(),
        tree: Tree::new(),
        last_checkpoint: None,
    };
    let Some(mut rest) = bytes.strip_prefix(frame::HEADER) else {
        let half_written = frame::HEADER.starts_with(bytes);
        return if half_written {
            Ok(Scanned {
                verified,
                good_bytes: 0,
            })
        } else {
            Err(LedgerError::NotALedger)
        };
    };
    let mut number = 1;
    while !rest.is_empty() {
        number += 1;
        let end = rest.iter().position(|b| *b == b'\n');
        let (line, after) = match end {
            Some(end) => (
                rest.get(..end).unwrap_or_default(),
                rest.get(end + 1..).unwrap_or_default(),
            ),
            None => (rest, &[][..]),
        };
        match frame::decode(line).filter(|_| end.is_some()) {
            Some((kind, payload)) => take(&mut verified, kind, payload, number, key)?,
            None if after.is_empty() => break,
            None => {
                return Err(LedgerError::Damaged {
                    line: number,
                    what: "length or checksum",
                });
            }
        }
        rest = after;
    }
    Ok(Scanned {
        verified,
        good_bytes: bytes.len() - rest.len(),
    })
}

fn take(
    verified: &mut Verified,
    kind: Kind,
    payload: &str,
    line: usize,
    key: &VerifyingKey,
) -> Result<(), LedgerError> {
    let damaged = |what| LedgerError::Damaged { line, what };
    match kind {
        Kind::Record => {
            let record = Record::from_canonical(payload)
                .ok_or_else(|| damaged("not a record in canonical form"))?;
            if record.seq != verified.tree.size() {
                return Err(damaged("a record is missing, repeated or out of place"));
            }
            verified.tree.push(merkle::leaf_hash(payload.as_bytes()));
            verified.records.push(record);
        }
        Kind::Checkpoint => {
            let note: String =
                serde_json::from_str(payload).map_err(|_| damaged("a checkpoint is no text"))?;
            let wrong = |source| LedgerError::Checkpoint { line, source };
            let checkpoint = Checkpoint::open(&note, key).map_err(wrong)?;
            if checkpoint.size != verified.tree.size() || checkpoint.root != verified.tree.root() {
                return Err(wrong(NoteError::WrongTree));
            }
            verified.last_checkpoint = Some(checkpoint);
        }
    }
    Ok(())
}
