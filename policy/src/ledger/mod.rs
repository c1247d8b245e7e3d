//! What happened: an append-only Merkle log in one file.
//!
//! Each record is one leaf of an RFC 6962 tree. Checkpoints, signed notes over the tree's size and root, stand in the
//! same file, so that [`verify()`] needs the file and the public key, nothing else. What a checkpoint covers cannot be
//! changed without its key; records after the last checkpoint are only guarded against accidents, and [`Verified`] says
//! how many these are. Somebody who can write the file can cut it back to an older checkpoint: keep a checkpoint
//! elsewhere and ask [`Verified::contains`].
//!
//! A crash in the middle of a write leaves a torn last line; opening cuts it off and records that. Damage anywhere else
//! refuses the ledger.

mod frame;
pub mod merkle;
pub mod note;
mod record;
mod verify;

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub use merkle::{Hash, Tree};
pub use note::{Checkpoint, NoteError, Signer, VerifyingKey};
pub use record::{Clock, Detail, Entry, Outcome, Record, Stamp, SystemClock};
pub use verify::{Verified, verify};

use frame::Kind;

/// An open ledger; one process at a time may hold it.
pub struct Ledger {
    file: File,
    tree: Tree,
    signer: Signer,
    clock: Box<dyn Clock>,
    repaired: Option<u64>,
    failed: bool,
}

impl Ledger {
    /// Opens the ledger at `path`, or makes an empty one (mode 0600). The name of `signer`'s key is the log's origin.
    ///
    /// Everything already there is verified with that key. A torn last line is cut off, and a record of actor `ledger`,
    /// action `repair` says so.
    pub fn open(path: &Path, signer: Signer) -> Result<Self, LedgerError> {
        Self::open_with_clock(path, signer, Box::new(SystemClock))
    }

    /// [`Ledger::open`] with another clock, for tests and replays.
    pub fn open_with_clock(
        path: &Path,
        signer: Signer,
        clock: Box<dyn Clock>,
    ) -> Result<Self, LedgerError> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(LedgerError::Io)?;
        file.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => LedgerError::Busy,
            std::fs::TryLockError::Error(error) => LedgerError::Io(error),
        })?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(LedgerError::Io)?;
        let checked = verify::scan(&bytes, &signer.verifying_key())?;
        let torn = bytes.len().saturating_sub(checked.good_bytes);
        if checked.good_bytes < frame::HEADER.len() {
            file.set_len(0)
                .and_then(|()| file.write_all(frame::HEADER))
                .map_err(LedgerError::Io)?;
            sync_directory(path)?;
        } else if torn > 0 {
            file.set_len(checked.good_bytes as u64)
                .map_err(LedgerError::Io)?;
        }
        file.seek(SeekFrom::End(0))
            .and_then(|_| file.sync_data())
            .map_err(LedgerError::Io)?;
        let repaired = (torn > 0).then_some(torn as u64);
        let mut ledger = Self {
            file,
            tree: checked.verified.into_tree(),
            signer,
            clock,
            repaired,
            failed: false,
        };
        if let Some(dropped) = repaired {
            let entry = Entry::new("ledger", "repair", "torn-tail", Outcome::Done)
                .with("dropped_bytes", dropped);
            ledger.append(entry)?;
        }
        Ok(ledger)
    }

    /// Appends one record and returns it; it is on the disk when this returns.
    pub fn append(&mut self, entry: Entry) -> Result<Record, LedgerError> {
        let record = entry.stamped(self.tree.size(), self.clock.now());
        let payload = record.canonical();
        self.write(Kind::Record, &payload)?;
        self.tree.push(merkle::leaf_hash(payload.as_bytes()));
        Ok(record)
    }

    /// Signs the tree as it stands, writes the checkpoint to the file and returns it (a C2SP signed note).
    pub fn checkpoint(&mut self) -> Result<String, LedgerError> {
        let checkpoint = Checkpoint {
            origin: self.signer.name().to_owned(),
            size: self.tree.size(),
            root: self.tree.root(),
        };
        let note = self
            .signer
            .sign(&checkpoint.to_text())
            .map_err(LedgerError::Note)?;
        let payload = serde_json::Value::from(note.as_str()).to_string();
        self.write(Kind::Checkpoint, &payload)?;
        Ok(note)
    }

    /// The tree: size, root and proofs.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// The key that verifies this ledger.
    pub fn verifying_key(&self) -> VerifyingKey {
        self.signer.verifying_key()
    }

    /// How many torn bytes opening cut off, if any.
    pub fn repaired(&self) -> Option<u64> {
        self.repaired
    }

    /// Writes one line and waits for the disk. After a failure the file's end is unknown, so that nothing more is
    /// written; opening it again repairs it.
    fn write(&mut self, kind: Kind, payload: &str) -> Result<(), LedgerError> {
        if self.failed {
            return Err(LedgerError::Failed);
        }
        if payload.len() > frame::MAX_PAYLOAD {
            return Err(LedgerError::TooLarge {
                bytes: payload.len(),
            });
        }
        let line = frame::encode(kind, payload);
        let written = self
            .file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_data());
        self.failed = written.is_err();
        written.map_err(LedgerError::Io)
    }
}

