//! Reading a ledger without believing it: every line, its place, its tree, its checkpoints, its keys.
//!
//! A ledger is read line by line, so that its length costs time and not memory. Every checkpoint must be over the tree that
//! the records before it give; signatures are verified where they decide: the first, each one that hands over to another
//! key, the last of every key and the last of all. What lies between is under a later signature.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::chain::{self, Chain, Rotation};
use super::frame::{self, Kind};
use super::merkle::{self, Frontier, Hash, Nodes, Tree};
use super::note::{Checkpoint, NoteError, VerifyingKey};
use super::record::{Detail, Record};
use super::tiles::TileTree;
use super::{LedgerError, files};

/// Verifies a ledger with nothing but one of its public keys, and keeps all its records in memory.
pub fn verify(path: &Path, key: &VerifyingKey) -> Result<Verified, LedgerError> {
    let (mut records, mut tree) = (Vec::new(), Tree::new());
    let audited = audit(path, std::slice::from_ref(key), &[], &mut |record, leaf| {
        tree.push(merkle::leaf_hash(leaf.as_bytes()));
        records.push(record);
    })?;
    if audited.base.size() > 0 {
        return Err(LedgerError::Pruned {
            first: audited.base.size(),
        });
    }
    Ok(Verified {
        records,
        tree,
        last_checkpoint: audited.last_checkpoint,
    })
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
}

/// Verifies a ledger in all its files, giving each record and its leaf to `each`.
///
/// `trusted` are keys of which one must be among the log's; `held` are checkpoints (signed notes) that were kept
/// elsewhere, each of which must be one of this log's past: against deleting, editing, reordering, truncating, forking,
/// rolling back and signing anew.
pub fn audit(
    path: &Path,
    trusted: &[VerifyingKey],
    held: &[String],
    each: &mut dyn FnMut(Record, &str),
) -> Result<Audited, LedgerError> {
    let mut scanner = Scanner::new(path, trusted, held)?;
    for file in files::closed(path)? {
        let end = scanner.file(&file, each)?;
        if end.torn > 0 {
            let (line, what) = (end.lines + 1, "length or checksum");
            return Err(LedgerError::Damaged { line, what }.in_file(&file));
        }
    }
    let end = scanner.file(path, each)?;
    if end.good_bytes < frame::HEADER.len() as u64 {
        return Err(LedgerError::NotALedger);
    }
    if end.torn > 0 {
        return Err(LedgerError::TornTail {
            offset: usize::try_from(end.good_bytes).unwrap_or(usize::MAX),
        });
    }
    scanner.finish()
}

/// [`audit()`], with a tree to make proofs from: of the newest file from its records, before that from the tiles, which
/// are only read.
pub fn audit_with_tree(
    path: &Path,
    trusted: &[VerifyingKey],
    held: &[String],
    each: &mut dyn FnMut(Record, &str),
) -> Result<(Audited, TileTree), LedgerError> {
    let folder = files::tiles(path);
    let mut tree = match super::start_of(path)? {
        Some(start) => TileTree::load(&folder, start)?,
        None => TileTree::new(&folder),
    };
    let audited = audit(path, trusted, held, &mut |record, leaf| {
        if record.seq == tree.frontier().size() {
            tree.push(merkle::leaf_hash(leaf.as_bytes()));
        }
        each(record, leaf);
    })?;
    Ok((audited, tree))
}

/// What an audit found.
#[derive(Debug)]
pub struct Audited {
    /// Where the records that are there begin; what lies before was removed by retention.
    pub base: Frontier,
    /// The whole tree's edge.
    pub frontier: Frontier,
    /// The newest checkpoint; without one, nothing is signed.
    pub last_checkpoint: Option<Checkpoint>,
    /// That checkpoint as a signed note.
    pub last_note: Option<String>,
    /// The log's keys, oldest first. Empty if nothing is signed.
    pub keys: Vec<VerifyingKey>,
    /// The proofs by which each key named the next.
    pub rotations: Vec<Rotation>,
}

impl Audited {
    /// How many records come after the newest checkpoint and are therefore not signed.
    pub fn uncovered(&self) -> u64 {
        let signed = self.last_checkpoint.as_ref().map_or(0, |c| c.size);
        self.frontier.size() - signed
    }
}

