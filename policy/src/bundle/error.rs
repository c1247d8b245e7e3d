//! What can be wrong with a bundle.

use std::io;

use crate::ledger::tiles::TileError;
use crate::ledger::{LedgerError, NoteError};

/// Why a bundle was not made or not believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// The system refused.
    #[error("the bundle cannot be used: {0}")]
    Io(#[from] io::Error),
    /// The ledger is not what it must be.
    #[error("{0}")]
    Ledger(#[from] LedgerError),
    /// A tile is missing or wrong.
    #[error("{0}")]
    Tiles(#[from] TileError),
    /// Nothing is signed yet.
    #[error("nothing in the ledger is signed; let its agent write a checkpoint")]
    NothingSigned,
    /// A member is not what the format says.
    #[error("{member}: {what}; ask for the bundle again")]
    Malformed {
        /// The member.
        member: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A member is not the one in the manifest.
    #[error("{member} is not the one that the manifest lists; ask for the bundle again")]
    WrongDigest {
        /// The member.
        member: String,
    },
    /// A signature or its key is wrong.
    #[error("the {what} does not verify: {source}")]
    Signature {
        /// What was signed.
        what: &'static str,
        /// What is wrong.
        source: NoteError,
    },
    /// None of the log's keys is trusted.
    #[error(
        "none of the bundle's keys is the one that is trusted, nor was it named by that one; check the key, and ask who signed"
    )]
    UntrustedKey,
    /// The records are not those under the checkpoint.
    #[error("the records are not those that the checkpoint signs; they were changed after it")]
    WrongRecords,
    /// A record is not proven.
    #[error("record {seq} is not the one that the checkpoint signs")]
    WrongRecord {
        /// Its place.
        seq: u64,
    },
    /// The log is shorter than it was.
    #[error(
        "the log was cut back: it had {held} records, and the bundle's checkpoint is over {now}"
    )]
    RolledBack {
        /// The size in the checkpoint that was kept.
        held: u64,
        /// The size in the bundle.
        now: u64,
    },
    /// The log has another past than it had.
    #[error(
        "the log's first {size} records are not those of a checkpoint that was kept: its history was rewritten"
    )]
    Forked {
        /// The size in the checkpoint that was kept.
        size: u64,
    },
    /// The bundle cannot show that it extends a checkpoint.
    #[error(
        "the bundle has no proof from the checkpoint over {size} records; ask for one exported with `--since` that checkpoint"
    )]
    Unproven {
        /// The size in the checkpoint that was kept.
        size: u64,
    },
    /// Too few witnesses.
    #[error("no checkpoint in the bundle has enough witnesses: {0}")]
    Witnesses(#[source] NoteError),
}

impl BundleError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Io(_) => "BUNDLE_IO",
            Self::Ledger(error) => error.code(),
            Self::Tiles(_) => "TILES",
            Self::NothingSigned => "NOTHING_SIGNED",
            Self::Malformed { .. } => "MALFORMED",
            Self::WrongDigest { .. } => "WRONG_DIGEST",
            Self::Signature { .. } => "SIGNATURE",
            Self::UntrustedKey => "UNTRUSTED_KEY",
            Self::WrongRecords => "WRONG_RECORDS",
            Self::WrongRecord { .. } => "WRONG_RECORD",
            Self::RolledBack { .. } => "ROLLED_BACK",
            Self::Forked { .. } => "FORKED",
            Self::Unproven { .. } => "UNPROVEN",
            Self::Witnesses(_) => "WITNESSES",
        }
    }

    /// Whether it was not refused but could not be told: something needed for that is not there.
    pub fn cannot_tell(&self) -> bool {
        match self {
            Self::Io(_) | Self::Unproven { .. } => true,
            Self::Ledger(error) => matches!(error, LedgerError::Io(_)),
            _ => false,
        }
    }

    pub(super) fn malformed(member: &str, what: &'static str) -> Self {
        Self::Malformed {
            member: member.to_owned(),
            what,
        }
    }
}
