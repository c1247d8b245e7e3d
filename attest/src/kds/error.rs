//! Why something could not be obtained.

use super::bundle::BundleError;
use super::cache::CacheError;
use super::client::ClientError;
use super::request::{Request, RequestError};
use super::response::ResponseError;
use crate::chain::ChainError;
use std::path::PathBuf;

/// Why something could not be obtained, with the object and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum KdsError {
    /// It cannot be asked for.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// No answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The cache folder cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The bundle cannot be read.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The answer has not the shape of what was asked for.
    #[error("{request}: {source}")]
    Response {
        /// What was asked for.
        request: Box<Request>,
        /// The reason.
        source: ResponseError,
    },
    /// The answer does not verify.
    #[error("{request} did not verify: {source}")]
    Unverified {
        /// What was asked for.
        request: Box<Request>,
        /// The reason.
        source: ChainError,
    },
    /// The answer is AMD's, but for another question.
    #[error("{request}: the answer is for {found}; nothing of it is used")]
    Other {
        /// What was asked for.
        request: Box<Request>,
        /// What the answer is for.
        found: String,
    },
    /// A cached file was refused, and there is no service to ask instead.
    #[error("the cached {} was refused: {source}; remove it, or fetch it again on a connected machine", .file.display())]
    Refused {
        /// The file.
        file: PathBuf,
        /// The reason.
        source: Box<KdsError>,
    },
    /// A cached revocation list is out of date, and there is no service to ask for a newer one.
    #[error("the cached {} is out of date: {source}; fetch it again on a connected machine", .file.display())]
    Stale {
        /// The file.
        file: PathBuf,
        /// The reason.
        source: Box<KdsError>,
    },
    /// Not in the cache, and there is no service to ask.
    #[error(
        "{request} is not in the cache; run `casemate attest fetch` on a connected machine and import its bundle"
    )]
    NotCached {
        /// What was asked for.
        request: Box<Request>,
    },
}

/// What an error means for who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lack {
    /// It could not be had: not reachable, not cached, not served.
    Unavailable,
    /// It was had, and is not what it should be.
    Unverified,
}

impl KdsError {
    /// A stable name for machines.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Request(error) => error.code(),
            Self::Client(error) => error.code(),
            Self::Cache(error) => error.code(),
            Self::Bundle(error) => error.code(),
            Self::Response { source, .. } => source.code(),
            Self::Unverified { source, .. } => source.code(),
            Self::Other { .. } => "KDS_OTHER_ANSWER",
            Self::Refused { .. } => "KDS_CACHE_REFUSED",
            Self::Stale { .. } => "KDS_CACHE_STALE",
            Self::NotCached { .. } => "KDS_NOT_CACHED",
        }
    }

    /// What it means for who asked.
    pub const fn lack(&self) -> Lack {
        match self {
            Self::Request(_)
            | Self::Cache(
                CacheError::Read { .. } | CacheError::Write { .. } | CacheError::Full { .. },
            )
            | Self::Bundle(BundleError::Read { .. } | BundleError::Write { .. })
            | Self::Stale { .. }
            | Self::NotCached { .. } => Lack::Unavailable,
            Self::Client(error) => match error {
                ClientError::TooLong { .. } => Lack::Unverified,
                _ => Lack::Unavailable,
            },
            Self::Cache(CacheError::Shape { .. })
            | Self::Bundle(_)
            | Self::Response { .. }
            | Self::Unverified { .. }
            | Self::Other { .. }
            | Self::Refused { .. } => Lack::Unverified,
        }
    }
}
