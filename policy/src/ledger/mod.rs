//! What happened: an append-only Merkle log.
//!
//! Each record is one leaf of an RFC 6962 tree. Checkpoints, signed notes over the tree's size and root, stand between the
//! records, so that [`audit()`] needs the files and one public key, nothing else. What a checkpoint covers cannot be
//! changed without its key; records after the last checkpoint are only guarded against accidents, and
//! [`Audited::uncovered`] says how many these are. Somebody who can write the file can cut it back to an older checkpoint:
//! keep a checkpoint elsewhere and give it to [`audit()`], or let [witnesses](cosign) keep one.
//!
//! A write is one line or several and then `fdatasync`; what has been acknowledged is on the disk. A crash in the middle
//! leaves a torn last line; opening cuts it off and records that. Damage anywhere else refuses the ledger.
//!
//! The key changes by a record under the old key's signature ([`Ledger::rotate_key`]), the file by one that names the tree
//! so far ([`Ledger::rotate_file`]); full files can be removed ([`Ledger::retain`]), and the [tiles] keep every proof.

mod chain;
pub mod cosign;
mod error;
pub mod events;
mod files;
mod filter;
mod follow;
mod frame;
pub mod merkle;
pub mod note;
mod record;
pub mod tiles;
mod verify;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub use chain::Rotation;
pub use cosign::{Cosigner, WitnessKey, Witnesses};
pub use error::LedgerError;
pub use filter::Filter;
pub use follow::Follower;
pub use merkle::{Frontier, Hash, Nodes, Tree};
pub use note::{Checkpoint, NoteError, Signer, VerifyingKey};
pub use record::{Clock, Detail, Entry, Outcome, Record, Stamp, SystemClock};
pub use tiles::TileTree;
pub use verify::{Audited, Verified, audit, audit_with_tree, verify};

pub(crate) use chain::{Chain, hashes};

use frame::Kind;
use verify::{Scanner, Start};

/// An open ledger; one process at a time may hold it.
pub struct Ledger {
    path: PathBuf,
    file: File,
    /// How much of the file is known to be good and durable.
    length: u64,
    tree: TileTree,
    signer: Signer,
    rotations: Vec<Rotation>,
    last: Option<Checkpoint>,
    clock: Box<dyn Clock>,
    repaired: Option<u64>,
    failed: bool,
}

impl Ledger {
    /// Opens the ledger at `path`, or makes an empty one (mode 0600). The name of `signer`'s key is the log's origin.
    ///
    /// Everything in its newest file is verified with that key. A torn last line is cut off, and a record of actor
    /// `ledger`, action `repair` says so.
    pub fn open(path: &Path, signer: Signer) -> Result<Self, LedgerError> {
        Self::open_with_keys(path, vec![signer], Box::new(SystemClock))
    }

    /// [`Ledger::open`] with another clock, for tests and replays.
    pub fn open_with_clock(
        path: &Path,
        signer: Signer,
        clock: Box<dyn Clock>,
    ) -> Result<Self, LedgerError> {
        Self::open_with_keys(path, vec![signer], clock)
    }

    /// [`Ledger::open`] with several keys, of which the log's present one is taken (a crash may have interrupted a
    /// rotation), and with another clock.
    pub fn open_with_keys(
        path: &Path,
        signers: Vec<Signer>,
        clock: Box<dyn Clock>,
    ) -> Result<Self, LedgerError> {
        files::resume(path)?;
        let mut file = open_locked(path, false)?;
        files::forget(path)?;
        let mut tree = match start_of(path)? {
            Some(start) => TileTree::load(&files::tiles(path), start)?,
            None => TileTree::new(&files::tiles(path)),
        };
        let trusted: Vec<VerifyingKey> = signers.iter().map(Signer::verifying_key).collect();
        let mut scanner = Scanner::new(path, &trusted, &[])?;
        let end = scanner.file(path, &mut |_, leaf| {
            tree.push(merkle::leaf_hash(leaf.as_bytes()));
        })?;
        let void = scanner.rotation_pending();
        let state = scanner.finish_open()?;
        let mut length = end.good_bytes;
        let torn = if length < frame::HEADER.len() as u64 {
            file.set_len(0)
                .and_then(|()| file.write_all(frame::HEADER))
                .map_err(LedgerError::Io)?;
            files::sync_folder(path)?;
            length = frame::HEADER.len() as u64;
            end.torn + end.good_bytes
        } else {
            file.set_len(length).map_err(LedgerError::Io)?;
            end.torn
        };
        file.seek(SeekFrom::End(0))
            .and_then(|_| file.sync_data())
            .map_err(LedgerError::Io)?;
        let current = |signer: &Signer| {
            let key = state.current.as_ref();
            key.is_none_or(|key| *key == signer.verifying_key())
        };
        let mut ledger = Self {
            path: path.to_owned(),
            file,
            length,
            tree,
            signer: signers
                .into_iter()
                .find(current)
                .ok_or(LedgerError::UntrustedKey)?,
            rotations: state.rotations,
            last: state.last,
            clock,
            repaired: (torn > 0).then_some(torn),
            failed: false,
        };
        ledger.record_repair(torn, void)?;
        Ok(ledger)
    }