/// How a file of a ledger ends.
pub(super) struct FileEnd {
    /// How many bytes are good; less than a header for an empty or new file.
    pub(super) good_bytes: u64,
    /// How many bytes behind them are not.
    pub(super) torn: u64,
    lines: usize,
}

/// What is needed to go on writing.
pub(super) struct Open {
    /// The key in force, if anything is signed.
    pub(super) current: Option<VerifyingKey>,
    pub(super) rotations: Vec<Rotation>,
    pub(super) last: Option<Checkpoint>,
}

/// The second line of a file that goes on where another ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Start {
    /// How many records lie before.
    pub(super) first: u64,
    /// The key that signs.
    pub(super) key: String,
    /// The right edge of their tree.
    #[serde(with = "chain::hashes")]
    pub(super) peaks: Vec<Hash>,
    /// How it came to be that key.
    pub(super) rotations: Vec<Rotation>,
}

/// A checkpoint that somebody kept.
struct Held {
    note: String,
    checkpoint: Checkpoint,
    found: bool,
}

/// A rotation that waits for the old key's signature.
struct Pending {
    record: String,
    proof: Vec<Hash>,
}

/// The state between two lines.
pub(super) struct Scanner<'a> {
    path: &'a Path,
    trusted: &'a [VerifyingKey],
    held: Vec<Held>,
    chain: Option<Chain>,
    base: Option<Frontier>,
    frontier: Frontier,
    last: Option<(Checkpoint, String)>,
    /// The line and the file of a checkpoint whose signature has not been verified yet.
    unverified: Option<(usize, PathBuf)>,
    pending: Option<Pending>,
    removed_to: u64,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(
        path: &'a Path,
        trusted: &'a [VerifyingKey],
        held: &[String],
    ) -> Result<Self, LedgerError> {
        let parse = |note: &String| -> Result<Held, LedgerError> {
            Ok(Held {
                note: note.clone(),
                checkpoint: Checkpoint::unverified(note).map_err(LedgerError::Held)?,
                found: false,
            })
        };
        Ok(Self {
            path,
            trusted,
            held: held.iter().map(parse).collect::<Result<_, _>>()?,
            chain: None,
            base: None,
            frontier: Frontier::new(),
            last: None,
            unverified: None,
            pending: None,
            removed_to: 0,
        })
    }

    /// Reads one file to its end, or to where its last line is torn.
    pub(super) fn file(
        &mut self,
        file: &Path,
        each: &mut dyn FnMut(Record, &str),
    ) -> Result<FileEnd, LedgerError> {
        let opened = File::open(file).map_err(LedgerError::Io)?;
        let length = opened.metadata().map_err(LedgerError::Io)?.len();
        let mut reader = BufReader::with_capacity(256 << 10, opened);
        let mut line = Vec::with_capacity(4096);
        let (mut number, mut good) = (0, 0u64);
        loop {
            line.clear();
            let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line);
            let read = read.map_err(LedgerError::Io)? as u64;
            let end = |lines| FileEnd {
                good_bytes: good,
                torn: length.saturating_sub(good),
                lines,
            };
            if read == 0 {
                return Ok(end(number));
            }
            let whole = line.strip_suffix(b"\n");
            if number == 0 {
                if frame::HEADER != line {
                    let begun = frame::HEADER.starts_with(&line);
                    return if begun {
                        Ok(end(0))
                    } else {
                        Err(LedgerError::NotALedger)
                    };
                }
            } else {
                match whole.and_then(frame::decode) {
                    Some((kind, payload)) => self
                        .line(kind, payload, number + 1, file, each)
                        .map_err(|error| self.placed(error, file))?,
                    None if good + read >= length => return Ok(end(number)),
                    None => {
                        let (line, what) = (number + 1, "length or checksum");
                        return Err(self.placed(LedgerError::Damaged { line, what }, file));
                    }
                }
            }
            number += 1;
            good += read;
        }
    }

    /// What was found, if the last signature, the keys and every checkpoint that was held are right.
    pub(super) fn finish(mut self) -> Result<Audited, LedgerError> {
        self.verify_last()?;
        let chain = self.chain.as_ref();
        if chain.is_some_and(|chain| !chain.anchored()) {
            return Err(LedgerError::UntrustedKey);
        }
        let base = self.base.take().unwrap_or_default();
        if base.size() > self.removed_to {
            return Err(LedgerError::Removed { first: base.size() });
        }
        let keys = chain.map(|chain| chain.keys.clone()).unwrap_or_default();
        for held in &self.held {
            self.check_held(held, &base, &keys)?;
        }
        let (last_checkpoint, last_note) = self.last.unzip();
        Ok(Audited {
            base,
            frontier: self.frontier,
            last_checkpoint,
            last_note,
            keys,
            rotations: self.chain.map(|c| c.rotations).unwrap_or_default(),
        })
    }

    /// The state to go on from, if the last signature and the keys are right.
    pub(super) fn finish_open(mut self) -> Result<Open, LedgerError> {
        self.verify_last()?;
        if self.chain.as_ref().is_some_and(|chain| !chain.anchored()) {
            return Err(LedgerError::UntrustedKey);
        }
        let (current, rotations) = self.chain.map(|c| (c.current, c.rotations)).unzip();
        Ok(Open {
            current,
            rotations: rotations.unwrap_or_default(),
            last: self.last.map(|(checkpoint, _)| checkpoint),
        })
    }

    /// Whether the last record is a rotation that the old key has not signed.
    pub(super) fn rotation_pending(&self) -> bool {
        self.pending.is_some()
    }

    fn placed(&self, error: LedgerError, file: &Path) -> LedgerError {
        if file == self.path {
            error
        } else {
            error.in_file(file)
        }
    }

    fn line(
        &mut self,
        kind: Kind,
        payload: &str,
        line: usize,
        file: &Path,
        each: &mut dyn FnMut(Record, &str),
    ) -> Result<(), LedgerError> {
        let damaged = |what| LedgerError::Damaged { line, what };
        if self.base.is_none() && kind != Kind::Start {
            self.base = Some(Frontier::new());
        }
        match kind {
            Kind::Start if line != 2 => Err(damaged("a file begins in the middle of another")),
            Kind::Start => {
                let start = serde_json::from_str(payload).ok();
                let start = start.ok_or_else(|| damaged("a beginning that is none"))?;
                self.start(start, line)
            }
            _ if line == 2 && self.frontier.size() > 0 => {
                Err(damaged("the file does not say where it goes on"))
            }
            Kind::Record => {
                let record = Record::from_canonical(payload)
                    .ok_or_else(|| damaged("not a record in canonical form"))?;
                if record.seq != self.frontier.size() {
                    return Err(damaged("a record is missing, repeated or out of place"));
                }
                self.record(&record, payload);
                each(record, payload);
                Ok(())
            }
            Kind::Checkpoint => {
                let note: String = serde_json::from_str(payload)
                    .map_err(|_| damaged("a checkpoint is no text"))?;
                self.checkpoint(note, line, file)
                    .map_err(|source| LedgerError::Checkpoint { line, source })
            }
        }
    }

    fn start(&mut self, start: Start, line: usize) -> Result<(), LedgerError> {
        let wrong = |source| LedgerError::Checkpoint { line, source };
        let key: VerifyingKey = start.key.parse().map_err(wrong)?;
        let frontier =
            Frontier::from_peaks(start.first, start.peaks).ok_or(LedgerError::Damaged {
                line,
                what: "the tree's edge does not fit its size",
            })?;
        if self.base.is_some() {
            let goes_on = frontier == self.frontier
                && self
                    .chain
                    .as_ref()
                    .is_some_and(|chain| chain.current == key);
            return if goes_on {
                Ok(())
            } else {
                Err(LedgerError::Damaged {
                    line,
                    what: "the file does not go on where the one before it ends",
                })
            };
        }
        let chain = Chain::from_rotations(&start.rotations, &key, self.trusted).map_err(wrong)?;
        self.chain = Some(chain);
        self.base = Some(frontier.clone());
        self.frontier = frontier;
        self.compare_held();
        Ok(())
    }

    fn record(&mut self, record: &Record, payload: &str) {
        self.pending = chain::new_key(record).map(|_| Pending {
            record: payload.to_owned(),
            proof: self.frontier.peaks().iter().rev().copied().collect(),
        });
        if record.action == RETENTION
            && record.actor == chain::LEDGER
            && let Some(Detail::Number(removed)) = record.detail.get("removed_to")
        {
            self.removed_to = self.removed_to.max(*removed);
        }
        self.frontier.push(merkle::leaf_hash(payload.as_bytes()));
        self.compare_held();
    }

    fn compare_held(&mut self) {
        let size = self.frontier.size();
        if self.held.iter().any(|held| held.checkpoint.size == size) {
            let root = self.frontier.root();
            for held in self.held.iter_mut() {
                held.found |= held.checkpoint.size == size && held.checkpoint.root == root;
            }
        }
    }

    fn checkpoint(&mut self, note: String, line: usize, file: &Path) -> Result<(), NoteError> {
        let checkpoint = Checkpoint::unverified(&note)?;
        let first = self.last.is_none();
        if self.chain.is_none() {
            let key = self.first_key(&note).ok_or(NoteError::NotSigned)?;
            self.chain = Some(Chain::new(key, self.trusted));
        }
        let Some(chain) = self.chain.as_mut() else {
            return Err(NoteError::NotSigned);
        };
        if checkpoint.origin != chain.current.name() {
            return Err(NoteError::WrongOrigin {
                found: checkpoint.origin,
            });
        }
        if !chain.current.signs(&note)? {
            return Err(NoteError::NotSigned);
        }
        if first || self.pending.is_some() {
            Checkpoint::open(&note, &chain.current)?;
        }
        if checkpoint.size != self.frontier.size() || checkpoint.root != self.frontier.root() {
            return Err(NoteError::WrongTree);
        }
        if let Some(Pending { record, proof }) = self.pending.take() {
            let rotation = Rotation {
                checkpoint: note.clone(),
                proof,
                record,
            };
            chain.rotate(rotation, self.trusted)?;
            self.unverified = None;
        } else {
            self.unverified = Some((line, file.to_owned()));
        }
        self.last = Some((checkpoint, note));
        Ok(())
    }

    /// The key a log begins with: a trusted one if it signed, or the one that the first rotation names as the old one.
    fn first_key(&self, note: &str) -> Option<VerifyingKey> {
        let signed = |key: &&VerifyingKey| key.signs(note).unwrap_or(false);
        let found = self.trusted.iter().find(signed).cloned();
        let found = found.or_else(|| files::first_rotation(self.path));
        found.or_else(|| self.trusted.first().cloned())
    }

    fn verify_last(&mut self) -> Result<(), LedgerError> {
        let (Some((line, file)), Some(chain), Some((_, note))) =
            (self.unverified.take(), &self.chain, &self.last)
        else {
            return Ok(());
        };
        match Checkpoint::open(note, &chain.current) {
            Ok(_) => Ok(()),
            Err(source) => Err(self.placed(LedgerError::Checkpoint { line, source }, &file)),
        }
    }

    fn check_held(
        &self,
        held: &Held,
        base: &Frontier,
        keys: &[VerifyingKey],
    ) -> Result<(), LedgerError> {
        let Held {
            note,
            checkpoint,
            found,
        } = held;
        if !keys.iter().any(|key| Checkpoint::open(note, key).is_ok()) {
            return Err(LedgerError::Held(NoteError::NotSigned));
        }
        let size = checkpoint.size;
        if size > self.frontier.size() {
            let now = self.frontier.size();
            return Err(LedgerError::RolledBack { held: size, now });
        }
        let extends = *found || (size < base.size() && self.proven(checkpoint, base)?);
        if extends {
            Ok(())
        } else {
            Err(LedgerError::Forked { size })
        }
    }

    /// Whether the removed part of the log extends a checkpoint; by a proof made from the tiles.
    fn proven(&self, checkpoint: &Checkpoint, base: &Frontier) -> Result<bool, LedgerError> {
        let tiles = TileTree::load(&files::tiles(self.path), base.clone())?;
        let proof = tiles.consistency_proof(checkpoint.size, base.size())?;
        let proof = proof.unwrap_or_default();
        let (old, new) = (&checkpoint.root, &base.root());
        Ok(merkle::verify_consistency(
            checkpoint.size,
            old,
            base.size(),
            new,
            &proof,
        ))
    }
}

/// The action of a record that says what retention removed.
pub(super) const RETENTION: &str = "retention";
/// The longest line, with its head and line feed.
const MAX_LINE: u64 = frame::MAX_PAYLOAD as u64 + 64;
