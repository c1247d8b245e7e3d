//! A guest at rest: one file, every page sealed, nothing in it believed before its seal has opened.
//!
//! | Bytes | Part |
//! | --- | --- |
//! | 0..160 | header in clear, and its MAC |
//! | 4096.. | data pages, 4096 bytes of ciphertext each, ascending; a page that is not here is zero |
//! | behind | index: runs of data pages, and the tag of each page |
//! | behind | description, as the host's agent wrote it |
//! | behind | machine state |
//!
//! Index, description and state begin with the snapshot's id in clear and are sealed with the header as associated data.
//! So a page can be opened alone and in any order, and is bound to its place by its position in the sealed index and by
//! its own associated data. Header last: a file that was not finished is none.
//!
//! The seals are those of the stream ([`crate::page`]: AES-256-GCM, counters as nonces), but a stream's are bound to an
//! order, and these are not. Not here: keys, which come from outside and are good for one snapshot only; which of two
//! snapshots is the newer, which the generation in the header lets the host's agent decide.

mod format;
mod reader;
mod writer;

use std::io;

pub use format::{HEADER_SIZE, Header, MAX_DESCRIPTION, MAX_PAGES, MAX_RUNS, MAX_STATE};
pub use reader::Reader;
pub use writer::{Facts, Writer};

use crate::crypto::{AeadKey, CryptoError, KeySchedule, MacKey, Provider};

/// The parser behind the seal of the index, for those who throw bytes at it: how many of the pages have a place.
#[doc(hidden)]
pub fn parse_index(bytes: &[u8], header: &Header) -> Result<u64, VaultError> {
    let index = format::Index::parse(bytes, header)?;
    let placed = (0..header.pages.min(1 << 12)).filter(|page| index.slot(*page).is_some());
    Ok(placed.count() as u64)
}

/// Where a snapshot lies.
pub trait Storage {
    /// Size in bytes.
    fn size(&self) -> io::Result<u64>;
    /// Fills `into` from `offset`.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all of `from` at `offset`.
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()>;
}

impl Storage for std::fs::File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, into, offset)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, from, offset)
    }
}

/// Why a snapshot is refused.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// No header of a snapshot.
    #[error("not a snapshot, or one that was not finished")]
    Malformed,
    /// Another version.
    #[error("a snapshot of version {0}; this host reads version 1")]
    Version(u16),
    /// A number of the header or index is out of bounds.
    #[error("the snapshot's {0} is out of bounds")]
    Bounds(&'static str),
    /// The file is shorter than its header says.
    #[error("the snapshot is cut: {found} bytes of {wanted}")]
    Truncated {
        /// As the header says.
        wanted: u64,
        /// As it is.
        found: u64,
    },
    /// Something is behind the last part.
    #[error("{0} bytes are behind the snapshot's end")]
    Trailing(u64),
    /// The header's MAC does not verify.
    #[error("the snapshot's header was changed, or another host sealed it")]
    Header,
    /// A part is of another snapshot.
    #[error("the snapshot's {0} is another snapshot's")]
    Spliced(&'static str),
    /// The seal of a part does not open.
    #[error("the snapshot's {0} was changed")]
    Changed(&'static str),
    /// The seal of a page does not open.
    #[error("page {0:#x} of the snapshot was changed, or is of another place or snapshot")]
    Page(u64),
    /// Pages do not come ascending, or more than there are.
    #[error("page {0:#x} cannot be added to the snapshot")]
    Order(u64),
    /// The file failed.
    #[error("the snapshot's file: {0}")]
    Io(#[from] io::Error),
    /// A primitive failed.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

impl VaultError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed => "SNAPSHOT_MALFORMED",
            Self::Version(_) => "SNAPSHOT_VERSION",
            Self::Bounds(_) => "SNAPSHOT_BOUNDS",
            Self::Truncated { .. } => "SNAPSHOT_TRUNCATED",
            Self::Trailing(_) => "SNAPSHOT_TRAILING",
            Self::Header => "SNAPSHOT_HEADER",
            Self::Spliced(_) => "SNAPSHOT_SPLICED",
            Self::Changed(_) => "SNAPSHOT_CHANGED",
            Self::Page(_) => "SNAPSHOT_PAGE",
            Self::Order(_) => "SNAPSHOT_ORDER",
            Self::Io(_) => "SNAPSHOT_FILE",
            Self::Crypto(_) => "SNAPSHOT_CRYPTO",
        }
    }
}

/// The keys of one snapshot.
struct Keys {
    header: MacKey,
    pages: AeadKey,
    parts: AeadKey,
}

impl Keys {
    /// From the secret that is this snapshot's alone.
    fn derive(secret: &[u8; 32], snapshot_id: &[u8; 16]) -> Result<Self, CryptoError> {
        let schedule = KeySchedule::extract(snapshot_id, secret);
        Ok(Self {
            header: schedule.mac(b"casemate-snapshot/1 header")?,
            pages: schedule.aead(PROVIDER, b"casemate-snapshot/1 pages")?,
            parts: schedule.aead(PROVIDER, b"casemate-snapshot/1 parts")?,
        })
    }
}

/// In pieces of a page it is as fast as any.
const PROVIDER: Provider = Provider::Ring;

#[cfg(test)]
mod tests;