    /// Appends one record and returns it; it is on the disk when this returns.
    pub fn append(&mut self, entry: Entry) -> Result<Record, LedgerError> {
        self.commit(vec![entry], false).map(only)
    }

    /// Appends one record and a checkpoint over it, in one write; returns the record and the checkpoint (a C2SP signed
    /// note).
    pub fn append_signed(&mut self, entry: Entry) -> Result<(Record, String), LedgerError> {
        let (records, note) = self.commit(vec![entry], true)?;
        Ok((only((records, String::new())), note))
    }

    /// Appends several records with one wait for the disk; all of them or none. Nothing is appended if one is too large.
    pub fn append_all(&mut self, entries: Vec<Entry>) -> Result<Vec<Record>, LedgerError> {
        self.commit(entries, false).map(|(records, _)| records)
    }

    /// Signs the tree as it stands, writes the checkpoint to the file and returns it (a C2SP signed note).
    pub fn checkpoint(&mut self) -> Result<String, LedgerError> {
        self.commit(Vec::new(), true).map(|(_, note)| note)
    }

    /// Hands the log over to another key of the same name: a record of action `rotate-key` under a checkpoint by the old
    /// key, and a checkpoint by the new one. The new key must be durable before; the old one can go after.
    pub fn rotate_key(&mut self, new: Signer) -> Result<(), LedgerError> {
        let (old_key, new_key) = (self.verifying_key(), new.verifying_key());
        if old_key.name() != new_key.name() || old_key == new_key {
            return Err(LedgerError::Note(NoteError::BadKey));
        }
        let proof = self.tree.frontier().peaks().iter().rev().copied().collect();
        let entry = chain::rotation_entry(&old_key, &new_key);
        let (records, checkpoint) = self.commit(vec![entry], true)?;
        self.rotations.push(Rotation {
            checkpoint,
            proof,
            record: only((records, String::new())).canonical(),
        });
        self.signer = new;
        self.checkpoint()?;
        Ok(())
    }

    /// Closes the file under a checkpoint and goes on in a new one that names the tree so far.
    pub fn rotate_file(&mut self) -> Result<(), LedgerError> {
        let first = match start_of(&self.path)? {
            Some(start) => start.size(),
            None => 0,
        };
        if self.tree.size() == first {
            return Ok(());
        }
        let note = self.checkpoint()?;
        self.tree.sync()?;
        let start = Start {
            first: self.tree.size(),
            key: self.verifying_key().to_string(),
            peaks: self.tree.frontier().peaks().to_vec(),
            rotations: self.rotations.clone(),
        };
        let start = serde_json::to_string(&start).unwrap_or_default(); // strings and integers: cannot fail
        let mut text = String::from_utf8_lossy(frame::HEADER).into_owned();
        text.push_str(&line(Kind::Start, &start)?);
        text.push_str(&line(Kind::Checkpoint, &quoted(&note))?);
        let fresh = files::fresh(&self.path);
        let mut file = open_locked(&fresh, true)?;
        file.write_all(text.as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(LedgerError::Io)?;
        files::sync_folder(&self.path)?;
        fs::rename(&self.path, files::numbered(&self.path, first)).map_err(LedgerError::Io)?;
        files::sync_folder(&self.path)?;
        fs::rename(&fresh, &self.path).map_err(LedgerError::Io)?;
        files::sync_folder(&self.path)?;
        (self.file, self.length, self.failed) = (file, text.len() as u64, false);
        Ok(())
    }

    /// Removes full files that hold only records before `keep_from`, after a record that says so; returns how many
    /// records are gone. Their hashes stay in the tiles, so that proofs and earlier checkpoints keep their worth.
    pub fn retain(&mut self, keep_from: u64) -> Result<u64, LedgerError> {
        let closed = files::closed(&self.path)?;
        let present = start_of(&self.path)?.map_or(0, |start| start.size());
        let ends = closed.iter().skip(1).map(|file| files::first_of(file));
        let ends: Vec<u64> = ends.flatten().chain([present]).collect();
        let remove: Vec<_> = closed
            .iter()
            .zip(ends)
            .filter(|(_, end)| *end <= keep_from)
            .collect();
        let Some((_, removed_to)) = remove.last() else {
            return Ok(0);
        };
        let object = format!("records 0 to {removed_to}");
        let entry = Entry::new(chain::LEDGER, verify::RETENTION, &object, Outcome::Done);
        self.append_signed(entry.with("removed_to", *removed_to))?;
        self.tree.sync()?;
        for (file, _) in &remove {
            fs::remove_file(file).map_err(LedgerError::Io)?;
        }
        files::sync_folder(&self.path)?;
        Ok(*removed_to)
    }

    /// The tree: size, root and, by [`Nodes`], proofs.
    pub fn tree(&self) -> &TileTree {
        &self.tree
    }

    /// The newest checkpoint, if there is any.
    pub fn last_checkpoint(&self) -> Option<&Checkpoint> {
        self.last.as_ref()
    }

    /// The key that signs this ledger now.
    pub fn verifying_key(&self) -> VerifyingKey {
        self.signer.verifying_key()
    }

    /// The size of the file that is written to, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.length
    }