/// Why a ledger was not opened, written or believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The system refused.
    #[error("the ledger file cannot be used: {0}")]
    Io(#[source] io::Error),
    /// Another process holds it.
    #[error(
        "the ledger is held by another process; stop that agent, or give this one its own ledger"
    )]
    Busy,
    /// A write failed before.
    #[error("the ledger refused a write before; open it again to repair its end")]
    Failed,
    /// A record is larger than a line may be.
    #[error("a record of {bytes} bytes is larger than {max}; put the bulk elsewhere and its digest here", max = frame::MAX_PAYLOAD)]
    TooLarge {
        /// The size.
        bytes: usize,
    },
    /// The file is not a ledger of this version.
    #[error("not a casemate ledger of version 1; check the path")]
    NotALedger,
    /// The last line is torn.
    #[error(
        "the last line, at byte {offset}, is torn; let its agent open the ledger once to repair it"
    )]
    TornTail {
        /// Where it begins.
        offset: usize,
    },
    /// A line other than the last is damaged.
    #[error(
        "line {line} is damaged ({what}); restore the ledger from a copy, and treat the host as suspect"
    )]
    Damaged {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// A checkpoint is not by the given key, or not over this tree.
    #[error(
        "the checkpoint in line {line} does not verify: {source}; the records before it are not what was signed"
    )]
    Checkpoint {
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        source: NoteError,
    },
    /// A note could not be made or read.
    #[error("{0}")]
    Note(#[source] NoteError),
}

