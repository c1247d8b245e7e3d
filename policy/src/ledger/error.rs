//! What can be wrong with a ledger.

use std::io;
use std::path::{Path, PathBuf};

use super::frame;
use super::note::NoteError;
use super::tiles::TileError;

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
    /// A write failed; nothing of it counts.
    #[error(
        "the ledger cannot be written, so that nothing more is done: {0}; make room on its file system"
    )]
    Full(#[source] io::Error),
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
    /// An error in one of several files.
    #[error("{}: {source}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong in it.
        source: Box<LedgerError>,
    },
    /// The log is not of a trusted key.
    #[error(
        "none of the log's keys is the one that is trusted, nor was it named by that one; check the key, and ask who signed"
    )]
    UntrustedKey,
    /// Records were removed otherwise than by retention.
    #[error(
        "the records before {first} are gone and no record says that retention removed them; restore them from a copy, and treat the host as suspect"
    )]
    Removed {
        /// The first record that is there.
        first: u64,
    },
    /// Not all records are there any more.
    #[error("retention has removed the records before {first}; read the rest with an audit")]
    Pruned {
        /// The first record that is there.
        first: u64,
    },
    /// A checkpoint that was held is none of this log.
    #[error("a checkpoint that was kept is not by this log's keys: {0}")]
    Held(#[source] NoteError),
    /// The log is shorter than it was.
    #[error("the log was cut back: it had {held} records, and has {now}")]
    RolledBack {
        /// The size in the checkpoint that was kept.
        held: u64,
        /// The size now.
        now: u64,
    },
    /// The log has another past than it had.
    #[error(
        "the log's first {size} records are not those of the checkpoint that was kept: its history was rewritten"
    )]
    Forked {
        /// The size in the checkpoint that was kept.
        size: u64,
    },
    /// A tile is missing or wrong.
    #[error("{0}")]
    Tiles(#[from] TileError),
    /// A note could not be made or read.
    #[error("{0}")]
    Note(#[source] NoteError),
}

impl LedgerError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io(_) => "LEDGER_IO",
            Self::Busy => "LEDGER_BUSY",
            Self::Full(_) => "LEDGER_FULL",
            Self::TooLarge { .. } => "RECORD_TOO_LARGE",
            Self::NotALedger => "NOT_A_LEDGER",
            Self::TornTail { .. } => "TORN_TAIL",
            Self::Damaged { .. } => "DAMAGED",
            Self::Checkpoint { .. } => "CHECKPOINT",
            Self::File { source, .. } => source.code(),
            Self::UntrustedKey => "UNTRUSTED_KEY",
            Self::Removed { .. } => "REMOVED",
            Self::Pruned { .. } => "PRUNED",
            Self::Held(_) => "HELD_CHECKPOINT",
            Self::RolledBack { .. } => "ROLLED_BACK",
            Self::Forked { .. } => "FORKED",
            Self::Tiles(_) => "TILES",
            Self::Note(_) => "NOTE",
        }
    }

    pub(super) fn in_file(self, file: &Path) -> Self {
        Self::File {
            file: file.to_owned(),
            source: Box::new(self),
        }
    }
}