    /// How many torn bytes opening cut off, if any.
    pub fn repaired(&self) -> Option<u64> {
        self.repaired
    }

    /// Writes records and perhaps a checkpoint over them in one go, and believes it only when the disk has it.
    fn commit(
        &mut self,
        entries: Vec<Entry>,
        sign: bool,
    ) -> Result<(Vec<Record>, String), LedgerError> {
        self.tree.flush()?;
        let stamp = self.clock.now();
        let mut frontier = self.tree.frontier().clone();
        let (mut text, mut records, mut leaves) = (String::new(), Vec::new(), Vec::new());
        for entry in entries {
            let record = entry.stamped(frontier.size(), stamp);
            let payload = record.canonical();
            text.push_str(&line(Kind::Record, &payload)?);
            let leaf = merkle::leaf_hash(payload.as_bytes());
            frontier.push(leaf);
            leaves.push(leaf);
            records.push(record);
        }
        let mut note = String::new();
        let checkpoint = Checkpoint {
            origin: self.signer.name().to_owned(),
            size: frontier.size(),
            root: frontier.root(),
        };
        if sign {
            note = self
                .signer
                .sign(&checkpoint.to_text())
                .map_err(LedgerError::Note)?;
            text.push_str(&line(Kind::Checkpoint, &quoted(&note))?);
        }
        self.write(text.as_bytes())?;
        leaves.into_iter().for_each(|leaf| self.tree.push(leaf));
        if sign {
            self.last = Some(checkpoint);
        }
        // The records are on the disk; tiles that could not be written are tried again before the next ones.
        let _ = self.tree.flush();
        Ok((records, note))
    }

    /// Writes and waits for the disk. After a failure the file's end is unknown: it is cut back to what is known to be
    /// durable before anything else is written, so that a disk with room again is used again.
    fn write(&mut self, bytes: &[u8]) -> Result<(), LedgerError> {
        if self.failed {
            self.file
                .set_len(self.length)
                .and_then(|()| self.file.sync_data())
                .map_err(LedgerError::Full)?;
            self.failed = false;
        }
        let written = self
            .file
            .write_all(bytes)
            .and_then(|()| self.file.sync_data());
        self.failed = written.is_err();
        written.map_err(LedgerError::Full)?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn record_repair(&mut self, torn: u64, void: bool) -> Result<(), LedgerError> {
        if torn > 0 {
            let entry = Entry::new(chain::LEDGER, "repair", "torn-tail", Outcome::Done);
            self.append(entry.with("dropped_bytes", torn))?;
        } else if void {
            // Signed as the last record, it would hand over to a key that may not exist.
            let entry = Entry::new(chain::LEDGER, "repair", "rotation-void", Outcome::Done);
            self.append(entry)?;
        }
        Ok(())
    }
}

fn open_locked(path: &Path, truncate: bool) -> Result<File, LedgerError> {
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(LedgerError::Io)?;
    file.try_lock().map_err(|error| match error {
        fs::TryLockError::WouldBlock => LedgerError::Busy,
        fs::TryLockError::Error(error) => LedgerError::Io(error),
    })?;
    if truncate {
        file.set_len(0).map_err(LedgerError::Io)?;
    }
    Ok(file)
}

/// The tree before a file's first record, if the file goes on from another.
fn start_of(path: &Path) -> Result<Option<Frontier>, LedgerError> {
    let mut lines = BufReader::new(File::open(path).map_err(LedgerError::Io)?).split(b'\n');
    let second = lines.nth(1).transpose().map_err(LedgerError::Io)?;
    let Some((Kind::Start, payload)) = second.as_deref().and_then(frame::decode) else {
        return Ok(None);
    };
    let start: Option<Start> = serde_json::from_str(payload).ok();
    let frontier = start.and_then(|start| Frontier::from_peaks(start.first, start.peaks));
    frontier.map(Some).ok_or(LedgerError::Damaged {
        line: 2,
        what: "a beginning that is none",
    })
}

fn line(kind: Kind, payload: &str) -> Result<String, LedgerError> {
    if payload.len() > frame::MAX_PAYLOAD {
        return Err(LedgerError::TooLarge {
            bytes: payload.len(),
        });
    }
    Ok(frame::encode(kind, payload))
}

fn quoted(note: &str) -> String {
    serde_json::Value::from(note).to_string()
}

/// The one record of a commit of one entry.
fn only((records, _): (Vec<Record>, String)) -> Record {
    #[expect(
        clippy::expect_used,
        reason = "a commit returns as many records as it was given entries"
    )]
    records.into_iter().next().expect("one entry, one record")
}

#[cfg(test)]
mod tests;