/// Makes the new file's name durable.
fn sync_directory(path: &Path) -> Result<(), LedgerError> {
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(LedgerError::Io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct StoppedClock;
    impl Clock for StoppedClock {
        fn now(&self) -> Stamp {
            Stamp {
                wall: std::time::UNIX_EPOCH,
                monotonic_ns: 7,
            }
        }
    }

    fn signer(seed: u8) -> Signer {
        Signer::from_seed("log.test", &[seed; 32]).unwrap()
    }

    fn open(path: &Path) -> Result<Ledger, LedgerError> {
        Ledger::open_with_clock(path, signer(1), Box::new(StoppedClock))
    }

    fn entry(n: u64) -> Entry {
        Entry::new("agent", "launch", &format!("vm-{n}"), Outcome::Allowed).with("n", n)
    }

    /// A ledger of 3 records, a checkpoint, 2 records, a checkpoint.
    fn sample(directory: &tempfile::TempDir) -> std::path::PathBuf {
        let path = directory.path().join("ledger");
        let mut ledger = open(&path).unwrap();
        for n in 0..5 {
            assert_eq!(ledger.append(entry(n)).unwrap().seq, n);
            if n == 2 || n == 4 {
                ledger.checkpoint().unwrap();
            }
        }
        path
    }

    #[test]
    fn what_is_appended_verifies_and_survives_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let path = sample(&directory);
        let verified = verify(&path, &signer(1).verifying_key()).unwrap();
        assert_eq!((verified.records().len(), verified.uncovered()), (5, 0));
        let mut ledger = open(&path).unwrap();
        assert_eq!(ledger.tree().root(), verified.tree().root());
        assert_eq!(ledger.append(entry(5)).unwrap().seq, 5);
        let again = verify(&path, &signer(1).verifying_key()).unwrap();
        assert_eq!((again.records().len(), again.uncovered()), (6, 1));
        assert!(again.contains(verified.last_checkpoint().unwrap()));
        assert!(matches!(open(&path), Err(LedgerError::Busy)));
    }

    #[test]
    fn the_file_is_readable_as_documented() {
        let directory = tempfile::tempdir().unwrap();
        let text = std::fs::read_to_string(sample(&directory)).unwrap();
        let line = text.lines().nth(1).unwrap();
        let payload = r#"{"action":"launch","actor":"agent","code":"","detail":{"n":0},"emulated":false,"monotonic_ns":7,"object":"vm-0","outcome":"allowed","seq":0,"time":"1970-01-01T00:00:00.000000000Z"}"#;
        assert_eq!(
            line,
            format!(
                "R {} {:08x} {payload}",
                payload.len(),
                crc32fast::hash(payload.as_bytes())
            )
        );
        assert!(text.lines().nth(4).unwrap().starts_with("C "));
    }

    #[test]
    fn another_key_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = sample(&directory);
        assert!(matches!(
            verify(&path, &signer(2).verifying_key()),
            Err(LedgerError::Checkpoint { line: 5, .. })
        ));
        assert!(matches!(
            Ledger::open(&path, signer(2)),
            Err(LedgerError::Checkpoint { .. })
        ));
    }

    #[test]
    fn a_torn_tail_is_cut_off_and_recorded() {
        let directory = tempfile::tempdir().unwrap();
        let path = sample(&directory);
        let whole = std::fs::read(&path).unwrap();
        let last_line = whole[..whole.len() - 1]
            .iter()
            .rposition(|b| *b == b'\n')
            .unwrap()
            + 1;
        for cut in [last_line + 1, last_line + 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(matches!(
                verify(&path, &signer(1).verifying_key()),
                Err(LedgerError::TornTail { .. })
            ));
            let ledger = open(&path).unwrap();
            assert_eq!(ledger.repaired(), Some((cut - last_line) as u64));
            drop(ledger);
            let verified = verify(&path, &signer(1).verifying_key()).unwrap();
            assert_eq!(verified.records().last().unwrap().action, "repair");
            assert_eq!((verified.records().len(), verified.uncovered()), (6, 3));
        }
    }

    #[test]
    fn an_empty_or_half_written_header_is_a_new_ledger() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        for start in [&b""[..], &frame::HEADER[..5]] {
            std::fs::write(&path, start).unwrap();
            drop(open(&path).unwrap());
            assert!(verify(&path, &signer(1).verifying_key()).is_ok());
        }
        std::fs::write(&path, b"something else\n").unwrap();
        assert!(matches!(open(&path), Err(LedgerError::NotALedger)));
    }

    #[test]
    fn a_rewritten_record_with_a_right_checksum_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = sample(&directory);
        let text = std::fs::read_to_string(&path).unwrap();
        let old = text.lines().nth(2).unwrap();
        let payload = old.splitn(4, ' ').nth(3).unwrap().replace("vm-1", "vm-9");
        let forged = text.replace(old, frame::encode(Kind::Record, &payload).trim_end());
        std::fs::write(&path, forged).unwrap();
        assert!(matches!(
            verify(&path, &signer(1).verifying_key()),
            Err(LedgerError::Checkpoint { line: 5, .. })
        ));
    }

    #[test]
    fn removed_swapped_or_repeated_lines_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = sample(&directory);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        let variants = [
            [&lines[..2], &lines[3..]].concat(),
            [&lines[..2], &lines[3..4], &lines[2..3], &lines[4..]].concat(),
            [&lines[..3], &lines[2..]].concat(),
        ];
        for variant in variants {
            std::fs::write(&path, variant.concat()).unwrap();
            assert!(matches!(
                verify(&path, &signer(1).verifying_key()),
                Err(LedgerError::Damaged { .. })
            ));
        }
    }

    #[test]
    fn a_held_checkpoint_reveals_a_ledger_that_was_cut_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = sample(&directory);
        let key = signer(1).verifying_key();
        let held = verify(&path, &key)
            .unwrap()
            .last_checkpoint()
            .unwrap()
            .clone();
        let text = std::fs::read_to_string(&path).unwrap();
        let cut: String = text.split_inclusive('\n').take(5).collect();
        std::fs::write(&path, cut).unwrap();
        assert!(!verify(&path, &key).unwrap().contains(&held));
    }

    #[test]
    fn a_record_that_is_too_large_is_refused_and_the_ledger_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let mut ledger = open(&directory.path().join("ledger")).unwrap();
        let huge = entry(0).with("text", "x".repeat(frame::MAX_PAYLOAD).as_str());
        assert!(matches!(
            ledger.append(huge),
            Err(LedgerError::TooLarge { .. })
        ));
        assert_eq!(ledger.append(entry(0)).unwrap().seq, 0);
    }

    proptest! {
        /// Any changed byte anywhere in a ledger that ends in a checkpoint is noticed.
        #[test]
        fn any_changed_byte_is_noticed(at: prop::sample::Index, change in 1u8..) {
            static SAMPLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("changed");
            let mut bytes = SAMPLE.get_or_init(|| std::fs::read(sample(&directory)).unwrap()).clone();
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            std::fs::write(&path, &bytes).unwrap();
            prop_assert!(verify(&path, &signer(1).verifying_key()).is_err());
        }
    }
}
