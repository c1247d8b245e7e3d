//! `casemate bench`: the stream's speed, measured by the real engine between two processes; no KVM needed.
//!
//! | | |
//! | --- | --- |
//! | [`migrate`] | both ends, what they agree on, and the report |
//! | [`machine`] | memory that never changes, as a guest the engine moves |
//! | [`unprotected`] | the same bytes without seals, or without TLS either: what protection is compared with |
//! | [`memory`] | that memory: random at the source, populated at the destination |
//! | [`parts`] | what copies, seals, TLS and the socket cost alone, in the same run |
//! | [`usage`] | processor time and peak memory of one end |

pub mod machine;
pub mod memory;
pub mod migrate;
pub mod parts;
pub mod unprotected;
pub mod usage;

/// A benchmark that could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A system call.
    #[error("{0}: {1}")]
    System(&'static str, #[source] std::io::Error),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] crate::confidential::shared::SharedError),
    /// Certificates.
    #[error("the certificates of the two ends: {0}")]
    Identity(#[from] casemate_crypto_migrate::identity::IdentityError),
    /// The engine.
    #[error("{0}")]
    Engine(String),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] casemate_crypto_migrate::tls::TlsError),
    /// The other end said something else than it must.
    #[error("the other end: {0}")]
    Peer(String),
    /// What was asked for cannot be.
    #[error("{0}")]
    Usage(String),
}

impl BenchError {
    /// Names the call that failed.
    pub fn system(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |error| Self::System(what, error)
    }
}
